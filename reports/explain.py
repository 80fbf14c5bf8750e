"""`evalkit explain`: one page in plain sentences on a comparison. Every claim stands with its interval."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from evalkit.selection import digest
from evalkit.stats.intervals import Interval, macro
from evalkit.store import MANIFEST
from reports.cells import inline
from reports.compare import SCHEMA
from reports.markdown import sentence
from reports.table import NAMES, percent, signed, unread
from reports.why import plain

SHOWN = 160
"""Characters of a reply in an example."""


def read_comparison(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(compare.json, the rows of items.jsonl); ValueError says what is missing and what to run."""
    if (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is one run; explain needs a comparison: evalkit compare TEACHER STUDENT --out DIR")
    for name in ("compare.json", "items.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no comparison: it has no {name}; run evalkit compare with --out {folder}")
    try:
        result = _read((folder / "compare.json").read_text(encoding="utf-8"))
        items = [_read(line) for line in (folder / "items.jsonl").read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:
        raise ValueError(f"{folder} is damaged ({error}); run the same `evalkit compare` command again") from error
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{folder / 'compare.json'} has the schema {schema!r}; this evalkit reads {SCHEMA!r}")
    cells = [cell for task in result["tasks"] for cell in task.get("modes", {"none": {}}).values()]
    if any("log_odds" not in cell for cell in cells):
        raise ValueError(f"{folder / 'compare.json'} is of an older evalkit; run the same `evalkit compare` again")
    held = Counter(row.get("task") if isinstance(row, dict) else None for row in items)
    for task in result["tasks"]:
        if held[task["name"]] != task["n"]:
            raise ValueError(
                f"{folder / 'items.jsonl'} holds {held[task['name']]} items of {task['name']!r}, but compare.json says "
                f"{task['n']}; run the same `evalkit compare` command again"
            )
    return result, items


def _read(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"it holds the number {constant}")

    return json.loads(text, parse_constant=refuse)


def explain(result: dict[str, Any], items: Sequence[dict[str, Any]], folder: str) -> str:
    """The page, as Markdown that reads as plain text too; ``folder`` goes into the next command."""
    verdict = _section("Verdict", [inline(sentence(result))])
    return "\n\n".join([f"# {title(result)}", *verdict, *explain_sections(result, items, folder)]) + "\n"


def title(result: dict[str, Any]) -> str:
    teacher, student = (inline(result[who]["name"]) for who in ("teacher", "student"))
    return f"What {student} lost of {teacher}"


def explain_sections(result: dict[str, Any], items: Sequence[dict[str, Any]], folder: str) -> list[str]:
    """What follows the verdict; without ``items`` there are no examples."""
    return [
        *_section("In figures", _figures(result)),
        *_section("Why", _why(result, items)),
        *_section("Where", _where(result)),
        *_section("Without signal", _silent(result)),
        *_section("What can't be concluded", _open(result)),
        *_section("Where this comes from", _provenance(result)),
        *_section("Next", _next(result, folder)),
    ]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"* {line}" for line in lines)] if lines else []


