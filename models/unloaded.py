"""What a packed checkpoint is, told from its files: for engines that load it with kernels of their own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from models.fingerprint import fingerprint
from models.load import DTYPES, Loaded, read_note, resolve
from models.quantised import packed_as, stored


def describe_packed(name: str, kernel: str, dtype: str = "auto", **options: Any) -> Loaded | None:
    """The quantised checkpoint ``name`` as ``load`` would tell of it, run by ``kernel``; None: it is not quantised.

    Its ``model`` has no weights (device "meta"). options: revision, trust_remote_code. ValueError: a GGUF file, or a
    folder without safetensors.
    """
    source = resolve(name)
    if source.endswith(".gguf"):
        raise ValueError(f"{name} is a GGUF file, which can't be {kernel} here; use --engine hf")
    known = stored(source, options, here=False)
    if known is None:
        return None
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, revision=options.get("revision"), allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"model {name!r} ({known.title}) has no safetensors in {folder}; save it in that format")
    config = AutoConfig.from_pretrained(source, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=bool(options.get("trust_remote_code")))
    model.to(DTYPES.get(dtype, config.dtype or torch.bfloat16))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    how = packed_as(known, kernel, sum(p.numel() for p in model.parameters()))
    parts, identity = fingerprint(model, tokenizer, how, weights=_tensors(files))
    seen: dict[str, Any] = {"parts": parts, "identity": identity, "quantisation": how}
    return Loaded(name=name, model=model, tokenizer=tokenizer, checkpoint=read_note(source), **seen)


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor, in the order of their names, one in memory at a time."""
    places: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            places |= {name: file for name in opened.keys()}  # noqa: SIM118  (no dictionary)
    for name in sorted(places):
        with safe_open(places[name], framework="pt") as opened:
            yield name, opened.get_tensor(name)
