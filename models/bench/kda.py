"""`evalkit bench kda`: every implementation of KDA on the same inputs in one run, against the device's floor."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from models.bench.costs import CHUNK, Sizes, Work
from models.bench.inputs import (
    HALF_LIVES,
    LOWER_BOUND,
    Inputs,
    decode,
    forward,
    forward_backward,
    random_inputs,
    rms_ratios,
)
from models.bench.kda_settings import Settings, settled
from models.bench.profile import kernels
from models.bench.provenance import environment
from models.bench.timing import FLUSH_BYTES, WARMUP, Stopwatch, Timed, ceilings, failure, free, paired_ratio, race

SCHEMA = "evalkit.bench-kda/1"
FORWARD, BOTH, DECODE = "forward", "forward+backward", "decode"
RUNS: dict[str, Callable[[Inputs, str, str], object]] = {FORWARD: forward, BOTH: forward_backward, DECODE: decode}
CHECK_TOKENS = 300
"""Of the error against float64: a few chunks and a part of one."""

Report = Callable[[str, int, int], None]
"""(step that begins, steps done, steps in all)"""
Save = Callable[[dict[str, Any]], None]


def bench(settings: Settings, *, report: Report | None = None, save: Save | None = None) -> dict[str, Any]:
    """Measure, and return the result (schema evalkit.bench-kda/1): plain data, times in milliseconds.

    ``save`` gets the result as it grows, after each size, so that what a killed run has measured is not lost.
    Raises ValueError for settings that can't be measured here. An implementation that fails or runs out of memory has
    rows that say so; the others go on.
    """
    settings, device, notes = settled(settings)
    with _compiled_anew(device, settings), _few_configs(settings.fla_configs):
        return _Bench(settings, device, notes, report, save).run()


class _Bench:
    def __init__(
        self, settings: Settings, device: torch.device, notes: list[str], report: Report | None, save: Save | None
    ) -> None:
        self.settings, self.device, self.report, self.save = settings, device, report, save
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        self.watch = Stopwatch(device)
        self.done = 0
        self.called: set[tuple[str, str]] = set()
        self.cells = list(self._cells())
        self._say("the device's ceilings")
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "complete": False,
            "settings": asdict(settings),
            "environment": environment(device),
            "method": _method(settings, device),
            "ceilings": ceilings(self.watch, self.dtype),
            "rows": [],
            "errors": [],
            "kernels": [],
            "notes": notes,
        }
        free()

    def run(self) -> dict[str, Any]:
        for name, gate, sizes in self.cells:
            self._cell(name, gate, sizes)
            self._next()
        for gate in self.settings.gates:
            self._say(f"error against float64, {gate}")
            self.result["errors"] += self._errors(gate)
            self._next()
        self.result["complete"] = True
        self._say("done")
        if self.save:
            self.save(self.result)
        return self.result

    def _say(self, step: str) -> None:
        if self.report:
            self.report(step, self.done, len(self.cells) + len(self.settings.gates))

    def _next(self) -> None:
        self.done += 1
        if self.save:
            self.save(self.result)

    def _cells(self) -> Iterator[tuple[str, str, Sizes]]:
        """(what is timed, gate, sizes): every length of a gate, then its decode step."""
        for gate in self.settings.gates:
            for tokens in self.settings.tokens:
                sizes = self._sizes(self.settings.batch, tokens)
                yield FORWARD, gate, sizes
                if self.settings.backward:
                    yield BOTH, gate, sizes
            if self.settings.decode_batch:
                yield DECODE, gate, self._sizes(self.settings.decode_batch, 1)

    def _sizes(self, batch: int, tokens: int) -> Sizes:
        asked = self.settings
        assert asked.kv_heads is not None
        heads, dim = {"heads": asked.heads, "kv_heads": asked.kv_heads}, asked.head_dim
        return Sizes(batch=batch, tokens=tokens, key_dim=dim, value_dim=dim, itemsize=self.dtype.itemsize, **heads)

    def _cell(self, name: str, gate: str, sizes: Sizes) -> None:
        """Race the implementations at one size; add a row for each, and its kernels where they are wanted."""

        def fresh() -> Inputs:
            return random_inputs(sizes, gate, self.dtype, self.generator, state=name == DECODE, gradient=name == BOTH)

        def seen(step: str) -> None:
            self._say(f"{name} · {gate} · {sizes.batch} x {sizes.tokens} tokens · {step}")

        runs = {impl: partial(_run, RUNS[name], gate, impl) for impl in self.settings.impls}
        timed = race(runs, fresh, self.watch, self.settings.repeats, seen)
        for impl, one in timed.items():
            known = {"pass": name, "gate": gate, "batch": sizes.batch, "tokens": sizes.tokens, "impl": impl}
            self.result["rows"].append(known | self._row(name, impl, sizes, one, timed.get("fla")))
            if one.status == "failed":
                self.result["notes"].append(
                    f"{impl} failed ({name}, {gate}, {sizes.batch} x {sizes.tokens}): {one.reason}"
                )
            if self.settings.profile and one.status == "ok":
                seen(f"{impl}, profile")
                self.result["kernels"].append(known | _profiled(partial(runs[impl], fresh())))
        free()

    def _row(self, name: str, impl: str, sizes: Sizes, timed: Timed, fla: Timed | None) -> dict[str, Any]:
        work = _work(name, sizes)
        limits = self.result["ceilings"]
        floor = work.floor_ms(limits["copy_bytes_per_s"], limits["matmul_flop_per_s"])
        row = timed.row()
        cold = (name, impl) not in self.called
        self.called.add((name, impl))
        median = row["ms"] and row["ms"]["median"]
        return row | {
            "first_in_process": cold,
            "floor": {"bytes": work.bytes, "flops": work.flops} | floor,
            "times_floor": median and median / floor["ms"],
            "times_fla": paired_ratio(timed.samples_ms, fla.samples_ms) if fla and impl != "fla" else None,
        }

    def _errors(self, gate: str) -> list[dict[str, Any]]:
        sizes = self._sizes(1, CHECK_TOKENS)
        try:
            inputs = random_inputs(sizes, gate, self.dtype, self.generator, state=True, gradient=True)
        except Exception as error:  # no memory, or a kernel before has left the device unusable
            self.result["notes"].append(f"no error against float64 ({gate}): {failure(error)}")
            return []
        rows = []
        for impl in self.settings.impls:
            ratios, failures = rms_ratios(inputs, gate, impl, backward=self.settings.backward)
            for part, reason in failures.items():
                self.result["notes"].append(f"{impl} failed (error of {part}, {gate}): {reason}")
            rows.append({"gate": gate, "impl": impl, "tokens": CHECK_TOKENS, "rms": ratios, "failures": failures})
        return rows


def failed(result: dict[str, Any]) -> bool:
    """Whether an implementation broke, beyond running out of memory."""
    return any(row["status"] == "failed" for row in result["rows"]) or any(row["failures"] for row in result["errors"])


def _run(run: Callable[[Inputs, str, str], object], gate: str, impl: str, inputs: Inputs) -> object:
    return run(inputs, gate, impl)


def _work(name: str, sizes: Sizes) -> Work:
    if name == DECODE:
        return sizes.decode()
    return sizes.forward() + sizes.backward() if name == BOTH else sizes.forward()


def _profiled(call: Callable[[], object]) -> dict[str, Any]:
    try:
        return {"kernels": kernels(call), "reason": ""}
    except Exception as error:  # the measurement stands without it
        return {"kernels": [], "reason": failure(error)}


@contextmanager
def _compiled_anew(device: torch.device, settings: Settings) -> Iterator[None]:
    """An empty cache for Triton's compiled kernels, so that a first call's time is a first call's."""
    if device.type != "cuda" or settings.keep_compiled:
        yield
        return
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="evalkit-triton-", ignore_cleanup_errors=True) as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


