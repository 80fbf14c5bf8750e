"""What `evalkit check` writes: check.json, check.md (a job's summary) and junit.xml; and margins from YAML."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml
from pydantic import ValidationError

from evalkit.stats.intervals import wilson
from evalkit.store import Run, write_json, write_text
from reports.baseline import baseline_of
from reports.cells import inline, table_of
from reports.gate import Margins, Verdict, exit_code, losses_of, sentence
from reports.table import NAMES, percent
from reports.why_markdown import p_value

SCHEMA = "evalkit.check/1"
CALIBRATION = "evalkit.calibration/1"


def read_margins(path: Path | None, flags: dict[str, Any]) -> Margins:
    """From a YAML file, with the flags that were given (None: not) on top; ValueError names file and field."""
    found: dict[str, Any] = {}
    if path is not None:
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} holds a {type(found).__name__}; expected fields such as 'alpha: 0.05'")
    points = {name: value for name in ("loglikelihood", "generation") if (value := flags.get(name)) is not None}
    rest = {name: value for name in ("alpha", "guardrail") if (value := flags.get(name)) is not None}
    own = found.get("margins", {})
    if isinstance(own, dict):
        found["margins"] = {**own, **points}
    try:
        return Margins.model_validate({**found, **rest})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        where = str(path) if path is not None else "the flags"
        raise ValueError(f"{where}: field {field!r} is {first['input']!r}: {first['msg'].lower()}") from error


def check_json(new: Run, verdicts: Sequence[Verdict], margins: Margins) -> dict[str, Any]:
    """Every figure a fraction, margins too (``settings`` holds them in points, as given)."""
    model = new.manifest.model
    return {
        "schema": SCHEMA,
        "exit_code": exit_code(verdicts),
        "new": {"name": model.name, "fingerprint": model.fingerprint},
        "settings": margins.model_dump(mode="json"),
        "verdicts": [{**asdict(verdict), "sentence": sentence(verdict)} for verdict in verdicts],
    }


def check_markdown(new: Run, verdicts: Sequence[Verdict]) -> str:
    parts = [f"# Check of {inline(new.manifest.model.name)}"]
    for verdict in verdicts:
        parts += [f"## Against {inline(verdict.baseline)}{' (anchor)' if verdict.anchor else ''}", _mark(verdict)]
        level = f"{100 * verdict.level:g} % interval"
        if verdict.primaries:
            rows: list[tuple[str, ...]] = [
                (NAMES[one.mode], _points(one), f"{100 * one.margin:g}", one.decision, _needed(one.needed), _left(one))
                for one in verdict.primaries
            ]
            headers = ("Primary", f"Loss [{level}]", "Margin", "Verdict", "Items needed", "Left out, no signal")
            parts.append(table_of(headers, rows))
        if verdict.guardrails:
            rows = [
                (one.task, NAMES[one.mode], _points(one), f"{100 * one.margin:g}", p_value(one.p), _broken(one.failed))
                for one in verdict.guardrails
            ]
            parts.append(table_of(("Guardrail", "Mode", f"Loss [{level}]", "Margin", "Holm p", ""), rows, left=2))
        parts += [f"* {inline(note)}" for note in verdict.notes]
    parts.append("Loss: the baseline's accuracy minus the new model's on the same items, in points; macro over tasks.")
    return "\n\n".join(parts) + "\n"


def _mark(verdict: Verdict) -> str:
    return f"**{inline(sentence(verdict))}**"


def _points(one: Any) -> str:
    return f"{100 * one.loss.mean:+.1f} [{100 * one.loss.low:+.1f}, {100 * one.loss.high:+.1f}]"


def _needed(needed: int | None) -> str:
    return "–" if needed is None else f"{needed:,}"


def _left(one: Any) -> str:
    return ", ".join(one.left_out) or "–"


def _broken(failed: bool) -> str:
    return "failed" if failed else "held"


def junit(verdicts: Sequence[Verdict]) -> str:
    """One suite a baseline; a test for comparability, for each primary, and for each guardrail. Whatever keeps the gate
    from passing is a failure or an error, never skipped."""
    root = ElementTree.Element("testsuites", name="evalkit check")
    for verdict in verdicts:
        suite = ElementTree.SubElement(root, "testsuite", name=f"against {verdict.baseline}")
        counts = {"tests": 0, "failures": 0, "errors": 0}

        def case(kind: str, name: str, tag: str = "", why: str = "", text: str = "") -> None:
            found = ElementTree.SubElement(suite, "testcase", classname=f"evalkit.{kind}", name=name)  # noqa: B023
            counts["tests"] += 1  # noqa: B023
            if tag:
                counts[f"{tag}s"] += 1  # noqa: B023
                ElementTree.SubElement(found, tag, type=why, message=text)

        case("gate", "comparable", "error" if verdict.reasons else "", "not comparable", "; ".join(verdict.reasons))
        for one in verdict.primaries:
            bad = "failure" if one.decision in ("regression", "inconclusive") else ""
            case("primary", one.mode, bad, one.decision, f"loss {_points(one)} points, margin {100 * one.margin:g}")
        for guard in verdict.guardrails:
            bad = "failure" if guard.failed else ""
            text = f"loss {_points(guard)} points, guardrail {100 * guard.margin:g}"
            case("guardrail", f"{guard.task} by {guard.mode}", bad, "regression", text)
        suite.attrib.update({name: str(count) for name, count in counts.items()})
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def save_check(folder: Path, new: Run, verdicts: Sequence[Verdict], margins: Margins) -> None:
    write_json(folder / "check.json", check_json(new, verdicts, margins))
    write_text(folder / "check.md", check_markdown(new, verdicts))
    write_text(folder / "junit.xml", junit(verdicts))


def calibration(again: Run, first: Run) -> dict[str, Any]:
    """How often one and the same model answers otherwise when only the batch size or the engine differs.

    ValueError: the runs are of two models, or of other items.
    """
    one, two = first.manifest.model, again.manifest.model
    if one.fingerprint != two.fingerprint:
        raise ValueError(
            f"--calibrate compares a model with itself, but the runs are of {one.name} ({one.fingerprint}) and "
            f"{two.name} ({two.fingerprint})"
        )
    base = baseline_of(first)
    rows = []
    for task in base.tasks:
        if task.entry.name not in again.tasks or set(again.records(task.entry.name)) != set(task.items):
            raise ValueError(f"--calibrate needs the same items; task {task.entry.name!r} is missing or has others")
        for mode in task.outcomes:
            losses = losses_of(again, task, mode)
            rate = wilson(losses.lost + losses.gained, losses.n)
            rows.append(
                {
                    "task": task.entry.name,
                    "mode": mode,
                    "n": losses.n,
                    "lost": losses.lost,
                    "gained": losses.gained,
                    "flips": rate.mean,
                    "ci95": [rate.low, rate.high],
                }
            )
    return {
        "schema": CALIBRATION,
        "model": {"name": one.name, "fingerprint": one.fingerprint},
        "sessions": [_how(first), _how(again)],
        "cells": rows,
    }


def _how(run: Run) -> dict[str, Any]:
    last = run.manifest.sessions[-1] if run.manifest.sessions else {}
    return {key: last.get(key) for key in ("engine", "batch_size", "device", "head")}


def calibration_markdown(result: dict[str, Any]) -> str:
    rows = [
        (
            cell["task"],
            NAMES[cell["mode"]],
            str(cell["n"]),
            str(cell["lost"]),
            str(cell["gained"]),
            f"{percent(cell['flips'])} [{percent(cell['ci95'][0])}, {percent(cell['ci95'][1])}]",
        )
        for cell in result["cells"]
    ]
    how = " against ".join(
        ", ".join(f"{key} {value}" for key, value in session.items() if value is not None) or "unknown"
        for session in result["sessions"]
    )
    note = (
        "Right once and wrong once, in percent of the items [95 % Wilson interval]: a difference smaller than this "
        "need not be one of models."
    )
    head = f"# Flip floor of {inline(result['model']['name'])} against itself"
    headers = ("Task", "Mode", "n", "Lost", "Gained", "Flips")
    return "\n\n".join([head, inline(how) + ".", table_of(headers, rows, left=2), note]) + "\n"
