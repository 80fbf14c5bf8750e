"""A measurement as tables: the same cells for the terminal and for Markdown."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from models.bench.provenance import write

NONE = "–"


@dataclass(frozen=True, slots=True)
class Grid:
    """One table; the first ``left`` columns are names, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


def terminal(grid: Grid) -> Table:
    table = Table(title=grid.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for at, name in enumerate(grid.header):
        table.add_column(name, justify="left" if at < grid.left else "right", no_wrap=True)
    for row in grid.rows:
        table.add_row(*row)
    return table


def show(console: Console, grids: Sequence[Grid]) -> None:
    """Print tables at their own width: a narrow terminal breaks lines, but no number is cut."""
    for grid in grids:
        table = terminal(grid)
        needed = Console(width=1000).measure(table).maximum
        wide = Console(file=console.file, width=max(console.width, needed), markup=False)
        wide.print(table, soft_wrap=True)


def markdown(result: dict[str, Any], title: str, grids: Sequence[Grid]) -> str:
    """The report: device, versions, tables, notes and method."""
    parts = [f"# {title}", "\n".join(f"* {_cell(line)}" for line in about(result))]
    for grid in grids:
        rule = [":--" if at < grid.left else "--:" for at in range(len(grid.header))]
        lines = [grid.header, rule, *grid.rows]
        parts += [f"## {grid.title}", "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)]
    if result["notes"]:
        parts += ["## Notes", "\n".join(f"* {_cell(note)}" for note in result["notes"])]
    parts += ["## Method", "\n".join(f"* {_cell(line)}" for line in result["method"])]
    return "\n\n".join(parts) + "\n"


def write_result(stem: Path, result: dict[str, Any], title: str, grids: Sequence[Grid]) -> None:
    """``stem``.json with every sample, and ``stem``.md."""
    write(stem.with_name(f"{stem.name}.json"), json.dumps(result, indent=2) + "\n")
    write(stem.with_name(f"{stem.name}.md"), markdown(result, title, grids))


def about(result: dict[str, Any]) -> list[str]:
    """Device, versions, dtype, seed and date, one line each."""
    where, device = result["environment"], result["environment"]["device"]
    if device["type"] == "cuda":
        detail = (
            f"{size(device['memory_bytes'])}, {device['multiprocessors']} multiprocessors, compute capability "
            f"{device['capability']}, CUDA {device['cuda']}"
        )
    else:
        detail = f"CPU, {device['cores']} cores"
    versions = ", ".join(f"{name} {version or '(not installed)'}" for name, version in where["versions"].items())
    lines = [
        f"Device: {device['name']} ({detail})",
        f"Software: {versions}; hash of models/kda: {where['kda_sources']}",
        f"dtype {result['settings']['dtype']}, seed {result['settings']['seed']}, {where['date']}",
    ]
    if "ceilings" in result:
        limits = result["ceilings"]
        lines.append(
            f"Ceilings measured here: copy {limits['copy_bytes_per_s'] / 1e12:.3g} TB/s (read and written), "
            f"matrix product {limits['matmul_flop_per_s'] / 1e12:.3g} TFLOP/s in {limits['dtype']}"
        )
    return lines if result["complete"] else [*lines, "UNFINISHED: the run was cut off; rows are missing"]


@contextmanager
def progress(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, drawn from the first report on: (step that begins, steps done, steps in all)."""
    names = (TextColumn(label), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    shown = Progress(*names, TextColumn("{task.description}", markup=False), console=Console(file=sys.stderr))
    line = shown.add_task("")

    def report(step: str, done: int, total: int) -> None:
        shown.start()
        shown.update(line, description=step, completed=done, total=total)

    try:
        yield report
    finally:
        if shown.live.is_started:
            shown.stop()


def milliseconds(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 100 else f"{value:.1f}"


def median(summary: dict[str, float] | None) -> tuple[str, str]:
    """Milliseconds, and the distance between the quartiles as a share of them."""
    if summary is None:
        return NONE, NONE
    return milliseconds(summary["median"]), f"{(summary['p75'] - summary['p25']) / summary['median']:.1%}"


def times(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}x"


def size(value: float | None) -> str:
    """Bytes in the largest binary unit of which there is one."""
    if value is None:
        return NONE
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    at = 0
    while abs(value) >= 1024 and at < len(units) - 1:
        value, at = value / 1024, at + 1
    return f"{value:.0f} {units[at]}" if at == 0 else f"{value:.1f} {units[at]}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
