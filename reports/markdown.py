"""compare.md: the comparison as Markdown that a code host and a terminal both render."""

from collections.abc import Sequence
from typing import Any

from evalkit.records import VERDICTS
from evalkit.stats.intervals import wilson
from reports.cells import inline as _inline
from reports.cells import table_of as _table
from reports.probe import HEADERS as PROBE_HEADERS
from reports.probe import probe_rows, probe_sentence
from reports.table import HEADERS, NAMES, SHORT, caption, lines, percent, signed
from reports.why_markdown import log_odds_appendix, why_sections


def compare_markdown(result: dict[str, Any]) -> str:
    return "\n\n".join([f"# {title(result)}", _inline(sentence(result)), *compare_sections(result)]) + "\n"


def title(result: dict[str, Any]) -> str:
    return f"{_inline(result['teacher']['name'])} against {_inline(result['student']['name'])}"


def compare_sections(result: dict[str, Any]) -> list[str]:
    """Every table, the main one first."""
    parts = [
        _main_table(result),
        caption(result),
        *why_sections(result),
        "## Outcomes",
        _outcome_table(result),
        "## Floors",
        _floor_table(result),
        *_loglikelihood_section(result),
        *_strata_section(result),
        *_probe_section(result["student"].get("probe")),
    ]
    if result["notes"]:
        parts += ["## Notes", "\n".join(f"* {_inline(note)}" for note in result["notes"])]
    return [*parts, "## What was compared", _provenance(result), *log_odds_appendix(result)]


def sentence(result: dict[str, Any]) -> str:
    """The result in a sentence for each kind of gap, with its interval, and no more than it shows; plain text."""
    overall = result["overall"]
    if not overall["tasks"]:
        return (
            "No task carries signal: the teacher is not above the floor in every scored mode, so nothing can be "
            "concluded about the student."
        )
    kinds = [kind for kind in ("hidden_gap", "protocol_gap") if overall[kind]]
    if not kinds:
        ((mode, only),) = overall["modes"].items()
        gap = signed(only["gap"])
        return f"Student against teacher by {NAMES[mode]}: a gap of {gap} points over {_over(overall['tasks'])}."
    return " ".join(_gap_sentence(kind.replace("_", " "), overall[kind]) for kind in kinds)


SAID = {
    "log-likelihood hides loss": "log-likelihood hides loss",
    "log-likelihood shows more loss than generation": "log-likelihood shows more loss than generation does",
    "depends on the scale": "which mode loses more depends on the scale",
    "no difference shown": "no difference between the modes is shown in either unit",
}


GAINED = {
    "log-likelihood hides loss": "log-likelihood shows more gain than generation does",
    "log-likelihood shows more loss than generation": "generation gains more than log-likelihood shows",
}
"""The same verdicts where the student is ahead in both modes: a fine-tuned model beside its base, say."""


def _gap_sentence(kind: str, cell: dict[str, Any]) -> str:
    gaps = {mode: signed(gap) for mode, gap in cell["gaps"].items()}
    ahead = all(gap["mean"] < 0 for gap in cell["gaps"].values())
    said = {**SAID, **GAINED} if ahead else SAID
    return (
        f"Student against teacher: a gap of {gaps['loglikelihood']} points by log-likelihood and of "
        f"{gaps['generation']} by generation over {_over(cell['tasks'])}, so a {kind} of {signed(cell)} in raw points "
        f"and of {signed(cell['formula'])} in formula scores: {said[cell['verdict']]}."
    )


def _over(tasks: Sequence[str]) -> str:
    return f"{len(tasks)} task{'s' if len(tasks) > 1 else ''} ({', '.join(tasks)})"


def _main_table(result: dict[str, Any]) -> str:
    return _table(HEADERS, [line.cells for line in lines(result)], left=3)


def _outcome_table(result: dict[str, Any]) -> str:
    """The rate of each outcome with its 95 % interval, and accuracy over the items with a readable answer."""
    rows = []
    for task in result["tasks"]:
        for mode, cell in task["modes"].items():
            for who in ("teacher", "student"):
                counts = cell[who]["outcomes"]
                total = sum(counts.values())
                rates = [_rate(counts[verdict], total) for verdict in VERDICTS]
                parsed = cell[who]["parsed"]
                of_read = "–" if parsed is None else f"{percent(parsed['accuracy'])} (n = {parsed['n']})"
                rows.append((task["name"], SHORT[mode], who, *rates, of_read))
    note = "Percent of items [95 % Wilson interval]; the last column is the accuracy over items with a readable answer."
    return _table(("Task", "Mode", "Model", *VERDICTS, "of the read"), rows, left=3) + f"\n\n{note}"


