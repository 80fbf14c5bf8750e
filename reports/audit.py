"""The extractor's error, from labels that a person gives without knowing the model or what was extracted.

`draw` takes a stratified sample of both models' replies: strata are task x model x outcome, because the rare outcomes
(unparsed, ambiguous) are where extraction errs. What is shown is question, options and reply, in an order that tells
nothing; which model said it and what was read from it stays in the key. `score` joins labels and key again.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit.records import GENERATION, VERDICTS, ItemRecord, Outcome, Verdict
from evalkit.selection import digest
from evalkit.stats.intervals import Interval
from evalkit.stats.stratified import Stratum, shifted, stratified_rate
from evalkit.store import Run, write_json, write_lines, write_text
from evalkit.views import labels
from reports.cells import inline, table_of
from reports.compare import Comparison
from reports.table import percent, signed

SCHEMA = "evalkit.audit/1"
SHEETS = {"csv": "audit.csv", "jsonl": "audit.jsonl"}
"""The sheet to label, for a spreadsheet or for a script."""
KEY, RESULT = "audit.key.json", "audit.json"
COLUMNS = ("id", "question", "options", "reply", "label")
OTHER, NONE = "other", "none"
"""Labels beside an option's letter: another answer than any option; no answer, or more than one."""
WHO = ("teacher", "student")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One reply that may be drawn."""

    task: str
    who: str
    record: ItemRecord
    outcome: Outcome

    @property
    def stratum(self) -> str:
        return f"{self.task} · {self.who} · {self.outcome.outcome}"

    def key(self, seed: int) -> str:
        """Opaque, and the order of the sheet."""
        return f"{digest('audit', seed, self.task, self.who, self.record.item):016x}"[:12]


def draw(teacher: Run, student: Run, n: int, seed: int = 0) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """(rows of the sheet, the key). ``n`` replies: every stratum gets an equal share, as far as it has them; the same
    seed draws the same ones. ValueError: the runs hold no replies, or can't be compared."""
    made = Comparison(teacher, student)
    replies = [
        Reply(task=name, who=who, record=record, outcome=outcome)
        for name in made.tasks
        for who, run in zip(WHO, (teacher, student), strict=True)
        for item, record in run.records(name).items()
        if item in teacher.records(name)
        and item in student.records(name)
        and (outcome := record.outcome(GENERATION, run.manifest.entry(name).generation)) is not None
    ]
    if not replies:
        raise ValueError("the runs hold no generated replies to audit; score them with --mode both")
    strata: dict[str, list[Reply]] = {}
    for reply in replies:
        strata.setdefault(reply.stratum, []).append(reply)
    taken = _shares({name: len(found) for name, found in strata.items()}, n)
    chosen = [
        reply
        for name, found in strata.items()
        for reply in sorted(found, key=lambda reply: reply.key(seed))[: taken[name]]
    ]
    chosen.sort(key=lambda reply: reply.key(seed))
    key = {
        "schema": SCHEMA,
        "seed": seed,
        "models": {who: run.manifest.model.name for who, run in zip(WHO, (teacher, student), strict=True)},
        "fingerprints": {who: run.manifest.model.fingerprint for who, run in zip(WHO, (teacher, student), strict=True)},
        "gaps": {
            task["name"]: task["modes"][GENERATION]["gap"]
            for task in made.result["tasks"]
            if GENERATION in task["modes"]
        },
        "strata": {name: len(found) for name, found in strata.items()},
        "replies": {
            reply.key(seed): {
                "task": reply.task,
                "who": reply.who,
                "item": reply.record.item,
                "outcome": reply.outcome.outcome,
                "stratum": reply.stratum,
                "gold": [labels(len(reply.record.choices))[i] for i in _golds(reply.record)],
                "options": len(reply.record.choices),
            }
            for reply in chosen
        },
    }
    return [_row(reply, seed) for reply in chosen], key


def _golds(record: ItemRecord) -> list[int]:
    """Options of a right one's text are as right as it is."""
    return [i for i, choice in enumerate(record.choices) if choice in record.answers]


