"""Time on a device: events on a CUDA GPU, the host's clock on a CPU; contenders interleaved in one run."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Inputs = TypeVar("Inputs")

FLUSH_BYTES = 256 * 2**20
"""Written before each timed call: several times the L2 cache of any GPU there is (60 MB on an H200)."""
WARMUP = 3
CYCLES_PER_SECOND = 2e9
"""Above any GPU's clock, so that a wait given in cycles is never shorter than asked for."""
LONGEST_WAIT_S = 0.05


class Stopwatch:
    """Times one call at a time on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._flush: Tensor | None = None

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def wall(self, call: Callable[[], object]) -> float:
        """Seconds on the host's clock from the call until the device is done."""
        self.sync()
        begin = time.perf_counter()
        call()
        self.sync()
        return time.perf_counter() - begin

    def host(self, call: Callable[[], object]) -> float:
        """Seconds until the call returns, the device's work still queued: launches, checks, Python."""
        self.sync()
        begin = time.perf_counter()
        call()
        spent = time.perf_counter() - begin
        self.sync()
        return spent

    def device_ms(self, call: Callable[[], object], host_s: float = 0.0) -> float:
        """Milliseconds of the call on the device. On a GPU: between two events, with a cold L2, after a wait that
        outlasts ``host_s``, so that the call is wholly queued before it starts and the host's time is not counted."""
        if not self.cuda:
            return self.wall(call) * 1e3
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(int(min(1.5 * host_s, LONGEST_WAIT_S) * CYCLES_PER_SECOND))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Memory that the call took on top of what was allocated before it, its results included; None on a CPU,
        where the call is made all the same."""
        if not self.cuda:
            call()
            return None
        self.sync()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.sync()
        return int(torch.cuda.max_memory_allocated(self.device) - before)


@dataclass(slots=True)
class Timed:
    """One contender's measurement."""

    first_call_s: float | None = None
    """The first call at this size: compilation, tuning and one run. Seconds."""
    host_ms: float | None = None
    """Until the call returns while the device works on; the shortest of the warm-up's."""
    peak_bytes: int | None = None
    samples_ms: list[float] = field(default_factory=list)
    """One a repetition; the same place in two contenders' lists is the same inputs."""
    status: str = "ok"
    """"ok", "out of memory", or "failed"."""
    reason: str = ""

    def fail(self, error: BaseException) -> None:
        self.status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
        self.reason = failure(error)

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"status": self.status, "reason": self.reason, "first_call_s": self.first_call_s}
        row |= {"host_ms": self.host_ms, "peak_bytes": self.peak_bytes, "samples_ms": self.samples_ms}
        return row | {"ms": summary(self.samples_ms if self.status == "ok" else [])}


def race(
    runs: Mapping[str, Callable[[Inputs], object]],
    fresh: Callable[[], Inputs],
    watch: Stopwatch,
    repeats: int,
    seen: Callable[[str], None] = lambda step: None,
) -> dict[str, Timed]:
    """Time every one of ``runs`` on the same fresh inputs, in turn (A B, B A, ...), ``repeats`` times.

    A contender that runs out of memory, or fails, says so in its own entry; the others go on. ``seen`` is told each
    step before it begins.
    """
    timed = {name: Timed() for name in runs}
    inputs = _Held(fresh)
    for name, run in runs.items():
        seen(f"{name}, first call")
        _tolerant(timed[name], partial(_first, run, inputs.new, watch, timed[name]))
    for repetition in range(repeats):
        alive = [name for name in runs if timed[name].status == "ok"]
        if not alive:
            break
        turn = repetition % len(alive)
        seen(f"repetition {repetition + 1} of {repeats}")
        try:
            now = inputs.new()
        except Exception as error:  # no memory, or a kernel before has left the device unusable
            for name in alive:
                timed[name].fail(error)
            break
        for name in alive[turn:] + alive[:turn]:
            _tolerant(timed[name], partial(_sample, runs[name], now, watch, timed[name]))
        del now
    return timed


class _Held(Generic[Inputs]):
    """The inputs of one repetition, freed before the next are made: two sets need not fit."""

    def __init__(self, fresh: Callable[[], Inputs]) -> None:
        self._fresh = fresh
        self._now: list[Inputs] = []

    def new(self) -> Inputs:
        self._now.clear()
        self._now.append(self._fresh())
        return self._now[0]


def _first(run: Callable[[Inputs], object], fresh: Callable[[], Inputs], watch: Stopwatch, timed: Timed) -> None:
    inputs = fresh()
    timed.first_call_s = watch.wall(lambda: run(inputs))
    timed.host_ms = 1e3 * min(watch.host(lambda: run(inputs)) for _ in range(WARMUP))
    timed.peak_bytes = watch.peak_bytes(lambda: run(inputs))


def _sample(run: Callable[[Inputs], object], inputs: Inputs, watch: Stopwatch, timed: Timed) -> None:
    timed.samples_ms.append(watch.device_ms(lambda: run(inputs), (timed.host_ms or 0.0) / 1e3))


def _tolerant(timed: Timed, work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:  # a kernel's compiler, the allocator and the driver each raise types of their own
        timed.fail(error)
    if timed.status != "ok":
        free()


def failure(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def free() -> None:
    """Give a GPU's memory that nothing holds any more back to it."""
    if torch.cuda.is_available():
        gc.collect()
        with contextlib.suppress(RuntimeError):  # after an illegal address every call raises; its cause is told already
            torch.cuda.empty_cache()


def summary(samples: Sequence[float]) -> dict[str, float] | None:
    """Median, the quartiles around it, and the extremes; None without samples."""
    if not samples:
        return None
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if samples[1:] else [samples[0]] * 3
    return {"median": middle, "p25": low, "p75": high, "min": min(samples), "max": max(samples)}


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float | None:
    """Median over repetitions of above / below, each pair on the same inputs; None without samples of both."""
    if not above or len(above) != len(below):
        return None
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def ceilings(watch: Stopwatch, dtype: torch.dtype) -> dict[str, Any]:
    """What this device does at best, measured now: bytes/s of a large copy (read and written both counted) and FLOP/s
    of a large matrix product on random data in ``dtype``."""
    size, side, repeats = (2**30, 8192, 10) if watch.cuda else (2**26, 512, 5)
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=watch.device)
    target = torch.empty_like(source)
    copies = _repeated(watch, lambda: target.copy_(source), repeats)
    a, b = (torch.randn(side, side, device=watch.device).to(dtype) for _ in range(2))
    products = _repeated(watch, lambda: a @ b, repeats)
    return {
        "copy_bytes_per_s": 2 * size / (statistics.median(copies) / 1e3),
        "matmul_flop_per_s": 2 * side**3 / (statistics.median(products) / 1e3),
        "matmul_side": side,
        "copy_bytes": size,
        "dtype": str(dtype).removeprefix("torch."),
        "copy_samples_ms": copies,
        "matmul_samples_ms": products,
    }


def _repeated(watch: Stopwatch, call: Callable[[], object], repeats: int) -> list[float]:
    for _ in range(WARMUP):
        call()
    return [watch.device_ms(call) for _ in range(repeats)]
