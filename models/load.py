"""A name -> a model and its tokenizer: a Hugging Face id, a local folder (a delta checkpoint, too), a GGUF file, or a
built-in name.

Everyone who loads a model does it here, so a name means the same in every command.
"""

import difflib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import models.hybrid  # noqa: F401  # tells transformers of hybrids, so that their folders load
from models.builtin import BUILTIN
from models.fingerprint import fingerprint
from models.quantised import (
    UNPACKED,
    Quantisation,
    Stored,
    gguf_in,
    gguf_place,
    quantisation,
    stored,
    tokenizer_beside,
    unpack,
    unpacking,
    with_size,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
DELTA_FILE = "delta.json"
"""In the folder of a delta checkpoint (models/delta.py)."""
NOTE_FILE = "evalkit.json"
"""Beside a model's weights: how the model was made. Its "note" is shown in reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model ready to be scored."""

    name: str
    model: Any
    tokenizer: Any
    parts: dict[str, str] = field(default_factory=dict)
    """Fingerprints of weights, tokenizer, chat template and quantisation; ``identity`` is all of them."""
    identity: str = ""
    checkpoint: dict[str, Any] | None = None
    """What the folder's evalkit.json says, if there is one."""
    quantisation: Quantisation | None = None

    @property
    def dtype(self) -> str:
        dtypes = [parameter.dtype for parameter in self.model.parameters()]
        # Packed weights are integers; what computes with them is not.
        return str(next((one for one in dtypes if one.is_floating_point), dtypes[0])).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(next(self.model.parameters()).device)

    @property
    def parameters(self) -> int:
        if self.quantisation:
            return self.quantisation.parameters
        return sum(p.numel() for p in self.model.parameters())

    @property
    def note(self) -> str:
        """How the model was made and how it is quantised; empty: nothing is known."""
        made = str((self.checkpoint or {}).get("note", ""))
        return "; ".join(filter(None, (made, self.quantisation.note if self.quantisation else "")))


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    teacher: str | None = None,
    dequantise: bool | None = None,
) -> Loaded:
    """Load ``name``; ``dtype`` "auto" is the checkpoint's own, of a GGUF file float32, which holds its values exactly.
    ValueError says what is missing and what to do.

    teacher: of a delta checkpoint, where its teacher is now; by default where it was when the delta was saved.
    dequantise: unpack a quantised model's weights while loading, or keep them packed; None: a GGUF file is unpacked,
    any other format as transformers has it.
    """
    check_dtype(dtype)
    where = pick_device(device)
    source = resolve(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if is_delta(source):
        if dequantise is not None:
            raise ValueError(f"dequantise was given, but {name} is a delta checkpoint: its weights are not quantised")
        from models.delta import load_delta  # it loads its teacher with this function

        return load_delta(source, teacher=teacher, name=name, dtype=dtype, device=where, **options)
    if teacher is not None:
        raise ValueError(f"teacher {teacher!r} was given, but {name} is no delta checkpoint: it has no {DELTA_FILE}")
    note = read_note(source)
    with one_line(name):
        known = stored(source, options)
        how = _how(source, known, dtype, where, dequantise, options)
        tokenizer = AutoTokenizer.from_pretrained(**_tokenizer_place(source), **options)
        model, info = AutoModelForCausalLM.from_pretrained(**how, output_loading_info=True, **options)
        model = (model if "device_map" in how else model.to(where)).eval()
        known = known and with_size(known, source, revision)
    check_whole(name, model, info)
    loaded = describe(model, tokenizer, name, note, known)
    if known and dequantise is False and loaded.quantisation and loaded.quantisation.kernel == UNPACKED:
        raise ValueError(
            f"model {name!r} ({known.title}) was to stay packed, but transformers {transformers.__version__} has no "
            f"kernel for that on {where} (of GGUF it takes them from the package kernels); leave dequantise out"
        )
    return loaded


def check_dtype(dtype: str) -> None:
    """ValueError for a ``dtype`` that ``load`` doesn't know."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """Whatever goes wrong while ``name`` is loaded is a ValueError of one line."""
    try:
        yield
    except Exception as error:  # transformers, safetensors, tokenizers and CUDA each raise types of their own
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        raise ValueError(f"model {name!r} could not be loaded: {reason}") from error


def _how(
    source: str,
    known: Stored | None,
    dtype: str,
    device: str,
    dequantise: bool | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What ``from_pretrained`` needs to load ``source``."""
    how: dict[str, Any] = {"pretrained_model_name_or_path": source, "dtype": DTYPES.get(dtype, "auto")}
    if known is None:
        if dequantise is not None:
            raise ValueError("dequantise was given, but its weights are not quantised")
        return how
    place = gguf_place(source)
    if place:
        how["pretrained_model_name_or_path"], how["gguf_file"] = place
        how["dtype"] = DTYPES.get(dtype, torch.float32)
        # Newer transformers keep the weights packed unless told; older ones know no such option and always unpack.
        packed = getattr(transformers, "GgufConfig", None)
        if packed:
            how["quantization_config"] = packed(dequantize=dequantise is not False)
    elif dequantise:
        how["config"] = unpacking(source, known, options)
    if known.needs_device_map:
        how["device_map"] = {"": device}
    return how


def _tokenizer_place(source: str) -> dict[str, str]:
    """Where ``source``'s tokenizer is: of a GGUF file in the file, unless tokenizer files lie beside it."""
    place = gguf_place(source)
    if place is None:
        return {"pretrained_model_name_or_path": source}
    folder, file = place
    inside = {} if tokenizer_beside(folder) else {"gguf_file": file}
    return {"pretrained_model_name_or_path": folder, **inside}


def check_whole(name: str, model: Any, info: Any) -> None:
    """transformers fills missing weights with random ones and only warns; such a model must not be scored."""
    missing = sorted(map(str, info.get("missing_keys", ()))) + sorted(map(str, info.get("mismatched_keys", ())))
    if missing:
        raise ValueError(
            f"model {name!r} lacks {len(missing)} of its weights ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); download or save it again"
        )
    config = model.config
    encoder = getattr(config, "is_decoder", None) is False and any(
        getattr(module, "is_causal", None) is False for module in model.modules()
    )
    if encoder or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model {name!r} ({type(model).__name__}) is no causal language model")


def describe(
    model: Any,
    tokenizer: Any,
    name: str,
    checkpoint: dict[str, Any] | None = None,
    known: Stored | None = None,
) -> Loaded:
    """A live model with its tokenizer, as ``load`` would give it. known: how its checkpoint is quantised."""
    unpack(model)
    how = quantisation(model, known)
    parts, identity = fingerprint(model, tokenizer, how)
    seen: dict[str, Any] = {"parts": parts, "identity": identity, "checkpoint": checkpoint, "quantisation": how}
    return Loaded(name=name, model=model, tokenizer=tokenizer, **seen)


def resolve(name: str) -> str:
    """The folder, GGUF file or hub id (``org/name``, ``org/name/file.gguf``) that ``name`` stands for."""
    if name in BUILTIN:
        return str(BUILTIN[name]())
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path)
    if path.is_dir():
        packed = gguf_in(path)
        if packed:
            return str(packed)
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} is not a model folder: it has no config.json")
        if not is_delta(path) and not any((path / file).is_file() for file in TOKENIZER_FILES):
            raise ValueError(
                f"model folder {name} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); "
                f"save it there with tokenizer.save_pretrained({name!r})"
            )
        return str(path)
    near = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.6)
    guess = f"; did you mean the built-in {near[0]!r}?" if near else ""
    if (
        path.is_file()
        or path.is_absolute()
        or name.startswith((".", "~"))
        or (name.count("/") > 1) != name.endswith(".gguf")  # org/name, or org/name/file.gguf
        or os.sep + os.sep in name
    ):
        kind = "GGUF file" if name.endswith(".gguf") else "model folder"
        raise ValueError(f"there is no {kind} {name}{guess}")
    if near and "/" not in name:
        raise ValueError(f"there is no model {name!r}{guess}")
    return name


def is_delta(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` holds a delta checkpoint; its tokenizer may be its teacher's."""
    return (Path(folder) / DELTA_FILE).is_file()


def read_note(source: str) -> dict[str, Any] | None:
    file = Path(source) / NOTE_FILE
    if not file.is_file():
        return None
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(note, dict):
        raise ValueError(f"{file} should hold one JSON object, found {type(note).__name__}")
    return note


def pick_device(name: str) -> str:
    """ "auto": a CUDA GPU, else Apple's, else the CPU. ValueError for a device this machine lacks."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in there:
        raise ValueError(f"unknown device {name!r}: expected auto, cpu, cuda, cuda:N or mps")
    if number and (kind == "cpu" or not number.isdigit() or int(number) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} was asked for, but torch finds {torch.cuda.device_count()} CUDA GPUs here")
    if not there[kind]:
        raise ValueError(f"device {name!r} was asked for, but torch finds none here; use --device auto or cpu")
    return name
