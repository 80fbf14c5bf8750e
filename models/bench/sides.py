"""One model, timed: prefill to the first token, decode steps with its cache, and what the cache holds."""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PretrainedConfig

from models.bench.costs import kda_state_bytes, kv_cache_bytes
from models.bench.timing import Stopwatch, failure, free, summary
from models.hybrid import CACHE
from models.hybrid_config import HybridKDAConfig

BACKENDS = {
    "sdpa": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Of scaled_dot_product_attention; "sdpa" leaves the choice to torch."""
OPERATOR = "aten::_scaled_dot_product_"
SOFTMAX = ("aten::_safe_softmax", "aten::_softmax")
"""The math backend is no operator of its own; nothing else in these models takes a softmax."""


@dataclass(slots=True)
class Side:
    """What was measured of one model at one length."""

    status: str = "ok"
    """"ok", "out of memory", or "failed"."""
    reason: str = ""
    first_prefill_s: float | None = None
    """The first at this length, with compilation. Seconds."""
    ttft_samples_ms: list[float] = field(default_factory=list)
    """One a repetition."""
    decode_samples_ms: list[list[float]] = field(default_factory=list)
    """Every step of every repetition."""
    kv_cache_bytes: int | None = None
    """After the prefill, counted from the cache's tensors; so are the states."""
    kda_state_bytes: int | None = None
    peak_bytes: int | None = None
    """Of a prefill, above what was allocated before it (both models' weights)."""
    attention: list[str] = field(default_factory=list)
    """The operators that torch chose for the attention layers."""

    def fail(self, error: BaseException) -> None:
        self.status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
        self.reason = failure(error)

    def decode_medians(self) -> list[float]:
        """One a repetition."""
        return [statistics.median(steps) for steps in self.decode_samples_ms if steps]

    def row(self) -> dict[str, Any]:
        ok = self.status == "ok"
        steps = [step for repetition in self.decode_samples_ms for step in repetition]
        return {
            "status": self.status,
            "reason": self.reason,
            "ttft_ms": summary(self.ttft_samples_ms) if ok else None,
            "decode_ms": summary(steps) if ok else None,
            "first_prefill_s": self.first_prefill_s,
            "kv_cache_bytes": self.kv_cache_bytes,
            "kda_state_bytes": self.kda_state_bytes,
            "peak_bytes": self.peak_bytes,
            "attention": self.attention,
            "ttft_samples_ms": self.ttft_samples_ms,
            "decode_samples_ms": self.decode_samples_ms,
        }


class _Operators(TorchDispatchMode):  # type: ignore[misc]
    """Notes the names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


class Runner:
    """Runs one model as `generate` does, greedily: logits of the last position alone, cache kept."""

    def __init__(self, model: Any, watch: Stopwatch, attention: str) -> None:
        self.model, self.watch, self.attention = model, watch, attention

    def warm(self, side: Side, prompt: Tensor, steps: int) -> None:
        """A first prefill and a few steps, then a second prefill: what is counted rather than timed is read here."""
        prompt, cache = prompt.to(self.watch.device), self._cache()
        side.first_prefill_s = self.watch.wall(partial(self._next, prompt, cache))
        side.kv_cache_bytes, side.kda_state_bytes = cache_bytes(cache)
        token = prompt[:, -1:]
        for _ in range(min(steps, 3)):
            token = self._next(token, cache)
        del cache
        free()
        with _Operators() as called:
            side.peak_bytes = self.watch.peak_bytes(partial(self.prefill, prompt))
        fused = {name.removeprefix(OPERATOR) for name in called.names if name.startswith(OPERATOR)}
        side.attention = sorted(fused | ({"math"} if called.names.intersection(SOFTMAX) else set()))

    def sample(self, side: Side, prompt: Tensor, steps: int) -> None:
        """One time to first token, and the decode steps after it."""
        cache, tokens, times = self._cache(), [prompt.to(self.watch.device)], list[float]()

        def step() -> None:
            tokens[0] = self._next(tokens[0], cache)

        ttft = 1e3 * self.watch.wall(step)
        for _ in range(steps):
            times.append(1e3 * self.watch.wall(step))
        side.ttft_samples_ms.append(ttft)
        side.decode_samples_ms.append(times)

    def prefill(self, prompt: Tensor) -> None:
        self._next(prompt, self._cache())

    def _cache(self) -> Any:
        return DynamicCache(config=self.model.config)

    def _next(self, tokens: Tensor, cache: Any) -> Tensor:
        """The most likely next token [B, 1]."""
        with torch.no_grad(), self._kernel():
            logits = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
            assert logits.shape[1] == 1, "all positions' logits were made"
            token: Tensor = logits[:, -1].argmax(-1, keepdim=True)
            return token

    def _kernel(self) -> AbstractContextManager[Any]:
        backend = BACKENDS[self.attention]
        return nullcontext() if backend is None else sdpa_kernel(backend)


def cache_bytes(cache: Any) -> tuple[int, int]:
    """(keys and values, KDA states with the convolutions' inputs) of transformers' DynamicCache, from its tensors."""
    attention = linear = 0
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            held = [*layer.recurrent_states.values(), *layer.conv_states.values()]
            linear += sum(x.nbytes for x in held if x is not None)
        else:
            attention += sum(x.nbytes for x in (layer.keys, layer.values) if x is not None)
    return attention, linear


def expected_bytes(config: PretrainedConfig, batch: int, tokens: int, itemsize: int) -> tuple[int, int]:
    """What `cache_bytes` should find after ``tokens`` tokens, by formula."""
    linear = len(config.kda_layers) if isinstance(config, HybridKDAConfig) else 0
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = kv_cache_bytes(
        layers=config.num_hidden_layers - linear,
        batch=batch,
        tokens=tokens,
        kv_heads=config.num_key_value_heads,
        head_dim=width,
        itemsize=itemsize,
    )
    if not linear:
        return attention, 0
    states = kda_state_bytes(
        layers=linear,
        batch=batch,
        heads=config.kda_heads,
        kv_heads=config.kda_kv_heads,
        head_dim=config.kda_head_dim,
        taps=config.kda_conv_size - 1,
        itemsize=itemsize,
    )
    return attention, states


def tolerant(side: Side, work: Callable[[], None]) -> None:
    """Do ``work``; what stops it is said in ``side``."""
    try:
        work()
    except Exception as error:  # kernels, the allocator and the driver each raise types of their own
        side.fail(error)
