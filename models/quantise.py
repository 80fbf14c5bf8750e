"""A quantised copy of a model, to compare with it: weights rounded to nearest, no calibration data, on a CPU.

Every linear layer is rounded but the output head and a hybrid's KDA mixers, which vLLM reads plain. A weight becomes
``scale * q``, with q an integer of 4 or 8 bits (fp8: a float of 8 bits, E4M3) and one scale for each row, or for each
``group_size`` weights of a row.
"""

import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from models.folders import would_destroy, written_whole
from models.kda.layer import KimiDeltaAttention
from models.load import NOTE_FILE, load, read_note, resolve
from models.quantised import need

BITS = {"int4": 4, "int8": 8, "w8a8": 8, "fp8": 8, "torchao-int4": 4, "torchao-int8": 8}
"""The formats. int4, int8, w8a8 and fp8 are compressed-tensors', which vLLM reads."""
SCHEMES = {"int4": "W4A16", "int8": "W8A16", "w8a8": "W8A8", "fp8": "FP8_DYNAMIC"}
ACTIVATIONS = ("w8a8", "fp8")
"""Formats in which activations are rounded to 8 bits, too, each token by itself."""
GROUP_SIZES = (128, 64, 32)
"""Of 4-bit formats, unless one is given: the first that divides every layer. 8-bit ones have a scale for each row."""


def quantise(
    name: str,
    out: Path,
    form: str,
    *,
    group_size: int | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the copy of ``name`` in the format ``form`` to the folder ``out``; returns what its evalkit.json says.

    group_size: weights of a row that share a scale; 0: the whole row. None: at 4 bits the first of ``GROUP_SIZES``
    that fits, else 0.
    ValueError: the format is unknown or its package missing, most weights are not in linear layers, a layer's width is
    no multiple of the group, or ``out`` holds something else than an earlier copy.
    """
    if form not in BITS:
        raise ValueError(f"unknown format {form!r}: expected {', '.join(BITS)}")
    torchao = form.startswith("torchao-")
    if form in ACTIVATIONS and group_size:
        raise ValueError(f"group size {group_size} was given, but {form} has one scale a row")
    if would_destroy(out, resolve(name)):
        raise ValueError(f"{out} is the model's own folder, or holds it: give another --out")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not _is_copy(out)):
        raise ValueError(f"{out} exists and holds no earlier quantised copy: give another --out, or remove it")
    need("torchao" if torchao else "compressed-tensors")
    teacher = load(name, dtype=dtype, device="cpu", revision=revision, trust_remote_code=trust_remote_code)
    if teacher.quantisation:
        raise ValueError(f"model {name!r} is quantised already ({teacher.quantisation.title})")
    _need_linear(name, teacher.model)
    layers = _layers(teacher.model)
    group = _group(layers, group_size, BITS[form])
    how = f"rounded to nearest in {form}, one scale for {f'{group} weights' if group else 'a row'}"
    note = {
        "note": f"{teacher.name} with the weights of its {len(layers)} linear layers {how}",
        "teacher_fingerprint": teacher.identity,
        "axes": {"compression": "quantisation", "format": form, "group_size": group},
    }
    model, tokenizer = teacher.model, teacher.tokenizer
    del teacher
    with written_whole(out) as folder:
        if torchao:
            kept = [name for name in _linear(model) if name not in layers]
            with tempfile.TemporaryDirectory(dir=out.parent) as plain:
                load_how = {"dtype": model.dtype, "trust_remote_code": trust_remote_code}
                model.save_pretrained(plain)
                del model  # it is loaded again from there
                _round_torchao(plain, folder, form, group, kept, load_how)
        else:
            _save_compressed(model, folder, form, group, layers)
        tokenizer.save_pretrained(folder)
        (folder / NOTE_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return note


def _is_copy(folder: Path) -> bool:
    axes = (read_note(str(folder)) or {}).get("axes")
    return isinstance(axes, dict) and axes.get("compression") == "quantisation"


def _linear(model: Any) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def _need_linear(name: str, model: Any) -> None:
    """ValueError where a copy would leave most weights as they are: GPT-2's Conv1D layers, experts in one tensor."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    apart = {id(module.weight) for module in (head, embeddings) if module is not None}
    every = sum(one.numel() for one in model.parameters() if id(one) not in apart)
    linear = sum(one.weight.numel() for one in _linear(model).values() if id(one.weight) not in apart)
    if 2 * linear < every:
        raise ValueError(
            f"model {name!r} ({type(model).__name__}) has {linear / every:.0%} of its weights in linear layers "
            f"(torch.nn.Linear), which alone are rounded here; quantise it with a tool made for its architecture"
        )


def _layers(model: Any) -> dict[str, int]:
    """Name and width of every layer that is rounded."""
    head = model.get_output_embeddings()
    mixers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, KimiDeltaAttention))
    return {
        name: module.in_features
        for name, module in _linear(model).items()
        if module is not head and not name.startswith(mixers)
    }


def _group(layers: dict[str, int], asked: int | None, bits: int) -> int:
    """Weights that share a scale, 0 for a row; ValueError where they don't divide a layer."""
    fit = [size for size in GROUP_SIZES if all(width % size == 0 for width in layers.values())]
    if asked is None:
        return fit[0] if fit and bits == 4 else 0
    for name, width in layers.items():
        if asked and width % asked:
            raise ValueError(
                f"{name} is {width} wide, which groups of {asked} don't divide; give --group-size {(fit or [0])[0]}"
            )
    return asked


def _round_torchao(plain: str, folder: Path, form: str, group: int, kept: list[str], how: dict[str, Any]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup, PerRow
    from transformers import TorchAoConfig

    if form == "torchao-int8":
        config = Int8WeightOnlyConfig(granularity=PerGroup(group) if group else PerRow())
    else:  # torchao packs 4 bits on a GPU only; here they are kept as 8, and computed with as 4
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group) if group else PerAxis(0))
    packing = TorchAoConfig(config, modules_to_not_convert=kept)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=packing, **how).save_pretrained(folder)


def _save_compressed(model: Any, folder: Path, form: str, group: int, layers: Collection[str]) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme(SCHEMES[form], ["Linear"])
    if form not in ACTIVATIONS:
        scheme.weights = scheme.weights.model_copy(
            update={"group_size": group or None, "strategy": "group" if group else "channel"}
        )
    ignore = [name for name in _linear(model) if name not in layers]
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            rows = module.weight.detach().unflatten(-1, (-1, group or module.weight.shape[-1]))
            scale, _ = calculate_qparams(rows.amin(-1), rows.amax(-1), module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