def _shares(sizes: dict[str, int], n: int) -> dict[str, int]:
    """How many of each stratum: equal shares, and what small strata can't use goes to the others."""
    taken = dict.fromkeys(sizes, 0)
    left = min(n, sum(sizes.values()))
    while left:
        open_ = sorted((name for name in sizes if taken[name] < sizes[name]), key=lambda name: (taken[name], name))
        for name in open_[:left]:
            taken[name] += 1
        left -= min(left, len(open_))
    return taken


def _row(reply: Reply, seed: int) -> dict[str, str]:
    record, outcome = reply.record, reply.outcome
    options = zip(labels(len(record.choices)), record.choices, strict=True)
    return {
        "id": reply.key(seed),
        "question": record.prompts.get(outcome.view, ""),
        "options": "\n".join(f"{label}. {choice}" for label, choice in options),
        "reply": outcome.reply,
        "label": "",
    }


def save_sheet(folder: Path, rows: Sequence[dict[str, str]], key: dict[str, Any], form: str = "csv") -> Path:
    """Write the sheet, which is returned, and audit.key.json; a sheet that is there may hold somebody's labels and is
    never written over."""
    for name in (*SHEETS.values(), KEY):
        if (folder / name).exists():
            raise ValueError(f"{folder / name} exists and may hold labels; give another --out, or remove it")
    write_json(folder / KEY, key)
    sheet = folder / SHEETS[form]
    if form == "jsonl":
        write_lines(sheet, rows)
        return sheet
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    write_text(sheet, text.getvalue())
    return sheet


