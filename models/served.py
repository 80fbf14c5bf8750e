"""What is known here of a model that runs elsewhere: its tokenizer, its end tokens and its window."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import models.hybrid  # noqa: F401  # tells transformers of hybrids, so that their configurations load
from models.load import resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    tokenizer: Any
    generation_config: Any
    """With the tokens that end a reply; None where there is neither this file nor a config.json."""
    window: int | None
    """Tokens, as config.json says; None: it does not."""


def load_served(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Served:
    """The tokenizer of ``name`` (a hub id, a folder, a built-in name) and what stands beside it; no weights."""
    how: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    source = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **how)
    except Exception as error:  # transformers and tokenizers raise types of their own
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error
    config = _or_none(AutoConfig, source, how)
    generation = _or_none(GenerationConfig, source, {"revision": revision})
    if generation is None and config is not None:
        generation = GenerationConfig.from_model_config(config)
    text = None if config is None else config.get_text_config()
    window = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return Served(tokenizer=tokenizer, generation_config=generation, window=window)


def _or_none(kind: Any, source: str, how: dict[str, Any]) -> Any:
    try:
        return kind.from_pretrained(source, **how)
    except (OSError, ValueError):  # a folder with a tokenizer alone is enough
        return None
