"""What a run shows while it goes on: a line a stage with loss, speed and the time left; one line for each event."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def shown(console: Console, wanted: bool = True) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A reporter for `distill.run.distill`: bars on ``console``, or none."""
    if not wanted:
        yield lambda row: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        lines: dict[str, Any] = {}

        def line(row: dict[str, Any]) -> Any:
            if row["stage"] not in lines:
                lines[row["stage"]] = bars.add_task(row["stage"], total=row.get("steps"), numbers="")
            return lines[row["stage"]]

        def report(row: dict[str, Any]) -> None:
            if row.get("begin"):
                bars.update(line(row), completed=row["step"], total=row["steps"])
            elif "guard" in row:
                console.print(guard_sentence(row))
            elif row.get("end"):
                console.print(end_sentence(row))
            else:
                bars.update(line(row), completed=row["step"], numbers=numbers(row))

        yield report


def numbers(row: dict[str, Any]) -> str:
    """Loss and speed of a step."""
    mfu = f" · MFU {row['mfu']:.0%}" if "mfu" in row else ""
    return f"loss {row['loss']:.4f} · {row['tokens_per_s']:,.0f} tokens/s{mfu}"


def guard_sentence(row: dict[str, Any]) -> str:
    """The guard's accuracies on one line."""
    each = ", ".join(
        f"{task} {one['accuracy']:.0%} right, {one['unparsed']:.0%} unparsed (n = {one['items']:.0f})"
        for task, one in row["guard"].items()
    )
    return f"{row['stage']} after {row['tokens']:,} tokens, generating on TRAIN items held out: {each}"


def end_sentence(row: dict[str, Any]) -> str:
    """What a stage did to the loss on its fixed batch."""
    probe = row["probe"]
    left = "".join(f"; {count} examples left out: {why}" for why, count in row["left_out"].items())
    return (
        f"{row['stage']}: loss on one fixed batch {probe['before']:.4f} before, {probe['after']:.4f} after "
        f"{row['tokens']:,} tokens{left}"
    )
