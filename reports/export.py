"""What the copy buttons give: the main figures as LaTeX and as CSV, and a citation."""

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from evalkit import __version__

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "∅": r"$\emptyset$",
    **{char: f"\\{char}" for char in "&%$#_{}"},
}


def latex_table(headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str, left: int) -> str:
    """A booktabs table; the first ``left`` columns are text."""
    lines = [" & ".join(map(_latex, row)) + r" \\" for row in rows]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(caption)}}}",
            rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(headers) - left)}}}",
            r"\toprule",
            " & ".join(map(_latex, headers)) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _latex(text: str) -> str:
    return "".join(LATEX.get(char, char) for char in text)


def csv_table(rows: Sequence[dict[str, Any]]) -> str:
    """Fractions, not rounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n") if rows else None
    if writer:
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def comparison_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a task and mode."""
    rows = []
    for task in result["tasks"]:
        for mode, cell in task["modes"].items():
            row = {"task": task["name"], "version": task["version"], "n": task["n"], "mode": mode, "view": cell["view"]}
            row |= {"signal": task["signal"][mode], "floor": cell["floor"]}
            for who in ("teacher", "student"):
                row |= _columns(who, {"mean": cell[who]["accuracy"], "ci95": cell[who]["ci95"]})
            rows.append({**row, **_columns("gap", cell["gap"]), **_columns("formula_gap", cell["formula"]["gap"])})
    return rows


def rank_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a task, checkpoint and mode."""
    return [
        {
            "task": task["name"],
            "n": task["n"],
            "checkpoint": point["label"],
            "tokens": point["tokens"],
            "mode": mode,
            **_columns("accuracy", cell),
        }
        for task in result["tasks"]
        for point, found in zip(result["checkpoints"], task["accuracy"], strict=True)
        for mode, cell in found.items()
    ]


def run_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "task": task["name"],
            "version": task["version"],
            "n": task["n"],
            "mode": mode,
            "view": cell["view"],
            **_columns("accuracy", {"mean": cell["accuracy"], "ci95": cell["ci95"]}),
        }
        for task in summary["tasks"]
        for mode, cell in task["modes"].items()
    ]


def _columns(name: str, cell: dict[str, Any]) -> dict[str, float]:
    return {name: cell["mean"], f"{name}_low": cell["ci95"][0], f"{name}_high": cell["ci95"][1]}


def citation(models: Sequence[dict[str, Any]], tasks: Sequence[str]) -> str:
    """BibTeX of the figures: which models by fingerprint, which tasks, which evalkit."""
    told = "; ".join(f"{model['name']} ({model['fingerprint']})" for model in models)
    names = " and ".join(model["name"] for model in models[:2])
    key = re.sub(r"[^a-z0-9]+", "-", "-".join(model["name"] for model in models[:2]).lower()).strip("-")
    return "\n".join(
        [
            f"@misc{{evalkit-{key},",
            f"  title = {{Log-likelihood and generation scores of {_latex(names)}}},",
            f"  note = {{Models by fingerprint: {_latex(told)}. Tasks: {_latex(', '.join(tasks))}}},",
            f"  howpublished = {{evalkit {__version__}}}",
            "}",
        ]
    )
