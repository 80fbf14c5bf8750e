"""A quantised copy of a model, to compare with it: weights rounded to nearest, no calibration data, on a CPU.

Every linear layer but the output head is rounded: a weight becomes ``scale * q``, with q an integer of 4 or 8 bits and
one scale for each row, or for each ``group_size`` weights of a row.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from models.folders import would_destroy, written_whole
from models.load import NOTE_FILE, Loaded, load, resolve
from models.quantised import need

BITS = {"int4": 4, "int8": 8, "w8a8": 8, "torchao-int4": 4, "torchao-int8": 8}
"""The formats. int4, int8 and w8a8 (activations rounded to 8 bits, too) are compressed-tensors', which vLLM reads."""
GROUP_SIZE = 128
"""Of 4-bit formats; 8-bit ones have a scale for each row."""


def quantise(
    name: str, out: Path, form: str, *, group_size: int | None = None, dtype: str = "auto"
) -> dict[str, Any]:
    """Write the copy of ``name`` in the format ``form`` to the folder ``out``; returns what its evalkit.json says.

    group_size: weights of a row that share a scale; 0: the whole row. None: ``GROUP_SIZE`` at 4 bits, else 0.
    ValueError: the format is unknown or its package missing, or a layer's width is no multiple of the group.
    """
    if form not in BITS:
        raise ValueError(f"unknown format {form!r}: expected {', '.join(BITS)}")
    torchao = form.startswith("torchao-")
    group = (GROUP_SIZE if BITS[form] == 4 else 0) if group_size is None else group_size
    if form == "w8a8" and group:
        raise ValueError(f"group size {group} was given, but w8a8 has one scale a row")
    if would_destroy(out, resolve(name)):
        raise ValueError(f"--out {out} would replace the model {name} itself; give another folder")
    need("torchao" if torchao else "compressed-tensors")
    teacher = load(name, dtype=dtype, device="cpu")
    if teacher.quantisation:
        raise ValueError(f"model {name!r} is quantised already ({teacher.quantisation.title})")
    layers = _layers(teacher.model, group)
    grain = f"one scale for {f'{group} weights' if group else 'a row'}"
    note = {
        "note": f"{teacher.name} with the weights of its {layers} linear layers rounded to nearest in {form}, {grain}",
        "teacher_fingerprint": teacher.identity,
        "axes": {"compression": "quantisation", "format": form, "group_size": group},
    }
    with written_whole(out) as folder:
        (_save_torchao if torchao else _save_compressed)(teacher, folder, form, group)
        teacher.tokenizer.save_pretrained(folder)
        (folder / NOTE_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return note


def _layers(model: Any, group: int) -> int:
    """How many layers will be rounded; ValueError for one that the groups don't divide."""
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    for name, layer in layers.items():
        if group and layer.in_features % group:
            fit = [size for size in (256, 128, 64, 32, 16) if all(m.in_features % size == 0 for m in layers.values())]
            raise ValueError(
                f"{name} is {layer.in_features} wide, which groups of {group} don't divide; "
                f"give --group-size {fit[0] if fit else 0}"
            )
    return len(layers)


def _save_torchao(teacher: Loaded, folder: Path, form: str, group: int) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup, PerRow
    from transformers import TorchAoConfig

    if form == "torchao-int8":
        config = Int8WeightOnlyConfig(granularity=PerGroup(group) if group else PerRow())
    else:  # torchao packs 4 bits on a GPU only; here they are kept as 8, and computed with as 4
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group) if group else PerAxis(0))
    with tempfile.TemporaryDirectory(dir=folder.parent) as plain:
        teacher.model.save_pretrained(plain)
        model = AutoModelForCausalLM.from_pretrained(
            plain, dtype=teacher.model.dtype, quantization_config=TorchAoConfig(config)
        )
        model.save_pretrained(folder)


def _save_compressed(teacher: Loaded, folder: Path, form: str, group: int) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model = teacher.model
    head = model.get_output_embeddings()
    scheme = preset_name_to_scheme({"int4": "W4A16", "int8": "W8A16", "w8a8": "W8A8"}[form], ["Linear"])
    if form != "w8a8":
        scheme.weights = scheme.weights.model_copy(
            update={"group_size": group or None, "strategy": "group" if group else "channel"}
        )
    ignore = [name for name, module in model.named_modules() if module is head]
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
