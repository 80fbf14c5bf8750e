"""Layer selection finds the layers whose attention matters; what it measures is what a restored student has."""

from typing import Any

import pytest
import torch

from distill.groups import frozen_hashes
from distill.select import keep_layers_of, kl_restore, restore
from distill.student import make_student
from models.load import Loaded
from models.probe import end_to_end
from tests.distill.students import loaded, recipe
from tests.models.hybrids import FAMILIES, tokens

X = torch.cat(tokens(33, 33, seed=3))
TEXT = torch.cat(tokens(70, 70))


def all_kda(teacher: Loaded, **options: Any) -> Any:
    return make_student(teacher, recipe(**options), keep=(), text=TEXT)


def scaled(scales: list[float], family: str = "llama") -> Loaded:
    """A teacher whose layers' attention adds so much of itself, each the same attention otherwise."""
    teacher = loaded(family, num_hidden_layers=len(scales))
    with torch.no_grad():
        for layer in teacher.model.model.layers[1:]:
            layer.load_state_dict(teacher.model.model.layers[0].state_dict())
        for layer, scale in zip(teacher.model.model.layers, scales, strict=True):
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(0.1)
    return teacher


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("which", [0, 2, 3])
def test_the_one_layer_whose_attention_matters_is_kept(which: int, greedy: bool) -> None:
    teacher = scaled([4.0 if layer == which else 1e-6 for layer in range(4)])
    kept, table = kl_restore(teacher, all_kda(teacher), X, 1, greedy=greedy)
    assert kept == (which,)
    gains = {row["layer"]: row["gain_nats"] for row in table}
    assert gains[which] > 1e-3 and all(abs(gain) < 1e-5 for layer, gain in gains.items() if layer != which)
    assert table[which]["kl_nats"] < 1e-5, "with it restored nothing is missing"


@pytest.mark.parametrize("family", FAMILIES)
def test_two_layers_are_ranked_by_how_much_their_attention_adds(family: str) -> None:
    teacher = scaled([1e-6, 1.0, 1e-6, 4.0, 0.1], family)
    student = all_kda(teacher)
    kept, table = kl_restore(teacher, student, X, 3)
    ranking = sorted(table, key=lambda row: -row["gain_nats"])
    assert [row["layer"] for row in ranking[:2]] == [3, 1]
    assert kl_restore(teacher, student, X, 1)[0] == (3,) and kl_restore(teacher, student, X, 2)[0] == (1, 3)
    assert set(kept) > {1, 3}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_measured_is_the_kl_of_the_restored_student(family: str, dtype: str, attention: str) -> None:
    teacher = loaded(family, attn_implementation=attention)
    assert teacher.model.config._attn_implementation == attention
    teacher.model.to(getattr(torch, dtype))
    student = all_kda(teacher, dtype=dtype)
    _, table = kl_restore(teacher, student, X, 2, greedy=True)
    first = [row for row in table if row["step"] == 1]
    best = min(first, key=lambda row: row["kl_nats"])["layer"]
    start = end_to_end(student, teacher.model, X)["kl_nats"]
    for row in table:
        layers = [row["layer"]] if row["step"] == 1 else [best, row["layer"]]
        wanted = end_to_end(restore(student, teacher, layers), teacher.model, X)
        assert row["kl_nats"] == pytest.approx(wanted["kl_nats"], rel=1e-4)
        assert row["top1_agreement"] == wanted["top1_agreement"]
        if row["step"] == 1:
            assert row["gain_nats"] == pytest.approx(start - row["kl_nats"])


def test_sliding_windows_are_masked_as_the_teacher_masks_them() -> None:
    teacher = loaded("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert teacher.model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    student = all_kda(teacher)
    for row in kl_restore(teacher, student, X, 1)[1]:
        wanted = end_to_end(restore(student, teacher, [row["layer"]]), teacher.model, X)
        assert row["kl_nats"] == pytest.approx(wanted["kl_nats"], rel=1e-4)


def test_student_and_teacher_stay_as_they_are() -> None:
    teacher = loaded()
    student = all_kda(teacher).train()
    hashes = [frozen_hashes(model, ()) for model in (student, teacher.model)]
    with torch.no_grad():
        before = student(X).logits
    seen: list[int] = []
    kl_restore(teacher, student, X, 2, report=lambda what, done, total: seen.append((what, done, total)), greedy=True)
    assert seen == [("kl-restore", done, 5) for done in range(1, 6)], "3 layers, then 2"
    assert hashes == [frozen_hashes(model, ()) for model in (student, teacher.model)]
    with torch.no_grad():
        assert torch.equal(student(X).logits, before)
    assert student.training and student.config.kept_layers == []
    hooked = [module for model in (student, teacher.model) for module in model.modules() if module._forward_hooks]
    assert hooked == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restored_student_has_the_teachers_attention_and_all_else_of_the_students(family: str) -> None:
    teacher = loaded(family)
    student = all_kda(teacher, gate="softplus", conv_size=3, dtype="bfloat16")
    with torch.no_grad():  # aligned, and more
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    made = restore(student, teacher, (2, 0))
    assert made.config.kept_layers == [0, 2] and made.config.kda_gate == "softplus" and made.dtype == torch.bfloat16
    own, given = student.state_dict(), teacher.model.state_dict()
    for name, tensor in made.state_dict().items():
        wanted = given[name].bfloat16() if ".self_attn." in name else own[name]
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
    assert not {one.data_ptr() for one in made.parameters()} & {one.data_ptr() for one in student.parameters()}


def test_a_rule_is_read_or_left_to_the_others() -> None:
    assert keep_layers_of("kl-restore:7") == 7
    assert [keep_layers_of(rule) for rule in ("uniform:4", "0,2", "none", "qwen3-0.6b")] == [None] * 4
    for rule in ("kl-restore", "kl-restore:0", "kl-restore:x", "kl-restore:-1"):
        with pytest.raises(ValueError, match=f"keep is '{rule}': expected kl-restore:N"):
            keep_layers_of(rule)


def test_what_can_not_be_selected_is_told() -> None:
    teacher = loaded()
    with pytest.raises(ValueError, match="keep is 4 layers: expected 1 to 3"):
        kl_restore(teacher, all_kda(teacher), X, 4)
    hybrid = make_student(teacher, recipe(), text=TEXT)
    with pytest.raises(ValueError, match=r"keeps attention in layers \[1\]: expected none"):
        kl_restore(teacher, hybrid, X, 1)
    with pytest.raises(ValueError, match="is a LlamaForCausalLM: expected one with KDA layers"):
        kl_restore(teacher, teacher.model, X, 1)
    with pytest.raises(ValueError, match="layer 1 of the student is attention"):
        restore(hybrid, teacher, (0,))
