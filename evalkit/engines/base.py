"""What every engine is: one method, ``answer``."""

import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Protocol

from evalkit import __version__
from evalkit.encoding import Tokenizer
from evalkit.records import Reply, Request


class Engine(Protocol):
    """Answers requests; how it batches, caches or distributes them changes no reply."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_length(self) -> int:
        """The model's window (tokens): prompt and answer together."""
        ...

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """(index in ``requests``, reply) of each, in the order in which they finish."""
        ...


def versions() -> dict[str, str]:
    """Of the packages behind every engine; ours by its constant: a checkout that is not installed has no metadata."""
    return {"evalkit": __version__} | {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def cost(request: Request) -> int:
    """Tokens to run at most: what is scored, the prompt, and the longest reply."""
    tails = sum(len(request.prompt) + len(tail) for tail in request.continuations)
    return tails + len(request.prompt) + (request.generation.max_tokens if request.generation else 0)