def _used(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [task for task in result["tasks"] if task["name"] in result["overall"]["tasks"]]


def _figures(result: dict[str, Any]) -> list[str]:
    overall, lines = result["overall"], []
    for mode, cell in overall["modes"].items():
        lines.append(
            f"By {NAMES[mode]} the student loses {signed(cell['gap'])} points of accuracy, "
            f"{signed(cell['formula_gap'])} in formula scores (hundredths, chance taken out)."
        )
    for kind, name in (("hidden_gap", "Hidden gap"), ("protocol_gap", "Protocol gap")):
        cell = overall[kind]
        if cell:
            lines.append(
                f"{name}: {signed(cell)} points, {signed(cell['formula'])} in formula scores: {cell['verdict']}."
            )
    held = result["held_out"]
    if held and held["hidden_gap"]:
        lines.append(
            f"On the {held['items']:,} items that did not decide which tasks carry signal, the hidden gap is "
            f"{signed(held['hidden_gap'])} points."
        )
    return [*lines, "Intervals are at 95 % and speak of these checkpoints over new items."] if lines else []


def _why(result: dict[str, Any], items: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    nets = sorted(overall_flows(result), key=lambda pair: -abs(float(pair[1]["mean"])))
    for kind, net in nets[:3]:
        if net["mean"]:
            lines.append(f"Of the loss by generation, {signed(net)} points are right answers that became {kind} (net).")
    for task in _used(result):
        mass = (task["modes"].get("loglikelihood") or {}).get("mass") or {}
        for who, cell in mass.items():
            if cell and cell["mean"] < 0.5:
                low, high = cell["ci95"]
                lines.append(
                    f"{inline(task['name'])}: only {percent(cell['mean'])} % [{percent(low)}, {percent(high)}] of the "
                    f"{who}'s probability is on the choices at all, so ranking them tells little of what it says."
                )
    return lines + [_example(row) for row in examples(items)]


def overall_flows(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Net flows averaged over the tasks with signal, each with its interval; they add up to the overall loss."""
    tasks = [task for task in _used(result) if task["flows"]]
    kinds = [row["outcome"] for row in tasks[0]["flows"]] if tasks else []
    parts = {
        kind: [_interval(row) for task in tasks for row in task["flows"] if row["outcome"] == kind] for kind in kinds
    }
    return [(kind, plain(macro(rows))) for kind, rows in parts.items()]


def _interval(row: dict[str, Any]) -> Interval:
    return Interval(mean=row["net"], low=row["ci95"][0], high=row["ci95"][1], n=0)


def examples(items: Sequence[dict[str, Any]], n: int = 2) -> list[dict[str, Any]]:
    """Items that the teacher says right and the student does not, those that the student ranks right first; among
    equals by hash, so that nobody picked them."""
    lost = [r for r in items if r.get("teacher_generation") == "correct" and r.get("student_generation") != "correct"]
    lost = [row for row in lost if "student_generation" in row]
    return sorted(
        lost, key=lambda r: (r.get("student_loglikelihood") != "correct", digest("example", r["task"], r["item"]))
    )[:n]


def _example(row: dict[str, Any]) -> str:
    gold = inline(row["choices"][row["gold"]])
    ranked = row.get("student_loglikelihood")
    tail = f"; by log-likelihood the student is {ranked} here" if ranked else ""
    return (
        f"Example {inline(row['task'])} {inline(row['item'])} (right: {gold}): the teacher says "
        f"“{_short(row['teacher_reply'])}”, the student “{_short(row['student_reply'])}” "
        f"({row['student_generation']}){tail}."
    )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return inline(text if len(text) <= SHOWN else text[:SHOWN] + " …")


def _where(result: dict[str, Any]) -> list[str]:
    mode = "generation" if "generation" in result["overall"]["modes"] else "loglikelihood"
    tasks = [task for task in _used(result) if mode in task["modes"]]
    tasks.sort(key=lambda task: -float(task["modes"][mode]["gap"]["mean"]))
    lines = []
    for task in tasks[:3]:
        p = task["modes"][mode]["test"]["holm_p"]
        proof = "" if p is None else f" (Holm p {'< 0.001' if p < 0.001 else f'{p:.3f}'})"
        others = ", ".join(
            f"{signed(cell['gap'])} by {NAMES[name]}" for name, cell in task["modes"].items() if name != mode
        )
        lines.append(
            f"{inline(task['name'])}: {signed(task['modes'][mode]['gap'])} points by {NAMES[mode]}{proof}"
            f"{f', {others}' if others else ''}{_kept(task, mode)}; n = {task['n']:,}."
        )
    return lines


def _kept(task: dict[str, Any], mode: str) -> str:
    kept = (task["recovery"] or {}).get(mode)
    if kept is None:
        return ""
    low, high = (percent(bound) for bound in kept["ci95"])
    return f"; {percent(kept['mean'])} % [{low}, {high}] of the teacher's score above chance is kept"


def _silent(result: dict[str, Any]) -> list[str]:
    return [
        f"{inline(task['name'])} by {NAMES[mode]}: the teacher's {percent(cell['teacher']['accuracy'])} % "
        f"[{percent(cell['teacher']['ci95'][0])}, {percent(cell['teacher']['ci95'][1])}] is not shown to be above its "
        f"floor of {percent(cell['floor'])} %, so a loss could not be seen; left out of the averages."
        for task in result["tasks"]
        for mode, cell in task["modes"].items()
        if not task["signal"][mode]
    ]


def _open(result: dict[str, Any]) -> list[str]:
    lines = []
    for task in _used(result):
        cells = [(f"a loss by {NAMES[mode]}", cell["gap"], cell) for mode, cell in task["modes"].items()]
        between = task["hidden_gap"] or (task["protocol_gap"] or {}).get("parts", {}).get("mode")
        if between:
            cells.append(("a hidden gap", between, between))
        for what, effect, cell in cells:
            low, high = effect["ci95"]
            if not low <= 0 <= high:
                continue
            least, needed = cell["detectable"], cell["items_needed"]
            seen = "" if least is None else f"; {task['n']:,} items show {percent(least)} points or more (80 % power)"
            more = "" if needed is None else f", and one of this size would take about {needed:,}"
            lines.append(f"{inline(task['name'])}: whether there is {what} ({signed(effect)} points){seen}{more}.")
    lines.append("Anything beyond these tasks, prompts and checkpoints: another seed or recipe was not measured.")
    return lines


def _provenance(result: dict[str, Any]) -> list[str]:
    lines = []
    for who in ("teacher", "student"):
        model = result[who]
        note = f" Made as: {model['note']}." if model["note"] else ""
        lines.append(
            f"{who.capitalize()} {inline(model['name'])}, fingerprint {model['fingerprint']}, {model['dtype']} on "
            f"{model['device']}.{inline(note)}"
        )
    tasks = ", ".join(f"{t['name']} (version {t['version']}, {t['n']:,} items)" for t in result["tasks"])
    software = ", ".join(f"{name} {version}" for name, version in result["teacher"]["versions"].items())
    return [*lines, f"Tasks: {inline(tasks)}.", f"Software: {software or 'unknown'}.", *map(inline, result["notes"])]


def _next(result: dict[str, Any], folder: str) -> list[str]:
    lines = []
    used = _used(result)
    worst = max(used, key=lambda t: max(float(c["gap"]["mean"]) for c in t["modes"].values()), default=None)
    if worst is not None:
        lines.append(f"`evalkit show {quote(folder)} --task {quote(worst['name'])}` prints the items that differ.")
    said = [task["modes"]["generation"] for task in result["tasks"] if "generation" in task["modes"]]
    if any(max(unread(cell[who]) for who in ("teacher", "student")) > 0.05 for cell in said):
        runs = " ".join(quote(result[who]["run"] or who.upper()) for who in ("teacher", "student"))
        lines.append(
            f"More than 5 % of some replies are unread: `evalkit audit {runs}` measures the extraction's error."
        )
    return lines
