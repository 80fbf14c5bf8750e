"""What is known here of a model that runs elsewhere: its tokenizer, its end tokens and its configuration."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

import models.hybrid  # noqa: F401  # tells transformers of hybrids, so that their configurations load
from models.load import resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    tokenizer: Any
    generation_config: Any
    """With the tokens that end a reply; None where there is neither this file nor a config.json."""
    config: Any
    """None: there is no config.json, or one of an architecture that transformers doesn't know."""


def load_served(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Served:
    """The tokenizer of ``name`` (a hub id, a folder, a built-in name) and what stands beside it; no weights."""
    how: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    source = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **how)
        config = _config(source, how)
        generation = read_generation(source, revision)
    except Exception as error:  # transformers and tokenizers raise types of their own
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error
    if generation is None and config is not None:
        generation = GenerationConfig.from_model_config(config)
    return Served(tokenizer=tokenizer, generation_config=generation, config=config)


def read_generation(source: str, revision: str | None) -> Any:
    """The generation_config.json of a folder or hub id; None: it has none. OSError: it can't be read."""
    if not _has(source, "generation_config.json", revision):
        return None
    return GenerationConfig.from_pretrained(source, revision=revision)


def _config(source: str, how: dict[str, Any]) -> Any:
    if not _has(source, "config.json", how["revision"]):  # a folder with a tokenizer alone is enough
        return None
    try:
        return AutoConfig.from_pretrained(source, **how)
    except ValueError:  # an architecture that is new to transformers: the server knows it
        return None


def _has(source: str, file: str, revision: str | None) -> bool:
    return cached_file(source, file, revision=revision, _raise_exceptions_for_missing_entries=False) is not None
