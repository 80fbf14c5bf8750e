"""How far a student strays from its teacher on the teacher's own replies: KL by the step, and where it would part.

The student is never left to itself here: at each step it is given what the teacher said. It would have said the same up
to the first step at which its likeliest token is another one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from evalkit.forced import Forced
from evalkit.stats.floors import accuracy
from evalkit.stats.intervals import mean_from_zero
from reports.cells import table_of
from reports.table import percent
from reports.why import plain

SCHEMA = "evalkit.divergence/1"
AFTER = (1, 2, 4, 8, 16, 32, 64)
"""Steps after which the share of replies not yet parted is told."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
BECAME = {
    (True, True): "both right",
    (True, False): "lost",
    (False, True): "gained",
    (False, False): "both wrong",
}
"""(teacher right, student right) -> what became of the item."""


def divergence_cells(
    forced: Sequence[Forced], clusters: Sequence[str], became: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A task's figures; ``became``: item -> one of ``BECAME``, for those that the student's run holds."""
    groups = None
    if became is not None:
        groups = {}
        for name in BECAME.values():
            chosen = [at for at, one in enumerate(forced) if became.get(one.item) == name]
            groups[name] = _cells([forced[at] for at in chosen], [clusters[at] for at in chosen])
    return {
        **_cells(forced, clusters),
        "groups": groups,
        "items": [
            {
                "item": one.item,
                "steps": one.steps,
                "kl": one.kl,
                "first": one.first,
                "student_logprob": one.logprob,
                **({} if became is None else {"became": became.get(one.item)}),
            }
            for one in forced
        ],
    }


def _cells(forced: Sequence[Forced], clusters: Sequence[str]) -> dict[str, Any]:
    if not forced:
        return {"n": 0, "steps": 0, "kl": None, "first": None, "same": None, "survival": []}
    kls = [one.kl for one in forced]
    interval = mean_from_zero(kls, clusters)
    return {
        "n": len(forced),
        "steps": sum(one.steps for one in forced),
        "kl": plain(interval) if interval else {"mean": math.fsum(kls) / len(kls), "ci95": None},
        "first": {f"{q:g}": quantile([one.first for one in forced], q) for q in QUANTILES},
        "same": plain(accuracy([one.first is None for one in forced], clusters)),
        "survival": [
            {"after": k, **plain(accuracy([one.first is None or one.first >= k for one in forced], clusters))}
            for k in AFTER
        ],
    }


def quantile(first: Sequence[int | None], q: float) -> int | None:
    """The step by which at least a share ``q`` of the replies has parted; None: fewer ever do."""
    ordered = sorted(math.inf if at is None else at for at in first)
    found = ordered[max(0, math.ceil(q * len(ordered) - 1e-9) - 1)]
    return None if found == math.inf else int(found)


# --- tables ------------------------------------------------------------------------------------------------------

KL_HEADERS = ("Task", "Items", "n", "Steps", "Nats a step", "10 %", "25 %", "50 %", "75 %", "90 %", "Never")
NARROW_HEADERS = tuple(header for header in KL_HEADERS if header != "Steps")
SURVIVAL_HEADERS = ("Task", "Items", *map(str, AFTER))


def _lines(result: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(task, which items, their figures), without groups that hold none."""
    return [
        (task["name"] if name == "all" else "", name, cell)
        for task in result["tasks"]
        for name, cell in (("all", task), *(task["groups"] or {}).items())
        if cell["n"]
    ]


def kl_rows(result: dict[str, Any], narrow: bool = False) -> list[tuple[str, ...]]:
    """``narrow``: no steps, and intervals on a line of their own, as a terminal's 80 columns need."""
    rows = []
    for task, name, cell in _lines(result):
        kl, (low, high) = cell["kl"], cell["kl"]["ci95"] or (None, None)
        told = f"{kl['mean']:.3f}"
        if low is not None:
            told += f"\n[{low:.2f},{high:.2f}]" if narrow else f" [{low:.3f}, {high:.3f}]"
        places = ("–" if at is None else str(at) for at in cell["first"].values())
        counts = (str(cell["n"]),) if narrow else (str(cell["n"]), str(cell["steps"]))
        rows.append((task, name, *counts, told, *places, _share(cell["same"], narrow)))
    return rows


def survival_rows(result: dict[str, Any], narrow: bool = False) -> list[tuple[str, ...]]:
    return [(task, name, *(_share(one, narrow) for one in cell["survival"])) for task, name, cell in _lines(result)]


def _share(cell: dict[str, Any], narrow: bool) -> str:
    low, high = cell["ci95"]
    bounds = f"\n[{100 * low:.0f},{100 * high:.0f}]" if narrow else f" [{percent(low)}, {percent(high)}]"
    return percent(cell["mean"]) + bounds


def divergence_tables(result: dict[str, Any]) -> list[Table]:
    """For the terminal."""
    tables = []
    for title, headers, rows in (
        ("KL(teacher || student), and the first step at which the student would part", NARROW_HEADERS, kl_rows),
        ("Percent of replies not yet parted after so many steps", SURVIVAL_HEADERS, survival_rows),
    ):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for at, header in enumerate(headers):
            table.add_column(header, justify="left" if at < 2 else "right")
        for row in rows(result, narrow=True):
            table.add_row(*row)
        tables.append(table)
    return tables


def notes(result: dict[str, Any]) -> list[str]:
    """What else to know, a sentence each."""
    found = []
    for task in result["tasks"]:
        reasons = {"cut": "prompt cut to the window", "thought": "a thinking block", "empty": "nothing said"}
        left = [f"{count} ({reasons[why]})" for why, count in task["left_out"].items() if count]
        if left:
            found.append(f"{task['name']}: items left out: {', '.join(left)}.")
        if task["respelled"]:
            found.append(
                f"{task['name']}: {task['respelled']} of {task['n']} replies were generated in other tokens than their "
                "text has by itself, and are read in the latter."
            )
        if task["groups"] is not None:
            apart = task["n"] - sum(cell["n"] for cell in task["groups"].values())
            if apart:
                found.append(f"{task['name']}: {apart} items are not in the student's run, so in no group.")
    return found


def divergence_markdown(result: dict[str, Any]) -> str:
    note = (
        "Both models read the teacher's replies. A step is a token of the reply, and its end where the teacher ended "
        "it itself (a stop string is none). KL(teacher || student): mean over a reply's steps, then over replies, in "
        "nats [95 % t interval over items]. 10 % to 90 %: the step, from 0, by which that share of the replies has met "
        "one where the student's likeliest token is not the teacher's (–: fewer ever do). Never: percent of replies "
        "without one."
    )
    return (
        "\n\n".join(
            [
                f"# Divergence: {result['student']} on the replies of {result['teacher']}",
                table_of(KL_HEADERS, kl_rows(result), left=2),
                note,
                "## Replies not yet parted",
                table_of(SURVIVAL_HEADERS, survival_rows(result), left=2),
                "Percent of replies without such a step among the first 1, 2, 4, ... [95 % interval: Wilson's, or "
                "clustered t]; a shorter reply that never parts counts as one that hasn't.",
                *notes(result),
            ]
        )
        + "\n"
    )
