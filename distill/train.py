"""The one loop: every stage is trained here, on one process or several, and goes on exactly where it stopped."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from distill.objectives import Objective, place
from distill.optimiser import Masters, schedule
from distill.packing import Batch, Stream, share
from distill.parallel import Processes
from distill.plan import StagePlan
from distill.stage import Stage


class Stopped(Exception):
    """Training ended early on request, with everything saved. ``exit_code`` is the command's."""

    def __init__(self, why: str, exit_code: int) -> None:
        super().__init__(why)
        self.exit_code = exit_code


@dataclass(slots=True)
class Stop:
    """Whether to stop after the step that runs: a signal came, or the time is used up."""

    deadline: float = math.inf
    """By time.monotonic()."""
    signal: int = 0

    def why(self) -> tuple[str, int] | None:
        if self.signal:
            return f"stopped by {signal.Signals(self.signal).name}", 128 + self.signal
        if time.monotonic() >= self.deadline:
            return "the time given is used up", 0
        return None


@contextmanager
def listening(minutes: float | None) -> Iterator[Stop]:
    """SIGTERM and Ctrl-C end the step that runs, then stop; a second one falls through to what was there before."""
    stop = Stop(deadline=math.inf if minutes is None else time.monotonic() + 60 * minutes)
    before: dict[int, Any] = {}

    def heard(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.getsignal(number)
        signal.signal(number, heard)
    try:
        yield stop
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


class Metrics:
    """OUT/metrics.jsonl: a line a step, a guard's evaluation, a stage's end; TensorBoard beside it, if wanted."""

    def __init__(self, file: Path | None, board: Any = None) -> None:
        self._file = None if file is None else open(file, "ab")  # noqa: SIM115  (open as long as the run)
        self._board = board
        self.plan: StagePlan | None = None
        self.peak: float | None = None
        """FLOP/s of all processes' devices together; None where it isn't known."""

    def timed(self, row: dict[str, Any], seconds: float) -> dict[str, Any]:
        """``row`` of a step with its speed: tokens a second, and the share of the devices' peak (MFU)."""
        timed = {**row, "seconds": round(seconds, 6), "tokens_per_s": round(row["valid"] / seconds, 1)}
        if self.plan is not None and self.peak is not None:
            timed["mfu"] = round(self.plan.work(row["valid"], row["targets"]) / seconds / self.peak, 4)
        return timed

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{row['stage']}/{name}", value, row["total_tokens"])

    def size(self) -> int:
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def cut(self, size: int) -> None:
        """Forget the lines after ``size`` bytes: the steps they tell of are done again."""
        if self._file is not None:
            self._file.truncate(min(size, self._file.seek(0, os.SEEK_END)))  # it may be shorter: someone's hand
            self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


@dataclass(slots=True)
class Position:
    """How far a run is."""

    stage: int = 0
    step: int = 0
    """Steps of the stage that are done."""
    stage_tokens: int = 0
    """Tokens of the stage that were trained on, padding left out."""
    total_tokens: int = 0
    """The same over all stages, and before them where the student had a start."""
    guarded: int = 0
    """stage_tokens at the guard's last evaluation."""
    stream: dict[str, Any] | None = None
    """Where the stage's data stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the loop calls; each may be left out."""

    save: Callable[[Position, Masters], None] = lambda position, masters: None
    guard: Callable[[Position], None] = lambda position: None
    report: Callable[[dict[str, Any]], None] = lambda row: None


class Prefetch:
    """The stream's next batch, made while the device works on this one; with the stream's state after it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._worker = ThreadPoolExecutor(1)
        self._next: Future[tuple[Batch, dict[str, Any]]] = self._worker.submit(self._make)

    def _make(self) -> tuple[Batch, dict[str, Any]]:
        return self._stream.next(), self._stream.state_dict()

    def next(self, more: bool) -> tuple[Batch, dict[str, Any]]:
        made = self._next.result()
        if more:
            self._next = self._worker.submit(self._make)
        return made

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)


@dataclass(slots=True)
class _Step:
    """A step whose numbers are on their way from the device."""

    row: dict[str, Any]
    batch: Batch
    numbers: Tensor
    """[2]: loss, norm of the gradient; float32, on the CPU once ``ready``."""
    ready: Any
    begun: float = field(default_factory=time.perf_counter)


def train(
    stage: Stage,
    objective: Objective,
    masters: Masters,
    stream: Stream,
    position: Position,
    *,
    device: torch.device,
    processes: Processes,
    stop: Stop,
    metrics: Metrics,
    hooks: Hooks,
    guard_every: int = 0,
    save_seconds: float = 300.0,
) -> Position:
    """Train ``stage`` from ``position`` to its end; returns where it ended.

    A step's numbers are read one step later, so that the device never waits for them. ValueError for a loss or a
    gradient that isn't finite: what was saved before stays. `Stopped` after a signal, everything saved; a guard's
    evaluation that was due then comes first when the run goes on.
    """
    if position.stream is not None:
        stream.load_state_dict(position.stream)
    batches = Prefetch(stream)
    pending: _Step | None = None
    saved = time.monotonic()
    try:
        while position.step < stage.steps:
            if position.stage_tokens - position.guarded >= guard_every > 0:
                position.guarded = position.stage_tokens
                hooks.guard(position)
            batch, state = batches.next(more=position.step + 1 < stage.steps)
            step = _launch(stage, objective, masters, batch, position, device, processes)
            position.step += 1
            position.stage_tokens += batch.valid
            position.total_tokens += batch.valid
            position.stream = state
            step.row.update(tokens=position.stage_tokens, total_tokens=position.total_tokens)
            if pending is not None:
                _finish(pending, metrics, hooks, step.begun)
            pending = step
            why = stop.why()
            code, late = processes.largest(-1 if why is None else why[1], time.monotonic() - saved >= save_seconds)
            halted, last = code >= 0, position.step == stage.steps
            due = position.stage_tokens - position.guarded >= guard_every > 0
            if halted or late or due or last:
                _finish(pending, metrics, hooks, None)
                pending = None
            if (halted or late) and not last:
                hooks.save(position, masters)
                saved = time.monotonic()
            if halted and not last:
                sentence = "another process was stopped" if why is None else why[0]
                raise Stopped(f"{sentence} in {stage.name} at step {position.step} of {stage.steps}", code)
    finally:
        batches.close()
    return position


def _launch(
    stage: Stage,
    objective: Objective,
    masters: Masters,
    batch: Batch,
    position: Position,
    device: torch.device,
    processes: Processes,
) -> _Step:
    """Forward, backward and optimiser of one step; its numbers are not waited for."""
    begun = time.perf_counter()
    # Every process has the whole batch before it, so the number of targets in all needs no message.
    total = max(float(batch.weights.double().sum()), 1e-9)
    own = share(batch, processes.share(len(batch.tokens)))
    rows = len(own.tokens)
    size = min(stage.micro_batch or rows, rows)
    loss = torch.zeros((), device=device)
    for start in range(0, rows, size):
        loss += objective(place(share(own, slice(start, min(start + size, rows))), device), 1 / total)
        masters.collect(first=start == 0)
    processes.sum(loss)
    lr = stage.lr * schedule(stage, position.step, stage.steps)
    norm = masters.step(position.step, stage.steps, processes)
    numbers = torch.stack([loss / total, norm]).float()
    ready = None
    if device.type == "cuda":
        host = torch.empty(2, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        numbers, ready = host, torch.cuda.Event()
        ready.record()
    targets = int((batch.weights != 0).sum())
    row = {"stage": stage.name, "step": position.step + 1, "lr": lr, "valid": batch.valid, "targets": targets}
    return _Step(row=row, batch=batch, numbers=numbers, ready=ready, begun=begun)


def _finish(step: _Step, metrics: Metrics, hooks: Hooks, until: float | None) -> None:
    """Wait for a step's numbers, check and write them. ``until``: when the next step began, None: now."""
    if step.ready is not None:
        step.ready.synchronize()
    loss, norm = step.numbers.tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        shown = ", ".join(step.batch.examples[:3])
        more = len(step.batch.examples) - 3
        raise ValueError(
            f"the loss is {loss} and the gradient's norm {norm} at step {step.row['step']} of {step.row['stage']}, on "
            f"the batch with {shown}{f' and {more} more examples' if more > 0 else ''}; what was saved before is kept: "
            f"look at those examples, or lower lr"
        )
    seconds = (time.perf_counter() if until is None else until) - step.begun
    row = metrics.timed({**step.row, "loss": loss, "grad_norm": norm}, seconds)
    metrics.write(row)
    hooks.report(row)
