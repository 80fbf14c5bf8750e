"""`evalkit quantise`: every format is round-to-nearest by hand, and its copy is scored like the model it stands for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import evalkit as ek
from evalkit.engines.hf import HFEngine
from evalkit.records import Request
from models.load import describe, load
from models.quantise import ACTIVATIONS, BITS, quantise
from models.students import make_student
from tests.models.hybrids import tiny_hybrid, tiny_teacher
from tests.tiny import tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer

# Older compressed-tensors, the last ones for Python 3.10, compile a helper with torch.jit when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

PROSE = (
    "The capital of France is Paris. Water boils at a hundred degrees, and freezes at zero. A dog barks, a cat "
    "does not. In autumn the leaves of many trees turn red and yellow before they fall to the ground."
)
IDS = torch.arange(5, 25)[None]
TWO_WAYS = "5.20"
"""transformers from which on "dequantise" unpacks compressed-tensors without its rules for activations."""
COMPRESSED = [form for form in BITS if not form.startswith("torchao-")]
"""Those of compressed-tensors."""


@pytest.fixture(params=list(BITS))
def form(request: pytest.FixtureRequest) -> str:
    """Each format whose package is there."""
    request.getfixturevalue("torchao" if request.param.startswith("torchao-") else "compressed_tensors")
    return str(request.param)


def by_hand(weight: torch.Tensor, form: str, group: int) -> torch.Tensor:
    """Symmetric round-to-nearest: a group's largest magnitude becomes half the range of its integers, or the largest
    E4M3 float."""
    if form == "fp8":
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = weight.abs().amax(-1, keepdim=True) / largest
        return (weight / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).float() * scale
    bits = BITS[form]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows = weight.unflatten(-1, (-1, group or weight.shape[-1]))
    scale = rows.abs().amax(-1, keepdim=True) / ((high - low) / 2)
    return ((rows / scale).round().clamp(low, high) * scale).flatten(-2)


def oracle(form: str, group: int) -> Any:
    model = tiny_llama(400)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(by_hand(module.weight, form, group))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("group", [None, 32, 0])
@pytest.mark.parametrize("form", [form for form in COMPRESSED if form not in ACTIVATIONS])
def test_a_copy_is_rounded_to_nearest(
    form: str, group: int | None, compressed_tensors: None, tiny_folder: Path, tmp_path: Path
) -> None:
    note = quantise(str(tiny_folder), tmp_path / "copy", form, group_size=group)
    expected = (32 if BITS[form] == 4 else 0) if group is None else group
    assert note["axes"] == {"compression": "quantisation", "format": form, "group_size": expected}
    copy = load(str(tmp_path / "copy"))
    torch.testing.assert_close(logits(copy.model), logits(oracle(form, expected)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("group", [32, 0])
@pytest.mark.parametrize("form", ["torchao-int4", "torchao-int8"])
def test_torchao_computes_with_the_nearest_integers(
    form: str, group: int, torchao: None, tiny_folder: Path, tmp_path: Path
) -> None:
    """Not ``by_hand``: a group's largest weight lies midway between two integers, and torchao may take the other."""
    quantise(str(tiny_folder), tmp_path / "copy", form, group_size=group)
    copy = load(str(tmp_path / "copy"))
    model = tiny_llama(400)
    with torch.no_grad():
        for name, packed in copy.model.named_parameters():
            if hasattr(packed, "qdata"):
                weight = model.get_parameter(name)
                groups = packed.scale.reshape(weight.shape[0], -1, 1)
                exact = weight.unflatten(-1, (-1, group or weight.shape[-1]))
                rounded = packed.qdata.float().reshape(exact.shape) * groups
                torch.testing.assert_close(groups * (2 ** BITS[form] - 1) / 2, exact.abs().amax(-1, keepdim=True))
                assert ((rounded - exact).abs() <= 0.5001 * groups).all()
                weight.copy_(rounded.flatten(-2))
    assert not torch.equal(logits(model), logits(tiny_llama(400)))
    torch.testing.assert_close(logits(copy.model), logits(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_activations_are_rounded_too(form: str, compressed_tensors: None, tiny_folder: Path, tmp_path: Path) -> None:
    quantise(str(tiny_folder), tmp_path / "copy", form)
    model = oracle(form, 0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, inputs: (by_hand(inputs[0], form, 0),))
    copy = load(str(tmp_path / "copy"))
    torch.testing.assert_close(logits(copy.model), logits(model), rtol=0, atol=2e-2)
    assert (logits(oracle(form, 0)) - logits(model)).abs().max() > 5e-2, "rounded activations show"


def test_a_copy_is_described(form: str, tiny_folder: Path, tmp_path: Path) -> None:
    teacher = load(str(tiny_folder))
    note = quantise(str(tiny_folder), tmp_path / "copy", form)
    copy = load(str(tmp_path / "copy"))
    assert note["teacher_fingerprint"] == teacher.identity != copy.identity
    assert (copy.parameters, copy.dtype, copy.device) == (teacher.parameters, teacher.dtype, "cpu")
    package = "torchao" if form.startswith("torchao-") else "compressed-tensors"
    assert copy.note.startswith(note["note"]) and package in copy.note and "bits a weight" in copy.note
    assert list(copy.quantisation.versions) == [package] if copy.quantisation else False
    assert json.loads(copy.parts["quantisation"])["kernel"] in copy.note
    assert {name for name in copy.parts if copy.parts[name] != teacher.parts[name]} == {"weights", "quantisation"}
    assert load(str(tmp_path / "copy")).identity == copy.identity
    used = describe(copy.model, copy.tokenizer, "used")
    assert used.parts == copy.parts, "a live model is the one that was loaded"
    first = next(name for name, tensor in copy.model.state_dict().items() if name.endswith("q_proj.weight"))
    with torch.no_grad():
        weight = copy.model.get_parameter(first)
        (weight.qdata if package == "torchao" else weight)[0, 0] += 1
    assert describe(copy.model, copy.tokenizer, "changed").parts["weights"] != copy.parts["weights"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_head_stays_plain_and_runs_in_float32(form: str, dtype: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_qwen3(len(tokenizer)).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    quantise(str(tmp_path / "tied"), tmp_path / "copy", form, dtype=dtype)
    copy = load(str(tmp_path / "copy"))
    assert copy.model.lm_head.weight is copy.model.model.embed_tokens.weight
    assert copy.parameters == load(str(tmp_path / "tied")).parameters
    engine = HFEngine(copy.model, copy.tokenizer)
    request = Request(prompt=(5, 6, 7), continuations=((8,), (9, 10)))
    [(_, reply)] = engine.answer([request])
    assert engine.head_dtype == "float32"
    with torch.no_grad():
        hidden = copy.model.model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
        scores = (copy.model.lm_head.weight.float() @ hidden.float()).log_softmax(-1)
    assert reply.logprobs[0][0] == pytest.approx(float(scores[8]), abs=1e-5)


def test_a_quantised_head_keeps_its_own_arithmetic(torchao: None, tiny_folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    loaded = load(str(tiny_folder), dtype="bfloat16")
    quantize_(loaded.model, Int8WeightOnlyConfig())  # every linear layer, the head too
    engine = HFEngine(loaded.model, loaded.tokenizer)
    [(_, reply)] = engine.answer([Request(prompt=(5, 6, 7), continuations=((8,),))])
    assert engine.head_dtype == "as in Linear"
    with torch.no_grad():
        scores = loaded.model(torch.tensor([[5, 6, 7]])).logits[0, -1].float().log_softmax(-1)
    assert reply.logprobs[0][0] == pytest.approx(float(scores[8]), abs=1e-5)


@pytest.mark.parametrize("form", COMPRESSED)
def test_the_same_checkpoint_in_another_kernel_is_another_model(
    form: str, compressed_tensors: None, tiny_folder: Path, tmp_path: Path
) -> None:
    quantise(str(tiny_folder), tmp_path / "copy", form)
    own, other = (load(str(tmp_path / "copy"), dequantise=way) for way in (None, True))
    assert own.quantisation and other.quantisation
    assert own.quantisation.kernel == "unpacked by compressed-tensors on cpu"
    one_way = Version(transformers.__version__) < Version(TWO_WAYS)
    assert other.quantisation.kernel == (own.quantisation.kernel if one_way else "dequantised when loaded")
    assert (own.identity == other.identity) == one_way
    if form not in ACTIVATIONS or one_way:
        torch.testing.assert_close(logits(own.model), logits(other.model), rtol=0, atol=1e-6)
    else:
        assert (logits(own.model) - logits(other.model)).abs().max() > 5e-2, "unpacked, it rounds no activations"


def test_a_hybrids_mixers_stay_plain(form: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    teacher = tiny_teacher("llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64)
    tiny_hybrid(teacher).save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    quantise(str(tmp_path / "hybrid"), tmp_path / "copy", form)
    plain, copy = load(str(tmp_path / "hybrid")), load(str(tmp_path / "copy"))
    assert "weights of its 13 linear layers" in copy.note, "3 MLPs and the attention of one layer, 3 x 3 + 4 x 1"
    for name, weight in plain.model.named_parameters():
        if ".kda." in name:
            assert torch.equal(copy.model.get_parameter(name), weight)


def test_a_run_says_how_its_model_is_quantised(torchao: None, tiny_folder: Path, tmp_path: Path) -> None:
    quantise(str(tiny_folder), tmp_path / "copy", "torchao-int8")
    run = ek.run(str(tmp_path / "copy"), tasks=["quick"], limit=3, max_tokens=4, out=tmp_path / "run")
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "torchao (Int8WeightOnly)" in told["model"]["note"] and "torchao Int8Tensor on cpu" in told["model"]["note"]
    assert told["versions"]["torchao"] and run.manifest.model.parameters == load(str(tiny_folder)).parameters
    with pytest.raises(ValueError, match="could not be loaded: transformers .* can't unpack torchao"):
        ek.run(str(tmp_path / "copy"), tasks=["quick"], limit=3, engine_options={"dequantise": True})
    with pytest.raises(ValueError, match="takes no option 'tensor_parallel_size': it has dequantise alone"):
        ek.run(str(tmp_path / "copy"), tasks=["quick"], limit=3, engine_options={"tensor_parallel_size": 2})
    with pytest.raises(ValueError, match="dequantise is 'no': expected true or false"):
        ek.run(str(tmp_path / "copy"), tasks=["quick"], limit=3, engine_options={"dequantise": "no"})


def test_what_cannot_be_quantised_is_told(
    torchao: None, compressed_tensors: None, tiny_folder: Path, tmp_path: Path
) -> None:
    tiny, out = str(tiny_folder), tmp_path / "copy"
    with pytest.raises(ValueError, match="unknown format 'int3': expected int4, int8"):
        quantise(tiny, out, "int3")
    with pytest.raises(ValueError, match=r"q_proj is 64 wide, which groups of 48 don't divide; give --group-size 32"):
        quantise(tiny, out, "int4", group_size=48)
    with pytest.raises(ValueError, match="w8a8 has one scale a row"):
        quantise(tiny, out, "w8a8", group_size=32)
    tiny_gpt2(400).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"\(GPT2LMHeadModel\) has 0% of its weights in linear layers"):
        quantise(str(tmp_path / "gpt2"), out, "int4")
    with pytest.raises(ValueError, match="is the model's own folder, or holds it"):
        quantise(tiny, tiny_folder, "int8")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds no earlier quantised copy"):
        quantise(tiny, tmp_path, "int8")
    assert not out.exists()
    quantise(tiny, out, "int8")
    quantise(tiny, out, "torchao-int8")  # an earlier copy is replaced
    with pytest.raises(ValueError, match=r"is quantised \(torchao .*: convert what it was made from"):
        make_student(str(out), tmp_path / "student")
    with pytest.raises(ValueError, match=r"is quantised already \(torchao \(Int8WeightOnly\)\)"):
        quantise(str(out), tmp_path / "again", "int4")
    broken = out / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(ValueError, match="could not be loaded: "):
        load(str(out))


@pytest.mark.slow
def test_the_builtin_model_loses_more_with_fewer_bits(
    smollm2: str, torchao: None, compressed_tensors: None, tmp_path: Path
) -> None:
    teacher = load(smollm2)
    ids = teacher.tokenizer(PROSE, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = teacher.model(ids).logits.float().log_softmax(-1)
    nats = {}
    for form in BITS:
        quantise(smollm2, tmp_path / "copy", form)
        copy = load(str(tmp_path / "copy"))
        with torch.no_grad():
            found = copy.model(ids).logits.float().log_softmax(-1)
        nats[form] = float((expected.exp() * (expected - found)).sum(-1).mean())
        assert copy.parameters == teacher.parameters and copy.model.lm_head.weight.dtype == torch.bfloat16
    for eight in ("int8", "w8a8", "fp8", "torchao-int8"):
        for four in ("int4", "torchao-int4"):
            assert 0 <= nats[eight] < 0.1 < 0.3 < nats[four] < 1, nats
    assert nats["int4"] == pytest.approx(nats["torchao-int4"], rel=0.2), "the same values, but for ties"
