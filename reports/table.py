"""The comparison's main table: the same rows for the terminal and for Markdown."""

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

SHORT = {"loglikelihood": "LL", "generation": "GEN"}
NAMES = {"loglikelihood": "log-likelihood", "generation": "generation"}
NO_SIGNAL = "∅"
IN_FORMULA = "in formula"
WIDE = 116
"""Columns that the one-line form of the table needs."""
HEADERS = ("Task", "Mode", "View", "Floor", "Teacher", "Student", "Gap", "Unparsed T / S")


@dataclass(frozen=True, slots=True)
class Line:
    cells: tuple[str, ...]
    kind: str
    """"mode": one mode of a task; "gap": the difference between the modes; "overall"."""
    first: bool = False
    """First line of a task."""


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def signed(cell: dict[str, Any] | None) -> str:
    """'+7.1 [+3.2, +11.0]' in points, or a dash."""
    if cell is None:
        return "–"
    low, high = cell["ci95"]
    return f"{100 * cell['mean']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def accuracy(cell: dict[str, Any]) -> str:
    low, high = cell["ci95"]
    return f"{percent(cell['accuracy'])} [{percent(low)}, {percent(high)}]"


def unread(cell: dict[str, Any]) -> float:
    """Share of replies without one readable answer."""
    counts: dict[str, int] = cell["outcomes"]
    return (sum(counts.values()) - counts["correct"] - counts["wrong"]) / max(1, sum(counts.values()))


def lines(result: dict[str, Any]) -> list[Line]:
    """Every line of the table, in percent; intervals are 95 %."""
    out: list[Line] = []
    for task in result["tasks"]:
        for at, (mode, cell) in enumerate(task["modes"].items()):
            mark = "" if task["signal"][mode] else f" {NO_SIGNAL}"
            name = task["name"] if at == 0 else f"n = {task['n']}"
            unparsed = f"{percent(unread(cell['teacher']))} / {percent(unread(cell['student']))}"
            cells = (
                name,
                SHORT[mode],
                cell["view"],
                percent(cell["floor"]),
                accuracy(cell["teacher"]) + mark,
                accuracy(cell["student"]),
                signed(cell["gap"]),
                unparsed,
            )
            out.append(Line(cells, "mode", first=at == 0))
        out += _gap_lines(task)
    out += _overall_lines(result["overall"])
    return out


def _gap_lines(task: dict[str, Any]) -> list[Line]:
    if task["hidden_gap"] is not None:
        return [
            Line(("", "GEN − LL", "", "", "", "hidden gap", signed(task["hidden_gap"]), ""), "gap"),
            Line(("", "", "", "", "", IN_FORMULA, signed(task["hidden_gap"]["formula"]), ""), "gap"),
        ]
    protocol = task["protocol_gap"]
    if protocol is None:
        return []
    rows = [
        Line(("", "GEN − LL", "", "", "", "protocol gap", signed(protocol), ""), "gap"),
        Line(("", "", "", "", "", IN_FORMULA, signed(protocol["formula"]), ""), "gap"),
    ]
    parts = protocol["parts"]
    if parts["mode"] is not None and parts["view"] is not None:
        view = task["modes"]["generation"]["view"]
        rows.append(Line(("", "", "", "", "", f"of it mode ({view})", signed(parts["mode"]), ""), "gap"))
        rows.append(Line(("", "", "", "", "", "of it view (LL)", signed(parts["view"]), ""), "gap"))
    return rows


def _overall_lines(overall: dict[str, Any]) -> list[Line]:
    out = []
    for at, (mode, cell) in enumerate(overall["modes"].items()):
        name = "overall" if at == 0 else f"{len(overall['tasks'])} tasks"
        teacher, student = accuracy(cell["teacher"]), accuracy(cell["student"])
        out.append(
            Line(
                (name, SHORT[mode], "", "", teacher, student, signed(cell["gap"]), ""),
                "overall",
                first=at == 0,
            )
        )
    for kind in ("hidden_gap", "protocol_gap"):
        if overall[kind] is not None:
            label = kind.replace("_", " ")
            out.append(Line(("", "GEN − LL", "", "", "", label, signed(overall[kind]), ""), "overall"))
            out.append(Line(("", "", "", "", "", IN_FORMULA, signed(overall[kind]["formula"]), ""), "overall"))
    return out


def caption(result: dict[str, Any]) -> str:
    text = (
        "Accuracy in percent with 95 % intervals (these checkpoints, new items); gap = teacher − student in points. "
        "Unparsed: replies without one readable answer (LL: ties that hold the gold). Formula scores take chance out: "
        "right 1, a guess 0 on average."
    )
    if any(not there for task in result["tasks"] for there in task["signal"].values()):
        text += (
            f" {NO_SIGNAL}: the teacher is not above the floor, so this cell carries no signal and is left out overall."
        )
    return text


def terminal_table(result: dict[str, Any], width: int) -> Table:
    """One line a mode where ``width`` (columns) allows it; else intervals stand below their figures."""
    shown = lines(result)
    table = Table(
        title=f"{result['teacher']['name']} (teacher) against {result['student']['name']} (student)",
        caption=caption(result),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    narrow = width < WIDE
    headers = HEADERS if not narrow else (HEADERS[0], "Mode", *HEADERS[3:-1], "Unparsed\nT / S")
    for at, header in enumerate(headers):
        table.add_column(header, justify="left" if at < len(headers) - 5 else "right", no_wrap=at != 0, overflow="fold")
    for line in shown:
        if line.first and table.row_count:
            table.add_section()
        cells = line.cells
        if narrow:
            mode = "" if line.kind == "gap" else " ".join(cells[1:3]).strip()
            cells = (cells[0], mode, cells[3], *(_stacked(cell) for cell in cells[4:]))
        table.add_row(*cells, style={"gap": "bold", "overall": "cyan"}.get(line.kind, ""))
    return table


def _stacked(cell: str) -> str:
    """'7.1 [3.2, 11.0] ∅' over two lines."""
    figure, bracket, interval = cell.partition(" [")
    if bracket:
        inside, _, mark = interval.partition("]")
        return f"{figure}{mark}\n[{inside.replace(', ', ',')}]"
    return cell.replace(" / ", " /\n")
