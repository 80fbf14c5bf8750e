"""What a recipe makes of a teacher: copies bit for bit, fresh parts as announced; and adapters that merge exactly."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.groups import FRESH, mixer_layers, trained
from distill.stage import Lora
from distill.student import add_lora, lora_factors, make_student, merged_state, plain_model
from models.convert import calibrate, cast, convert
from models.delta import save_delta
from models.load import Loaded, load
from models.text import batches
from tests.distill.students import loaded, recipe
from tests.models.hybrids import FAMILIES, tokens
from tests.models.test_delta import same_weights, saved

X = torch.cat(tokens(40, 40))
TEXT = torch.cat(tokens(70, 70))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(X).logits


def shake_adapters(model: Any) -> None:
    """As if trained: B is 0 in a new adapter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if ".lora_" in name:
                one += 0.1 * torch.randn(one.shape, generator=generator)


def test_a_kda_student_is_what_convert_and_calibrate_make() -> None:
    teacher = loaded("qwen3")
    made = make_student(teacher, recipe(gate="softplus", conv_size=3, output_gate=False, rope=True, seed=4))
    wanted = convert(teacher.model, [1], gate="softplus", conv_size=3, output_gate=False, rope=True, seed=4)
    calibrate(wanted, teacher.model, batches(teacher.tokenizer, window=256).calibration)
    assert same_weights(made, wanted)
    assert (made.config.kda_gate, made.config.kda_conv_size, made.config.kda_rope) == ("softplus", 3, True)


