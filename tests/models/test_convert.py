"""A converted student: what is the teacher's bit for bit, what the layers start from, what calibration does."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import convert as convert_module
from models.convert import CANDIDATES, UNCALIBRATED, HalfLives, calibrate, convert, mixed_by, set_half_lives, watch
from models.kda.reference import log_decay
from models.kept import PRESETS, keep_layers
from models.mapping import teacher_tensor
from models.probe import likeness, probe
from tests.models.hybrids import FAMILIES, VOCAB, tiny_teacher, tokens
from tests.tiny import tiny_gpt2

TEXT = torch.cat(tokens(70, 70, 70))


@pytest.mark.parametrize(
    ("spec", "layers", "kept"),
    [
        ("0,2,6", 8, (0, 2, 6)),
        (" 6, 0 ", 8, (0, 6)),
        ("none", 3, ()),
        ("all", 3, (0, 1, 2)),
        ("uniform", 28, (3, 7, 11, 15, 19, 23, 27)),
        ("uniform", 30, (3, 7, 11, 15, 19, 23, 27)),
        ("uniform:4", 8, (3, 7)),
        ("uniform:3", 8, (2, 5)),
        ("uniform:1", 3, (0, 1, 2)),
        ("qwen3-0.6b", 28, (0, 2, 6, 11, 13, 18, 21)),
    ],
)
def test_the_layers_kept(spec: str, layers: int, kept: tuple[int, ...]) -> None:
    assert keep_layers(spec, layers) == kept


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("0,1,0", "keep names layer 0 2 times: expected each layer once"),
        ("1,3", "keep names layer 3: expected 0 to 2"),
        ("-1", "keep names layer -1: expected 0 to 2"),
        ("", "keep is '': expected layers such as 0,2,6"),
        ("0,,2", "keep is '0,,2': expected layers such as 0,2,6"),
        ("unifrom", "did you mean 'uniform'"),
        ("uniform:0", "expected uniform:N with N of at least 1"),
        ("uniform:", "expected uniform:N with N of at least 1"),
        ("uniform:4", "keeps no layer of 3: use a smaller N, or none"),
        ("qwen3-0.6b", "a preset for a teacher of 28 layers, but this one has 3"),
    ],
)
def test_wrong_layers_are_told(spec: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        convert(tiny_teacher("llama"), spec)
    assert set(PRESETS) == {"qwen3-0.6b"}


@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_layer_kept_it_is_its_teacher_bit_for_bit(family: str) -> None:
    teacher = tiny_teacher(family)
    student = convert(teacher, "all")
    mine, other = student.state_dict(), teacher.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in other)
    with torch.no_grad():
        assert torch.equal(student(TEXT).logits, teacher(TEXT).logits)
    assert probe(student, teacher, TEXT) == {"layers": [], "kl_nats": 0.0, "top1_agreement": 1.0, "tokens": 210}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_the_new_parts_is_the_teachers_bit_for_bit(family: str) -> None:
    teacher = tiny_teacher(family)
    student = convert(teacher, [1]).state_dict()
    for name, tensor in teacher.state_dict().items():
        mine = name if ".1." in name else name.replace(".self_attn.", ".kda.")
        if "_norm.weight" in name and ".self_attn." in name and ".1." not in name:
            assert mine not in student, "Qwen3's norms are folded away"
        elif not (family == "qwen3" and any(part in mine for part in (".kda.q_proj", ".kda.k_proj"))):
            assert torch.equal(student[mine], tensor), name
    assert student["model.layers.0.kda.k_proj.weight"].shape == (16, 32), "k at the teacher's own two heads"
    biases = {name.rpartition(".kda.")[2] for name in student if ".kda." in name and name.endswith("proj.bias")}
    assert biases - {"g_b_proj.bias"} == ({"q_proj.bias", "k_proj.bias", "v_proj.bias"} if family == "qwen2" else set())


@pytest.mark.parametrize("bias", [False, True])
def test_qwen3s_norms_are_folded_into_the_rows(bias: bool) -> None:
    """L2norm(RMSnorm(q) * w) = L2norm(q * w): what KDA sees is what attention saw."""
    teacher = tiny_teacher("qwen3", attention_bias=bias)
    kda, attention = convert(teacher, []).model.layers[2].kda, teacher.model.layers[2].self_attn
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for name in "qk":
        norm = getattr(attention, f"{name}_norm")
        assert not torch.equal(norm.weight, torch.ones(8))
        wanted = norm(getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, 8)))
        found = getattr(kda, f"{name}_proj")(x).unflatten(-1, (-1, 8))
        torch.testing.assert_close(F.normalize(found, dim=-1), F.normalize(wanted, dim=-1), atol=2e-6, rtol=0)


@pytest.mark.parametrize("gate", ["bounded", "softplus"])
def test_half_lives_are_log_spaced_from_2_to_2048_tokens(gate: str) -> None:
    kda = convert(tiny_teacher("llama"), [], gate=gate).model.layers[0].kda
    decay = log_decay(torch.zeros(1, 4, 8), kda.A_log, kda.dt_bias, gate, -5.0)[0]
    wanted = torch.tensor([2.0 ** (1 + 10 * i / 7) for i in range(8)])
    torch.testing.assert_close(-math.log(2) / decay, wanted.expand(4, 8), rtol=1e-4, atol=0)
    newest = torch.zeros(32, 4)
    newest[:, -1] = 1
    assert torch.equal(kda.q_conv, newest), "the convolution passes its input on"


def test_rotary_half_lives_are_shared_by_the_channels_that_rope_turns_together() -> None:
    lives = HalfLives(2, 32, "rotary").tokens(8)
    torch.testing.assert_close(lives.float(), torch.tensor([32, 12.6992, 5.0397, 2] * 2))


@pytest.mark.parametrize(
    "options", [{}, {"gate": "softplus", "rope": True}, {"output_gate": False, "conv_size": 2}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_makes_the_mixers_rms_the_teachers(family: str, options: dict[str, Any]) -> None:
    teacher = tiny_teacher(family)
    student = convert(teacher, [1], **options)
    calibrate(student, teacher, TEXT)
    for seen in watch(teacher, [0, 2], TEXT):
        mixed = mixed_by(student.model.layers[seen.layer].kda, seen)
        wanted = seen.mixed.unflatten(-1, (4, 8))
        ratio = mixed.square().mean((0, 1)).sqrt() / wanted.square().mean((0, 1)).sqrt()
        torch.testing.assert_close(ratio, torch.ones(4, 8), rtol=1e-4, atol=0)


def test_calibration_lowers_the_layers_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norms' part alone, and the choice of half-lives on top of it."""
    teacher = tiny_teacher("llama")

    def errors(student: Any) -> list[float]:
        return [one["relative_error"] for one in probe(student, teacher, TEXT)["layers"]]

    raw, norms, both = (convert(teacher, []) for _ in range(3))
    calibrate(both, teacher, TEXT)
    monkeypatch.setattr(convert_module, "CANDIDATES", (UNCALIBRATED,))
    calibrate(norms, teacher, TEXT)
    assert len(errors(raw)) == 3
    for before, between, after in zip(errors(raw), errors(norms), errors(both), strict=True):
        assert after <= between < before
    assert sum(errors(both)) < sum(errors(norms)) - 0.01


