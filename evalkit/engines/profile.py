"""Where an engine's time and tokens went."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Profile:
    """Counts since the engine was made. Phases: prefill (prompts), choices (continuations), decode (replies)."""

    layout: str = ""
    """"tree", "rows" or "plain" (``evalkit.engines.hf``)."""
    why: str = ""
    """Why it is not "tree"."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: Counter[str] = field(default_factory=Counter)
    """Run, padding left out."""
    passes: Counter[str] = field(default_factory=Counter)
    largest: Counter[str] = field(default_factory=Counter)
    """Most rows of a pass (of "prefill": prompts)."""
    asked: Counter[str] = field(default_factory=Counter)
    """Tokens of all requests, had each choice and each reply been run by itself."""
    requests: int = 0
    prompts: int = 0
    """Different prompts among the requests of one call."""
    halvings: int = 0
    """Batches halved because memory ran out."""
    graphs: bool = False
    """Decoding ran from CUDA graphs."""
    ties: int = 0
    """Requests whose best two choices, and tokens of replies whose best two, are nearer than rounding may move them."""

    @property
    def cached(self) -> int:
        """Tokens asked of prompts and choices that were not run: a cache had them."""
        return max(0, self.asked.total() - self.tokens["prefill"] - self.tokens["choices"])

    @contextmanager
    def phase(self, name: str, rows: int, **tokens: int) -> Iterator[None]:
        """A pass of ``rows`` rows; its time is shared by phases as its ``tokens`` are."""
        tokens = tokens or {name: rows}
        begin = time.perf_counter()
        yield
        spent, total = time.perf_counter() - begin, max(1, sum(tokens.values()))
        for phase, number in tokens.items():
            self.seconds[phase] += spent * number / total
            self.tokens[phase] += number
        self.passes[name] += 1
        self.largest[name] = max(self.largest[name], rows)

    def row(self) -> dict[str, Any]:
        """For run.json."""
        phases = [name for name in ("prefill", "choices", "decode") if name in self.tokens]
        return {
            "layout": self.layout,
            "why": self.why,
            "requests": self.requests,
            "prompts": self.prompts,
            "tokens_asked": dict(self.asked),
            "tokens_cached": self.cached,
            "phases": {name: {"seconds": round(self.seconds[name], 3), "tokens": self.tokens[name]} for name in phases},
            "passes": dict(self.passes),
            "largest_batch": dict(self.largest),
            "out_of_memory_halvings": self.halvings,
            "cuda_graphs": self.graphs,
            "ties": self.ties,
        }
