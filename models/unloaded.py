"""What a packed checkpoint is, told from its files: for engines that load it with kernels of their own."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from models.fingerprint import fingerprint
from models.load import DTYPES, Loaded, check_dtype, check_whole, one_line, read_note, resolve
from models.quantised import SAFETENSORS, packed_as, stored, weight_files, with_size
from models.served import read_generation


def describe_packed(
    name: str, kernel: str, dtype: str = "auto", *, revision: str | None = None, trust_remote_code: bool = False
) -> Loaded | None:
    """The quantised checkpoint ``name`` as ``load`` would tell of it, run by ``kernel``; None: it is not quantised.

    Its ``model`` has no weights (device "meta"). ValueError: a GGUF file, a checkpoint without safetensors, or one that
    lacks weights.
    """
    check_dtype(dtype)
    source = resolve(name)
    if source.endswith(".gguf"):
        raise ValueError(f"{name} is a GGUF file, which can't be {kernel} here; use --engine hf")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with one_line(name):
        known = stored(source, options, here=False)
        if known is None:
            return None
        files = weight_files(source, revision)
        if not files:
            raise ValueError(f"{known.title} without {SAFETENSORS} or its index in {source}; save it in that format")
        model = _without_weights(source, dtype, options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        bits = _bits(files)
        names = _names(model, bits)
        known = with_size(known, source, revision)
    twins = _twins(model)
    check_whole(name, model, {"missing_keys": _missing(model, bits, names, twins)})
    how = packed_as(known, kernel, sum(parameter.numel() for parameter in model.parameters()))
    told = [stored_name for stored_name in bits if names[stored_name] not in twins]
    parts, identity = fingerprint(model, tokenizer, how, weights=_tensors(files, told))
    seen: dict[str, Any] = {"parts": parts, "identity": identity, "quantisation": how}
    return Loaded(name=name, model=model, tokenizer=tokenizer, checkpoint=read_note(source), **seen)


def _without_weights(source: str, dtype: str, options: dict[str, Any]) -> Any:
    config = AutoConfig.from_pretrained(source, **options)
    how: dict[str, Any] = {"trust_remote_code": options["trust_remote_code"]}
    if type(config).__module__.startswith("transformers_modules"):  # code of a repository, at the model's revision
        repository, marked, _ = config.auto_map.get("AutoModelForCausalLM", "").partition("--")
        how["code_revision"] = options["revision"] if not marked or repository == source else None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **how)
    model.to(DTYPES.get(dtype, config.dtype or torch.bfloat16))
    model.generation_config = read_generation(source, options["revision"]) or model.generation_config
    return model


def _bits(files: list[Path]) -> dict[str, int]:
    """Bits of every stored tensor."""
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no dictionary)
                tensor = opened.get_slice(name)
                [width, *_] = re.findall(r"\d+", tensor.get_dtype()) or ["8"]  # BF16, F8_E4M3, BOOL
                found[name] = math.prod(tensor.get_shape()) * int(width)
    return found


def _names(model: Any, stored_names: Iterable[str]) -> dict[str, str]:
    """Stored name -> the one in ``model``, which transformers may have renamed since."""
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    there = model.state_dict()
    how = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": there}
    return {
        name: name if name in there else rename_source_key(name, renamings, converters, **how)[0]
        for name in stored_names
    }


def _twins(model: Any) -> dict[str, str]:
    """Parameter (a tied head) -> the earlier one that it is."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            found[name] = known
    return found


def _missing(model: Any, bits: dict[str, int], names: dict[str, str], twins: dict[str, str]) -> list[str]:
    """Parameters of ``model`` that are stored neither by their name nor packed. Packed, a layer's other tensors hold
    more than one bit for each of its weights: its scales alone do not."""
    there = {twins.get(name, name) for name in names.values()}
    plain = dict(model.named_parameters())
    absent: dict[str, list[str]] = defaultdict(list)
    for name in plain:
        if name not in there:
            absent[name.rpartition(".")[0]].append(name)
    held: dict[str, int] = defaultdict(int)
    for stored_name, name in names.items():
        if twins.get(name, name) not in plain:
            parts = name.split(".")
            for end in range(1, len(parts)):
                held[".".join(parts[:end])] += bits[stored_name]
    return [
        name
        for layer, lacking in absent.items()
        for name in lacking
        if held[layer] <= sum(plain[one].numel() for one in lacking)
    ]


def _tensors(files: list[Path], names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each of ``names``, in their order, one in memory at a time."""
    with ExitStack() as stack:
        places: dict[str, Any] = {}
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            places |= dict.fromkeys(opened.keys(), opened)
        for name in sorted(names):
            yield name, places[name].get_tensor(name)
