"""Where a loss by chain of thought arises: in reading an answer out, in rolling the reasoning out, or in saying it.

With right answers by log-likelihood after a chain of thought, loss = T said - S said is the sum of three parts, item by
item: reading = T after its own - S after the teacher's; rolling = S after the teacher's - S after its own;
saying = (S after its own - S said) - (T after its own - T said).
"""

from collections.abc import Sequence
from typing import Any

from evalkit.stats.floors import accuracy
from evalkit.stats.intervals import mean_t
from reports.cells import table_of
from reports.table import percent, signed
from reports.why import plain

SCHEMA = "evalkit.bridge/1"
PARTS = ("reading", "rolling", "saying")


def bridge_cells(
    *,
    teacher_own: Sequence[bool],
    teacher_said: Sequence[bool],
    student_given: Sequence[bool],
    student_own: Sequence[bool],
    student_said: Sequence[bool],
    clusters: Sequence[str],
) -> dict[str, Any]:
    """Every cell's accuracy and the three parts of the loss; ``student_given``: after the teacher's reasoning."""
    cells = {
        "teacher": {"own": teacher_own, "said": teacher_said},
        "student": {"given": student_given, "own": student_own, "said": student_said},
    }
    rows = zip(teacher_own, teacher_said, student_given, student_own, student_said, strict=True)
    steps: dict[str, list[int]] = {name: [] for name in (*PARTS, "loss")}
    for t_own, t_said, s_given, s_own, s_said in rows:
        steps["reading"].append(int(t_own) - int(s_given))
        steps["rolling"].append(int(s_given) - int(s_own))
        steps["saying"].append((int(s_own) - int(s_said)) - (int(t_own) - int(t_said)))
        steps["loss"].append(int(t_said) - int(s_said))
    return {
        "n": len(clusters),
        "cells": {
            who: {name: plain(accuracy(list(rights), clusters)) for name, rights in own.items()}
            for who, own in cells.items()
        },
        "parts": {
            name: plain(mean_t(found, clusters, bound=2.0 if name == "saying" else 1.0))
            for name, found in steps.items()
        },
    }


def bridge_markdown(result: dict[str, Any]) -> str:
    names = {"given": "LL after the teacher's reasoning", "own": "LL after its own reasoning", "said": "generated"}
    cells = [
        (task["name"], who, names[name], f"{percent(cell['mean'])} [{', '.join(map(percent, cell['ci95']))}]")
        for task in result["tasks"]
        for who, own in task["cells"].items()
        for name, cell in own.items()
    ]
    parts = [(task["name"], *(signed(task["parts"][name]) for name in (*PARTS, "loss"))) for task in result["tasks"]]
    note = (
        "Points [95 % interval]. Reading: the same reasoning, the teacher's, read by either model. Rolling: the "
        "student after the teacher's reasoning and after its own. Saying: what is lost between ranking the endings and "
        "saying one that can be read. They add up to the loss."
    )
    return (
        "\n\n".join(
            [
                f"# Bridge cells: {result['student']} against {result['teacher']}",
                table_of(("Task", "Reading", "Rolling", "Saying", "Loss"), parts),
                note,
                table_of(("Task", "Model", "Cell", "Accuracy"), cells, left=3),
            ]
        )
        + "\n"
    )