def _rate(count: int, total: int) -> str:
    interval = wilson(count, total)
    return f"{percent(interval.mean)} [{percent(interval.low)}, {percent(interval.high)}]"


def _floor_table(result: dict[str, Any]) -> str:
    rows = []
    for task in result["tasks"]:
        for mode, cell in task["modes"].items():
            for who in ("teacher", "student"):
                floors = ", ".join(f"{name} {percent(value)}" for name, value in cell["floors"][who].items())
                signal = ("yes" if task["signal"][mode] else "no") if who == "teacher" else ""
                rows.append((task["name"], SHORT[mode], who, floors, percent(cell[who]["ci95"][0]), signal))
    note = (
        "chance: guessing; position: always the commonest gold position; blind: ranking the choices without the "
        "question; constant: always the commonest answer. Signal: the teacher's lower bound is above its highest floor "
        "on a fixed half of the items (on all of them where a half would be under 20)."
    )
    return _table(("Task", "Mode", "Model", "Floors", "Lower bound", "Signal"), rows, left=4) + f"\n\n{note}"


def _loglikelihood_section(result: dict[str, Any]) -> list[str]:
    """Accuracy under every normalisation, from the one pass."""
    rows = []
    for task in result["tasks"]:
        cell = task["modes"].get("loglikelihood")
        if cell:
            for name, both in cell["normalisations"].items():
                mark = " (primary)" if name == cell["normalisation"] else ""
                gap = f"{100 * (both['teacher'] - both['student']):+.1f}"
                rows.append((task["name"], name + mark, percent(both["teacher"]), percent(both["student"]), gap))
    table = _table(("Task", "Normalisation", "Teacher", "Student", "Gap"), rows, left=2)
    return ["## Log-likelihood under each normalisation", table] if rows else []


def _strata_section(result: dict[str, Any]) -> list[str]:
    parts = []
    for task in result["tasks"]:
        if not task["strata"]:
            continue
        modes = list(task["modes"])
        headers = (task["strata"]["of"].capitalize(), "n", *(f"{SHORT[mode]} T / S" for mode in modes))
        rows = [
            (
                row["stratum"],
                str(row["n"]),
                *(f"{percent(row['modes'][m]['teacher'])} / {percent(row['modes'][m]['student'])}" for m in modes),
            )
            for row in task["strata"]["rows"]
        ]
        parts += [f"### {_inline(task['name'])}", _table(headers, rows)]
    return ["## By stratum", "Accuracy in percent, exploratory.", *parts] if parts else []


def _probe_section(probe: dict[str, Any] | None) -> list[str]:
    """How near a converted student's layers are to its teacher's, where its checkpoint says so."""
    if probe is None:
        return []
    table = [_table(PROBE_HEADERS, probe_rows(probe), left=0)] if probe["layers"] else []
    return ["## Layer probe", _inline(probe_sentence(probe)), *table]


def _provenance(result: dict[str, Any]) -> str:
    out = []
    for who in ("teacher", "student"):
        model = result[who]
        size = f"{model['parameters'] / 1e6:,.1f}M parameters, " if model["parameters"] else ""
        made = f" Made as: {model['note']}." if model["note"] else ""
        out.append(
            f"* {who.capitalize()}: {_inline(model['name'])}, {size}{model['dtype']} on {model['device']}, "
            f"fingerprint `{model['fingerprint']}`.{_inline(made)}"
        )
    settings = {name: value for name, value in result["settings"].items() if value not in (None, "", False)}
    told = ", ".join(f"{name} {', '.join(v) if isinstance(v, list) else v}" for name, v in settings.items())
    out.append(f"* Settings: {_inline(told)}.")
    tasks = [f"{t['name']} (version {t['version']}, {t['n']} items, {t['shots']} shots)" for t in result["tasks"]]
    out.append(f"* Tasks: {_inline('; '.join(tasks))}.")
    versions = result["teacher"]["versions"]
    out.append(f"* Software: {', '.join(f'{name} {version}' for name, version in versions.items())}.")
    return "\n".join(out)
