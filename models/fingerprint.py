"""Which model is this: hashes that stay the same across machines, file formats and loading dtypes."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from models.quantised import Quantisation, tensors


def fingerprint(
    model: Any,
    tokenizer: Any,
    quantisation: Quantisation | None = None,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> tuple[dict[str, str], str]:
    """(hash of each part, hash of all). Parts: weights, config, tokenizer, end_tokens, chat_template, quantisation.

    weights: (name, tensor) of each, in order, where they are not in ``model``.
    """
    parts = {
        "weights": _weights(_tensors(model) if weights is None else weights),
        "config": _config(model),
        "tokenizer": _tokenizer(tokenizer),
        "end_tokens": _ends(model, tokenizer),
        "chat_template": _short(str(getattr(tokenizer, "chat_template", None) or "").encode()),
        "quantisation": _quantisation(quantisation),
    }
    return parts, _identity(parts)


def changed(parts: dict[str, str], how: dict[str, Any]) -> tuple[dict[str, str], str]:
    """As ``fingerprint``, of the same model when what loads it quantises or alters it, in the way ``how`` says."""
    parts = {**parts, "quantisation": f"{parts['quantisation']}, then {json.dumps(how, sort_keys=True, default=str)}"}
    return parts, _identity(parts)


def _identity(parts: dict[str, str]) -> str:
    return _short(json.dumps(parts, sort_keys=True).encode())


def fingerprint_served(tokenizer: Any, generation: Any, weights: str) -> tuple[dict[str, str], str]:
    """As ``fingerprint``, of a model whose weights nobody here can read. ``weights``: what is known of them."""
    parts = {
        "weights": weights,
        "tokenizer": "the server's own" if tokenizer is None else _tokenizer(tokenizer),
        "end_tokens": "the server's own" if tokenizer is None else _ends(generation, tokenizer),
        "chat_template": _short(str(getattr(tokenizer, "chat_template", None) or "").encode()),
    }
    return parts, _short(json.dumps(parts, sort_keys=True).encode())


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            yield from tensors(name, tensor)


def _weights(parts: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Values as float32, so that a bfloat16 checkpoint is the same model loaded in either dtype."""
    total = hashlib.sha256()
    for name, tensor in parts:
        values = tensor.detach().to("cpu")
        if values.is_floating_point():
            values = values.float()
        total.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        total.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data if values.numel() else b"")
    return total.hexdigest()[:16]


def _tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # How the last caller padded or cut a batch is not the tokenizer's identity.
        state.pop("padding", None)
        state.pop("truncation", None)
        content = json.dumps(state, sort_keys=True)
    else:
        content = json.dumps(sorted(tokenizer.get_vocab().items()))
    return _short(content.encode())


def _config(model: Any) -> str:
    """What the architecture computes (RoPE, norms, window), without what says how or where it was saved."""
    known = model.config.to_dict() if hasattr(model, "config") else {}
    for name in (
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "quantization_config",
        "use_cache",
    ):
        known.pop(name, None)
    return _short(json.dumps(known, sort_keys=True, default=str).encode())


def _ends(model: Any, tokenizer: Any) -> str:
    """The tokens that begin and end texts: with others the same weights give other replies."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return json.dumps([getattr(tokenizer, "bos_token", None), getattr(tokenizer, "eos_token", None), ends])


def _quantisation(quantisation: Quantisation | None) -> str:
    """The format and what computes it: another kernel may give other scores."""
    if quantisation is None:
        return "none"
    known = {"config": quantisation.config, "kernel": quantisation.kernel}
    return json.dumps(known, sort_keys=True, default=str)
