"""Baselines: what a gate needs of a run, small enough for git (about 20 bytes an item)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from evalkit.records import MODES, VERDICTS, ItemRecord, Mode, TaskEntry
from evalkit.settings import Settings
from evalkit.stats.floors import has_signal
from evalkit.store import MANIFEST, Run, read_run, write_text

SCHEMA: Literal["evalkit.baseline/1"] = "evalkit.baseline/1"
LETTERS = {verdict: verdict[0] for verdict in VERDICTS}
"""correct, wrong, unparsed, ambiguous, truncated, empty: one letter an item."""
HASH = 8
"""Hexadecimal digits kept of each prompt's hash: two prompts pass for one in 4 of a thousand million."""
assert len(set(LETTERS.values())) == len(VERDICTS)


class BaselineTask(BaseModel):
    """One task; the strings hold something of every item, in the order of ``items``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    entry: TaskEntry
    items: tuple[str, ...]
    prompts: str
    """The first 8 digits of each item's prompt hash."""
    golds: tuple[int, ...]
    outcomes: dict[Mode, str]
    """One letter an item."""
    signal: dict[Mode, bool]

    def prompt(self, at: int) -> str:
        return self.prompts[HASH * at : HASH * (at + 1)]


class Baseline(BaseModel):
    """A baseline file, or the same made of a run in memory."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["evalkit.baseline/1"] = SCHEMA
    name: str
    fingerprint: str
    parts: dict[str, str]
    dtype: str
    settings: Settings
    versions: dict[str, str]
    anchor: bool = False
    """Pinned: `evalkit baseline update` never writes over it."""
    tasks: tuple[BaselineTask, ...]

    def task(self, name: str) -> BaselineTask:
        return next(task for task in self.tasks if task.entry.name == name)


def baseline_of(run: Run, anchor: bool = False) -> Baseline:
    model = run.manifest.model
    return Baseline(
        name=model.name,
        fingerprint=model.fingerprint,
        parts=model.parts,
        dtype=model.dtype,
        settings=run.manifest.settings,
        versions=run.manifest.versions,
        anchor=anchor,
        tasks=tuple(_task(run, name) for name in run.tasks),
    )


def _task(run: Run, name: str) -> BaselineTask:
    entry, records = run.manifest.entry(name), list(run.records(name).values())
    modes = [mode for mode in MODES if mode in run.manifest.settings.modes]
    for mode in modes:
        if not any(outcome.mode == mode for record in records for outcome in record.outcomes):
            raise ValueError(
                f"task {name} of the run of {run.manifest.model.name} has no {mode} outcomes, as its other tasks have, "
                f"so they can't be gated together; import the tasks of each mode as a run of its own (--tasks)"
            )
    return BaselineTask(
        entry=entry,
        items=tuple(record.item for record in records),
        prompts="".join(record.prompt_sha256[:HASH].ljust(HASH) for record in records),
        golds=tuple(record.gold for record in records),
        outcomes={mode: _letters(records, entry, mode) for mode in modes},
        signal={mode: has_signal(records, entry, mode) for mode in modes},
    )


def _letters(records: Sequence[ItemRecord], entry: TaskEntry, mode: Mode) -> str:
    letters = []
    for record in records:
        outcome = record.outcome(mode, entry.view(mode))
        if outcome is None:
            raise ValueError(f"{entry.name}: item {record.item} has no {mode} outcome in view {entry.view(mode)!r}")
        letters.append(LETTERS[outcome.outcome])
    return "".join(letters)


def read_baseline(path: Path) -> Baseline:
    """A run's folder or a baseline file; ValueError says what is wrong with it."""
    if path.is_dir():
        if not (path / MANIFEST).exists():
            raise ValueError(
                f"{path} is no baseline: a folder without {MANIFEST}; give a run's folder or a baseline file"
            )
        return baseline_of(read_run(path))
    if not path.exists():
        raise ValueError(f"there is no baseline {path}; make one: evalkit baseline update RUN --file {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{path} has the schema {schema!r}; this evalkit reads {SCHEMA!r}")
        made = Baseline.model_validate({"schema_": found.pop("schema"), **found})
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise ValueError(f"{path} is no baseline, or damaged: {' '.join(str(error).split())[:200]}") from error
    for task in made.tasks:
        n = len(task.items)
        lengths = [len(task.golds), len(task.prompts) // HASH, *map(len, task.outcomes.values())]
        if set(lengths) != {n} or set("".join(task.outcomes.values())) - set(LETTERS.values()):
            raise ValueError(f"{path} is damaged: task {task.entry.name!r} has {n} items and figures for {lengths}")
    return made


def update_baseline(run: Run, file: Path, anchor: bool) -> Baseline:
    """Write ``run`` as the baseline ``file``; an anchor, or a file that is no baseline, is never written over."""
    if file.is_dir():
        raise ValueError(f"{file} is a folder; name a file for the baseline, e.g. {file / 'baseline.json'}")
    if file.exists():
        old = read_baseline(file)
        if old.anchor:
            raise ValueError(f"{file} is a pinned anchor ({old.name}) and is never moved; give another --file")
    made = baseline_of(run, anchor)
    content = made.model_dump(mode="json")
    content = {"schema": content.pop("schema_"), **content}
    # A line a task: a changed task is one line in a diff.
    tasks = ",\n".join(json.dumps(task, ensure_ascii=False, separators=(",", ":")) for task in content.pop("tasks"))
    head = json.dumps(content, ensure_ascii=False, indent=1)[:-2]
    write_text(file, f'{head},\n "tasks": [\n{tasks}\n]\n}}\n')
    return made