def test_calibration_takes_the_best_half_lives_of_each_head() -> None:
    """Every other choice for a head makes its share of the layer's output worse."""
    teacher = tiny_teacher("llama")
    student = convert(teacher, [0, 1])
    calibrate(student, teacher, TEXT)
    kda = student.model.layers[2].kda
    [seen] = watch(teacher, [2], TEXT)
    chosen = {name: value.clone() for name, value in kda.state_dict().items()}
    goal = seen.mixed.unflatten(-1, (4, 8))
    out = kda.o_proj.weight.unflatten(1, (4, 8))

    @torch.no_grad()
    def share_missed() -> torch.Tensor:
        missed = torch.einsum("bthd,ohd->bhto", mixed_by(kda, seen) - goal, out)
        return missed.square().sum((0, 2, 3))

    best = share_missed()
    found = set()
    for one in CANDIDATES:
        with torch.no_grad():
            set_half_lives(kda, [one] * 4)
            found |= {(h, one) for h in range(4) if torch.equal(kda.dt_bias[h], chosen["dt_bias"][h])}
            kda.o_norm.fill_(1)
            kda.o_norm.copy_(goal.square().mean((0, 1)).sqrt() / mixed_by(kda, seen).square().mean((0, 1)).sqrt())
        assert bool((share_missed() >= best * (1 - 1e-5)).all())
    assert [h for h, _ in sorted(found, key=lambda pair: pair[0])] == [0, 1, 2, 3]