@contextmanager
def _few_configs(limit: int) -> Iterator[None]:
    """Triton's autotuner (fla's kernels use it, ours don't) tries the first ``limit`` configurations; 0: all."""
    if not limit:
        yield
        return
    from triton.runtime.autotuner import Autotuner

    whole = Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, *args, **kwargs: whole(self, *args, **kwargs)[:limit]
    try:
        yield
    finally:
        Autotuner.prune_configs = whole


def _method(settings: Settings, device: torch.device) -> list[str]:
    """How it was measured, as the report says it."""
    gpu = device.type == "cuda"
    clock = (
        f"Time on the device between two CUDA events. Before each timed call {FLUSH_BYTES >> 20} MiB are written to "
        f"empty the L2 cache, and the device waits until the call is queued, so the host's time is not in it; it is "
        f"given beside it (host: until the call returns)."
        if gpu
        else "Time on the host's clock."
    )
    cache = "Triton's cache of compiled kernels as it was" if settings.keep_compiled else "an empty Triton cache"
    low, high = HALF_LIVES
    return [
        f"{clock} Median of {settings.repeats} repetitions after {WARMUP + 2} warm-up calls; IQR: the "
        f"distance between the quartiles over the median.",
        "Every repetition draws new random inputs and times all implementations on them in turn, the first one "
        "changing; a ratio to fla is the median over these pairs.",
        f"Inputs: standard normal q, k, v, gate input and beta; dt_bias spreads half-lives over {low:g} to {high:g} "
        f"tokens; bounded gate with lower bound {LOWER_BOUND:g}; seed {settings.seed}. Gate, sigmoid and L2 norm are "
        f"part of what is timed. forward: without autograd. forward+backward: gradients of all seven arguments.",
        "decode: one token of each sequence, float32 state updated in place.",
        *(
            [f"fla's autotuner tried at most {settings.fla_configs} configurations a kernel: its best may be faster."]
            if settings.fla_configs and "fla" in settings.impls
            else []
        ),
        f"First call: the first at that size, with compilation and tuning{f' ({cache})' if gpu else ''}.",
        "Peak memory: above the inputs, with outputs; for forward+backward with the gradients.",
        f"Floor: the larger of (inputs read once and outputs written once) / (bandwidth of a large copy) and "
        f"(multiply-adds of the chunkwise form with chunks of {CHUNK}, triangles by their entries) / (rate of a large "
        f"matrix product in {settings.dtype}), both measured in this run.",
        f"Error: RMS of the difference over RMS of the chunkwise reference in float64 on the same inputs, "
        f"{CHECK_TOKENS} tokens, with an initial state.",
    ]