def _cell(text: str) -> str:
    """A spreadsheet must show a reply that begins like a formula, not run it."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def read_labels(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """(id -> label, the key); ValueError names file, line and what is wrong. Rows without a label are left out."""
    sheets = [folder / name for name in SHEETS.values() if (folder / name).exists()]
    for name, there in ((SHEETS["csv"], bool(sheets)), (KEY, (folder / KEY).exists())):
        if not there:
            raise ValueError(
                f"{folder} has no {name}; draw a sample first: evalkit audit TEACHER STUDENT --out {folder}"
            )
    if len(sheets) > 1:
        raise ValueError(f"{folder} holds {' and '.join(SHEETS.values())}; remove the one without labels")
    try:
        key = json.loads((folder / KEY).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / KEY} is damaged: {error}") from error
    if not isinstance(key, dict) or key.get("schema") != SCHEMA:
        raise ValueError(f"{folder / KEY} is not an audit's key with the schema {SCHEMA!r}")
    found: dict[str, str] = {}
    seen: set[str] = set()
    for where, row in _sheet_rows(sheets[0]):
        told = key["replies"].get(row["id"])
        if told is None:
            raise ValueError(f"{where}: id {row['id']!r} is not in {KEY}; was it changed?")
        if row["id"] in seen:
            raise ValueError(f"{where}: id {row['id']!r} stands there twice")
        seen.add(row["id"])
        label = str(row["label"] or "").strip()
        if label:
            found[row["id"]] = _label(label, told["options"], where)
    if not found:
        raise ValueError(f"{sheets[0]} holds no label yet; write an option's letter, 'other' or 'none' in 'label'")
    return found, key


def _sheet_rows(sheet: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, the row with its id and its label)."""
    with open(sheet, encoding="utf-8-sig", newline="") as file:  # a spreadsheet may have added the mark
        if sheet.name == SHEETS["jsonl"]:
            for number, line in enumerate(file, 1):
                where = f"{sheet}, line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: no JSON ({error})") from error
                if not isinstance(row, dict) or not isinstance(row.get("id"), str) or "label" not in row:
                    raise ValueError(f"{where}: needs the fields 'id' and 'label'")
                yield where, row
            return
        reader = csv.DictReader(file)
        if not {"id", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{sheet} needs the columns 'id' and 'label'; it has {reader.fieldnames}")
        for row in reader:
            yield f"{sheet}, line {reader.line_num}", row


def _label(label: str, options: int, where: str) -> str:
    if label.lower() in (OTHER, NONE):
        return label.lower()
    known = labels(options)
    if label.upper() not in known:
        raise ValueError(f"{where}: label {label!r} is none of {', '.join(known)}, 'other' or 'none'")
    return label.upper()


def score(found: dict[str, str], key: dict[str, Any]) -> dict[str, Any]:
    """Extraction error and corrected accuracy of each model, and the corrected gap, task by task."""
    tasks = []
    for name, gap in key["gaps"].items():
        models: dict[str, Any] = {}
        corrections = {}
        for who in WHO:
            rows = [
                (told["outcome"], found[at] in told["gold"])
                for at, told in key["replies"].items()
                if at in found and told["task"] == name and told["who"] == who
            ]
            sizes = {v: key["strata"].get(f"{name} · {who} · {v}", 0) for v in VERDICTS}
            error = _rate(sizes, rows, lambda outcome, right: (outcome == "correct") != right)
            missed = _rate(sizes, rows, lambda outcome, right: outcome != "correct" and right)
            false = _rate(sizes, rows, lambda outcome, right: outcome == "correct" and not right)
            accuracy = _rate(sizes, rows, lambda outcome, right: right)
            corrections[who] = (missed, false)
            models[who] = {
                "labelled": len(rows),
                "replies": sum(sizes.values()),
                "error": _plain(error),
                "missed": _plain(missed),
                "credited": _plain(false),
                "accuracy": sizes["correct"] / max(1, sum(sizes.values())),
                "corrected": _plain(accuracy),
            }
        seen = Interval(mean=gap["mean"], low=gap["ci95"][0], high=gap["ci95"][1], n=0)
        # corrected accuracy = accuracy + missed - credited, for each model
        (t_missed, t_false), (s_missed, s_false) = (corrections[who] for who in WHO)
        corrected = shifted(shifted(seen, t_missed, t_false), s_false, s_missed)
        tasks.append({"name": name, "models": models, "gap": gap, "corrected_gap": _plain(corrected)})
    return {
        "schema": SCHEMA,
        "models": key["models"],
        "labelled": len(found),
        "drawn": len(key["replies"]),
        "tasks": tasks,
    }


def _rate(sizes: Mapping[Verdict, int], rows: Sequence[tuple[str, bool]], hit: Callable[[str, bool], bool]) -> Interval:
    strata = []
    for outcome, size in sizes.items():
        own = [right for kind, right in rows if kind == outcome]
        if not size:
            continue
        # What can't be a hit in this stratum needs no label to be known.
        possible = hit(outcome, True) or hit(outcome, False)
        if possible:
            strata.append(Stratum(population=size, sampled=len(own), hits=sum(hit(outcome, right) for right in own)))
        else:
            strata.append(Stratum(population=size, sampled=size, hits=0))
    return stratified_rate(strata)


def _plain(interval: Interval) -> dict[str, Any]:
    return {"mean": interval.mean, "ci95": [interval.low, interval.high]}


def audit_markdown(result: dict[str, Any]) -> str:
    rows = []
    for task in result["tasks"]:
        for who in WHO:
            cell = task["models"][who]
            rows.append(
                (
                    task["name"],
                    f"{who} ({result['models'][who]})",
                    f"{cell['labelled']} of {cell['replies']}",
                    *(_figure(cell[name]) for name in ("error", "missed", "credited")),
                    percent(cell["accuracy"]),
                    _figure(cell["corrected"]),
                )
            )
    gaps = [(task["name"], signed(task["gap"]), signed(task["corrected_gap"])) for task in result["tasks"]]
    note = (
        "Percent of all replies [95 % interval], estimated from the labelled ones, stratified by outcome. Missed: "
        "right by the label, not by extraction; credited: the reverse. The corrected gap's interval holds the doubt of "
        "items and of labels."
    )
    headers = ("Task", "Model", "Labelled", "Error", "Missed", "Credited", "Accuracy", "Corrected")
    parts = [
        "# Audit of the extraction",
        f"{result['labelled']} of {result['drawn']} drawn replies are labelled.",
        table_of(headers, rows, left=2),
        inline(note),
        "## Gap by generation",
        table_of(("Task", "As extracted", "Corrected"), gaps),
    ]
    return "\n\n".join(parts) + "\n"


def _figure(cell: dict[str, Any]) -> str:
    low, high = cell["ci95"]
    return f"{percent(cell['mean'])} [{percent(low)}, {percent(high)}]"
