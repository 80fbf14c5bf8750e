"""A name -> a model and its tokenizer: a Hugging Face id, a local folder (a delta checkpoint, too), or a built-in name.

Everyone who loads a model does it here, so a name means the same in every command.
"""

import difflib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import models.hybrid  # noqa: F401  # tells transformers of hybrids, so that their folders load
from models.builtin import BUILTIN
from models.fingerprint import fingerprint

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

    @property
    def dtype(self) -> str:
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(next(self.model.parameters()).device)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    teacher: str | None = None,
) -> Loaded:
    """Load ``name``; ``dtype`` "auto" is the checkpoint's own. ValueError says what is missing and what to do.

    teacher: of a delta checkpoint, where its teacher is now; by default where it was when the delta was saved.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    where = pick_device(device)
    source = resolve(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if is_delta(source):
        from models.delta import load_delta  # it loads its teacher with this function

        return load_delta(source, teacher=teacher, name=name, dtype=dtype, device=where, **options)
    if teacher is not None:
        raise ValueError(f"teacher {teacher!r} was given, but {name} is no delta checkpoint: it has no {DELTA_FILE}")
    note = read_note(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES.get(dtype, "auto"), output_loading_info=True, **options
        )
        model = model.to(where).eval()
    except Exception as error:  # transformers, safetensors, tokenizers and CUDA each raise types of their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"model {name!r} could not be loaded: {reason}") from error
    check_whole(name, model, info)
    return describe(model, tokenizer, name, note)


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


def describe(model: Any, tokenizer: Any, name: str, checkpoint: dict[str, Any] | None = None) -> Loaded:
    """A live model with its tokenizer, as ``load`` would give it."""
    parts, identity = fingerprint(model, tokenizer)
    return Loaded(name=name, model=model, tokenizer=tokenizer, parts=parts, identity=identity, checkpoint=checkpoint)


def resolve(name: str) -> str:
    """The folder or hub id that ``name`` stands for."""
    if name in BUILTIN:
        return str(BUILTIN[name]())
    path = Path(name).expanduser()
    if path.is_dir():
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
        or name.count("/") > 1
        or os.sep + os.sep in name
    ):
        raise ValueError(f"there is no model folder {name}{guess}")
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
