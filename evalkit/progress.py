"""Progress of long work: one line a task and mode, with items and tokens a second, cache hits, and the time left."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as RichProgress,
)
from rich.text import Text

Progress = Callable[[str, int, int], None]
"""(task, items done, items in all)"""
Wanted = Progress | bool | Literal["json"]
"""The caller's own reporter, lines on standard error (True), JSON lines there ("json"), or nothing (False)."""
Figures = Callable[[], tuple[int, int]]
"""(tokens run, tokens that a cache had) since the work began"""

EVERY_S = 1.0
"""Between two JSON lines of a task; the first and the last are always written."""


class _Rate(ProgressColumn):
    """Over the whole task: items finish in bursts, a batch at a time."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.elapsed
        if not seconds:
            return Text("")
        parts = [f"{task.completed / seconds:.1f} items/s"]
        run, cached = task.fields["tokens"]
        if run:
            parts += [f"{run / seconds:.0f} tokens/s", f"{cached / (run + cached):.0%} cached"]
        return Text(", ".join(parts), style="progress.data.speed")


@contextmanager
def bars(wanted: Wanted, label: str, *, mode: str = "", figures: Figures = lambda: (0, 0)) -> Iterator[Progress]:
    """A reporter as ``wanted`` says. label: of the model; mode: what each item is scored by."""
    if callable(wanted):
        yield wanted
        return
    if not wanted:
        yield lambda task, done, total: None
        return
    if wanted == "json":
        yield _JsonLines(label, mode, figures)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(file=sys.stderr)) as shown:
        lines: dict[str, int] = {}
        begun: dict[str, tuple[int, int]] = {}

        def report(task: str, done: int, total: int) -> None:
            if task not in lines:
                begun[task] = figures()
                name = " · ".join(part for part in (label, task, mode) if part)
                lines[task] = int(shown.add_task(name, total=total, tokens=(0, 0)))
            shown.update(lines[task], completed=done, tokens=_since(begun[task], figures()))  # type: ignore[arg-type]

        yield report


class _JsonLines:
    """One JSON object a line on standard error: event, model, task, mode, done, total, seconds, items_per_s,
    tokens_per_s, tokens_cached, eta_s."""

    def __init__(self, label: str, mode: str, figures: Figures) -> None:
        self.label, self.mode, self.figures = label, mode, figures
        self.begun: dict[str, tuple[float, tuple[int, int], int]] = {}
        self.written: dict[str, float] = {}

    def __call__(self, task: str, done: int, total: int) -> None:
        now = time.monotonic()
        begin, tokens, before = self.begun.setdefault(task, (now, self.figures(), done))
        if task in self.written and done < total and now - self.written[task] < EVERY_S:
            return
        self.written[task] = now
        seconds, (run, cached) = now - begin, _since(tokens, self.figures())
        rate = (done - before) / seconds if seconds else 0.0
        line = {"event": "progress", "model": self.label, "task": task, "mode": self.mode, "done": done}
        line |= {"total": total, "seconds": round(seconds, 3), "items_per_s": round(rate, 3)}
        line |= {"tokens_per_s": round(run / seconds, 1) if seconds else 0.0, "tokens_cached": cached}
        line["eta_s"] = round((total - done) / rate, 1) if rate else None
        print(json.dumps(line), file=sys.stderr, flush=True)


def _since(before: tuple[int, int], now: tuple[int, int]) -> tuple[int, int]:
    return now[0] - before[0], now[1] - before[1]