def test_layers_that_are_given_replace_the_recipes_rule() -> None:
    teacher = loaded()
    assert make_student(teacher, recipe(), keep=(), text=TEXT).config.kept_layers == []
    assert make_student(teacher, recipe(keep="kl-restore:1"), keep=(2, 0), text=TEXT).config.kept_layers == [0, 2]
    with pytest.raises(ValueError, match="'kl-restore:1', which compares trained layers: select them first"):
        make_student(teacher, recipe(keep="kl-restore:1"))
    for mixer in ("softmax", "same"):
        with pytest.raises(ValueError, match=f"compares KDA layers, but student.mixer is {mixer}: list the"):
            make_student(teacher, recipe(keep="kl-restore:1", mixer=mixer), keep=())
    with pytest.raises(ValueError, match="keep names layer 7"):
        make_student(teacher, recipe(), keep=(7,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", ["kda", "softmax", "same"])
def test_a_student_has_the_recipes_dtype_but_where_the_model_wants_float32(mixer: str, dtype: str) -> None:
    for teacher in (loaded(), loaded()):
        cast(teacher.model, torch.bfloat16)
        student = make_student(teacher, recipe(dtype, mixer=mixer, lora=Lora(rank=2)), text=TEXT)
        wide = {name.rpartition(".")[2] for name, one in student.named_parameters() if one.dtype != student.dtype}
        assert wide <= {"A_log", "dt_bias", "o_norm"} and student.dtype == getattr(torch, dtype)
        assert not student.training and bool(logits(student).isfinite().all())
        assert teacher.dtype == "bfloat16", "the teacher stays as it is"


def test_cast_gives_what_loading_in_that_dtype_gives(tmp_path: Path) -> None:
    student = make_student(loaded(), recipe(), text=TEXT)
    student.save_pretrained(tmp_path)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast(student, torch.bfloat16)
    assert same_weights(student, wanted)
    assert torch.equal(student.model.rotary_emb.inv_freq, wanted.model.rotary_emb.inv_freq), "RoPE stays float32"
    assert torch.equal(logits(student), logits(wanted))
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_control_begins_anew_where_attention_is_not_kept_and_nowhere_else(family: str, tmp_path: Path) -> None:
    teacher = loaded(family, hidden_size=64, head_dim=16, initializer_range=0.02, attention_bias=family != "qwen2")
    control = make_student(teacher, recipe(mixer="softmax"))
    assert type(control) is type(teacher.model)
    own, given = control.state_dict(), teacher.model.state_dict()
    fresh = {f"model.layers.{layer}.self_attn." for layer in (0, 2)}
    for name in given:
        part = name.rpartition("self_attn.")[2]
        if not any(name.startswith(layer) for layer in fresh):
            assert torch.equal(own[name], given[name]), name
        elif part.endswith("proj.weight"):
            assert float(own[name].std()) == pytest.approx(0.02, rel=0.1) and abs(float(own[name].mean())) < 0.002
            assert not torch.equal(own[name], given[name])
        else:
            assert own[name].unique().tolist() == [1.0 if "norm" in name else 0.0], name
    control.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert mixer_layers(again) == {0, 2} and same_weights(again, control)
    assert trained(again, ["mixer"]).keys() == {name for name in given if any(map(name.startswith, fresh))}


def test_the_seed_decides_what_is_random_and_the_callers_generator_is_left_alone() -> None:
    for options in ({"mixer": "softmax"}, {"mixer": "kda"}, {"mixer": "same", "lora": Lora(rank=2)}):
        teacher = loaded()
        before = torch.get_rng_state()
        one, other, third = (make_student(teacher, recipe(seed=seed, **options), text=TEXT) for seed in (3, 3, 4))
        assert torch.equal(torch.get_rng_state(), before)
        assert same_weights(one, other) and not same_weights(one, third)


def test_same_is_a_copy_that_training_does_not_share_with_its_teacher() -> None:
    teacher = loaded("qwen2")
    copy = make_student(teacher, recipe(mixer="same", keep="all"))
    assert same_weights(copy, teacher.model)
    assert not {one.data_ptr() for one in copy.parameters()} & {one.data_ptr() for one in teacher.model.parameters()}


def test_a_control_that_becomes_a_teacher_is_an_ordinary_one() -> None:
    control = loaded()
    setattr(control.model.config, FRESH, [0, 2])
    for mixer in ("same", "kda"):
        student = make_student(control, recipe(mixer=mixer), text=TEXT)
        assert not hasattr(student.config, FRESH)
    assert getattr(control.model.config, FRESH) == [0, 2]


@pytest.mark.parametrize(
    ("mixer", "on", "layers"),
    [
        ("kda", ("attention",), {"1.self_attn": 4}),
        ("kda", ("mixer",), {"0.kda": 4, "2.kda": 4}),
        ("kda", ("mlp", "attention"), {"1.self_attn": 4, "0.mlp": 3, "1.mlp": 3, "2.mlp": 3}),
        ("softmax", ("mixer",), {"0.self_attn": 4, "2.self_attn": 4}),
        ("softmax", ("attention",), {"1.self_attn": 4}),
        ("same", ("attention",), {"0.self_attn": 4, "1.self_attn": 4, "2.self_attn": 4}),
    ],
)
def test_adapters_go_where_they_are_asked_for_and_change_nothing_yet(
    mixer: str, on: tuple[str, ...], layers: dict[str, int]
) -> None:
    plain = make_student(loaded(), recipe(mixer=mixer), text=TEXT)
    student = make_student(loaded(), recipe(mixer=mixer, lora=Lora(rank=2, on=on)), text=TEXT)
    places: dict[str, int] = {}
    for name in lora_factors(student):
        place = name.removeprefix("model.layers.").rsplit(".", 2)[0]
        places[place] = places.get(place, 0) + 1
    assert places == layers
    assert torch.equal(logits(student), logits(plain))
    assert same_weights(plain_model(student), plain)
    assert same_weights(make_student(loaded(), recipe(mixer=mixer, lora=Lora(on=on)), text=TEXT, lora=False), plain)


def test_the_merged_model_answers_as_the_adapted_one_which_stays_as_it_is() -> None:
    lora = Lora(rank=3, alpha=7, on=("attention", "mixer", "mlp"))
    student = make_student(loaded("qwen2"), recipe(lora=lora), text=TEXT)
    without = make_student(loaded("qwen2"), recipe(), text=TEXT)
    shake_adapters(student)
    before = {name: one.clone() for name, one in student.state_dict().items()}
    plain, state = plain_model(student), merged_state(student)
    torch.testing.assert_close(logits(plain), logits(student), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(plain), logits(without), atol=1e-2)
    assert plain.state_dict().keys() == without.state_dict().keys() == state.keys()
    assert all(torch.equal(one, state[name]) for name, one in plain.state_dict().items())
    after = student.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for name, (A, B) in lora_factors(student).items():
        base = before[name.replace(".weight", ".base_layer.weight")]
        assert A.shape == (len(base), 3) and B.shape == (3, base.shape[1])
        torch.testing.assert_close(state[name], base + A @ B)


def test_a_model_without_adapters_is_plain() -> None:
    student = make_student(loaded(), recipe(), text=TEXT)
    assert plain_model(student) is student and lora_factors(student) == {}
    assert merged_state(student).keys() == student.state_dict().keys()


@pytest.mark.parametrize("alpha", [4, 7])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mixer", ["same", "kda"])
def test_a_delta_of_factors_gives_back_the_plain_model(mixer: str, dtype: str, alpha: float, tmp_path: Path) -> None:
    teacher = saved(cast(loaded("qwen3").model, getattr(torch, dtype)), tmp_path / "teacher")
    on = ("attention", "mlp")
    student = make_student(teacher, recipe(dtype, mixer=mixer, lora=Lora(rank=2, alpha=alpha, on=on)), text=TEXT)
    shake_adapters(student)
    plain, factors = plain_model(student), lora_factors(student, teacher.model)
    assert factors.keys() == lora_factors(student).keys()
    encoding = {"*.kda.*": "int8"} if mixer == "kda" else {}
    told = save_delta(plain, teacher, tmp_path / "delta", encoding=encoding, factors=factors)
    kinds = {name: entry["encoding"] for name, entry in told["tensors"].items()}
    assert {name for name, kind in kinds.items() if kind == "lowrank"} == factors.keys()
    if mixer == "same":
        assert kinds.keys() == factors.keys(), "what is not adapted is the teacher's"
    again = load(str(tmp_path / "delta")).model.state_dict()
    for name, one in plain.state_dict().items():
        if kinds.get(name) == "int8":
            assert float((again[name] - one).norm() / one.norm()) < 0.01
        else:
            assert again[name].dtype == one.dtype and torch.equal(again[name], one), name


def test_factors_of_a_weight_that_was_trained_whole_are_left_to_the_encoding(tmp_path: Path) -> None:
    teacher = saved(loaded().model, tmp_path / "teacher")
    student = make_student(teacher, recipe(lora=Lora(rank=2, on=("mixer", "mlp"))), text=TEXT)
    shake_adapters(student)
    with torch.no_grad():
        student.model.layers[0].kda.q_proj.base_layer.weight += 0.05
    name = "model.layers.0.kda.q_proj.weight"
    with pytest.raises(ValueError, match=f"the factors of {name} give another tensor"):
        save_delta(plain_model(student), teacher, tmp_path / "delta", factors=lora_factors(student))
    factors = lora_factors(student, teacher.model)
    assert lora_factors(student).keys() - factors.keys() == {name}
    save_delta(plain_model(student), teacher, tmp_path / "delta", factors=factors)
    assert same_weights(load(str(tmp_path / "delta")).model, plain_model(student))


def test_gradients_reach_the_factors_alone() -> None:
    student = make_student(loaded(), recipe(lora=Lora(rank=2)), text=TEXT)
    shake_adapters(student)
    student(X).logits.square().mean().backward()
    reached = {name for name, one in student.named_parameters() if one.grad is not None}
    assert reached == {name for name, _ in student.named_parameters() if ".lora_" in name}


def test_adapters_that_have_no_place_are_refused() -> None:
    with pytest.raises(ValueError, match="'mixer', of which the student has no layer: it has attention, mlp"):
        make_student(loaded(), recipe(mixer="same", lora=Lora(on=("mixer",))))
    with pytest.raises(ValueError, match="'attention', of which"):
        make_student(loaded(), recipe(keep="none", lora=Lora()), text=TEXT)


def test_a_missing_peft_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    student = make_student(loaded(), recipe(), text=TEXT)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs peft, .*pip install 'evalkit\[distill\]'"):
        add_lora(student, Lora())


def test_the_teachers_family_is_checked() -> None:
    from tests.tiny import tiny_gpt2, tiny_tokenizer

    other = Loaded(name="gpt2", model=tiny_gpt2(400), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="of the family 'gpt2'"):
        make_student(other, recipe())