def test_conversion_and_calibration_are_deterministic_and_leave_the_teacher_alone() -> None:
    teacher = tiny_teacher("qwen2")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        student = convert(teacher, [0])
        calibrate(student, teacher, TEXT)
        made.append(student.state_dict())
        assert torch.initial_seed() == seed
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*teacher.modules(), *student.modules()))


def test_a_half_precision_teacher_has_a_half_precision_student_with_float32_gates() -> None:
    teacher = tiny_teacher("llama").to(torch.bfloat16)
    student = convert(teacher, [1])
    calibrate(student, teacher, TEXT)
    wide = {name.rpartition(".")[2] for name, x in student.state_dict().items() if x.dtype == torch.float32}
    assert wide == {"A_log", "dt_bias", "o_norm"}
    assert student.dtype == torch.bfloat16


def test_a_perfect_copy_has_cosine_one_and_no_error() -> None:
    """A mixer that is the teacher's attention itself, probed as any other."""
    teacher = tiny_teacher("llama")
    student = convert(teacher, [1])

    class Copy(torch.nn.Module):
        def forward(self, x: torch.Tensor, **named: Any) -> Any:
            attention = teacher.model.layers[0].self_attn
            place = named["position_embeddings"]
            return attention(hidden_states=x, position_embeddings=place, attention_mask=None)[0]

    calibrate(student, teacher, TEXT)
    other = probe(student, teacher, TEXT)["layers"]
    student.model.layers[0].kda = Copy()
    layers = probe(student, teacher, TEXT)["layers"]
    assert layers[0]["cosine"] == pytest.approx(1, abs=1e-6)
    assert layers[0]["relative_error"] == pytest.approx(0, abs=1e-5)
    assert layers[1] == other[1], "no layer answers for another"
    assert other[0]["cosine"] < 0.99


def test_likeness_by_hand() -> None:
    wanted = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    found = likeness(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), wanted)
    assert found["cosine"] == pytest.approx(0.5)
    assert found["relative_error"] == pytest.approx(math.sqrt(5 / 26))


def test_the_end_to_end_figures_are_those_of_dense_logits() -> None:
    teacher = tiny_teacher("qwen3")
    student = convert(teacher, [1])
    ids = torch.cat(tokens(150, 150))  # more than one chunk of a row
    found = probe(student, teacher, ids)
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (teacher, student))
    assert found["kl_nats"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found["tokens"] == 300
    assert 0 < found["kl_nats"] < math.log(VOCAB) * 5


def test_the_mapping_knows_no_teacher_for_new_parts() -> None:
    find = teacher_tensor(tiny_teacher("llama").state_dict())
    for part in ("A_log", "dt_bias", "o_norm", "q_conv", "f_a_proj.weight", "b_proj.weight", "g_b_proj.bias"):
        assert find(f"model.layers.0.kda.{part}") is None
    assert find("model.layers.0.kda.q_proj.bias") is None, "Llama's attention has no bias"


def test_teachers_that_cannot_be_converted_are_named() -> None:
    for keep in ("none", "uniform:9"):  # the family is told first
        with pytest.raises(ValueError, match="family 'gpt2': expected one of llama, qwen2, qwen3"):
            convert(tiny_gpt2(400), keep)
    with pytest.raises(ValueError, match="family 'hybrid_kda': expected one of llama"):
        convert(convert(tiny_teacher("llama"), "none"), "none")
    teacher = tiny_teacher("llama")
    with pytest.raises(ValueError, match="lower_bound is -0.1: expected below -0.35"):
        convert(teacher, "none", lower_bound=-0.1)
    teacher.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="the teacher is quantised"):
        convert(teacher, "none")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("options", [{}, {"gate": "softplus", "rope": True}], ids=str)
def test_on_a_gpu_the_probe_says_what_it_says_on_the_cpu(options: dict[str, Any]) -> None:
    """Through the kernels, calibration and probe in bfloat16."""
    found = []
    for device in ("cpu", "cuda"):
        teacher = tiny_teacher("qwen3", head_dim=64).to(device, torch.bfloat16)
        student = convert(teacher, [1], **options)
        assert {value.device.type for value in student.state_dict().values()} == {device}
        calibrate(student, teacher, TEXT)
        found.append(probe(student, teacher, TEXT))
    for one, other in zip(found[0].pop("layers"), found[1].pop("layers"), strict=True):
        assert one == pytest.approx(other, abs=0.03)
    assert found[0] == pytest.approx(found[1], abs=0.05)
