"""Several runs, item by item: the scores of K checkpoints in both modes on the items that all of them answered."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evalkit.records import GENERATION, LOGLIKELIHOOD, MODES, NORMALISATIONS, ItemRecord, Mode, Outcome, TaskEntry
from evalkit.scoring import can_normalise, decide
from evalkit.selection import digest
from evalkit.stats.floors import has_signal
from evalkit.store import Run

PRIMARY = "primary"
"""Each task's declared normalisation, where several tasks are averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One of the models that are ranked."""

    label: str
    """The run's folder, or the model's name; unique."""
    recipe: str
    """recipe_sha256, or "" where the run doesn't say."""
    stage: str
    tokens: int | None
    """Trained on so many; None: not said."""
    seed: int | None

    @property
    def trajectory(self) -> object:
        """Checkpoints of one training run share it; one that doesn't say stands alone."""
        return (self.recipe, self.seed) if self.recipe else self.label


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One task: right (1) or not (0) for each of K checkpoints and n items."""

    entry: TaskEntry
    loglikelihood: dict[str, np.ndarray]
    """Normalisation -> [K, n]."""
    generation: np.ndarray
    """[K, n]"""
    items: tuple[str, ...]
    clusters: tuple[str, ...]
    signal: bool
    """At least one checkpoint is above its floor, in each mode."""

    def by(self, kind: str) -> np.ndarray:
        """Log-likelihood under ``kind``; PRIMARY: as the task declares."""
        return self.loglikelihood[self.entry.normalisation if kind == PRIMARY else kind]

    @property
    def primary(self) -> np.ndarray:
        return self.by(PRIMARY)

    def half(self, first: bool) -> np.ndarray:
        """Which items belong to the first half, by hash of the cluster; where normalisations are chosen."""
        sides = [digest("normalisation", self.entry.name, cluster) % 2 == 0 for cluster in self.clusters]
        return np.array([side == first for side in sides])


def checkpoints(runs: Sequence[Run]) -> list[Checkpoint]:
    """Who is ranked; ValueError: one run alone, or a run of one mode."""
    if len(runs) < 2:
        raise ValueError(
            f"rank needs at least 2 runs and got {len(runs)} ({', '.join(map(_name, runs))}); give one of each "
            "checkpoint"
        )
    for run in runs:
        lacking = [mode for mode in MODES if mode not in run.manifest.settings.modes]
        if lacking:
            raise ValueError(f"run {_name(run)} was not scored by {lacking[0]}; score it again with --mode both")
    found, taken = [], Counter(map(_name, runs))
    for at, run in enumerate(runs, 1):
        told = run.manifest.checkpoint or {}
        label = _name(run) if taken[_name(run)] == 1 else f"{_name(run)} ({at})"
        found.append(
            Checkpoint(
                label=label,
                recipe=str(told.get("recipe_sha256") or ""),
                stage=str(told.get("stage") or ""),
                tokens=_whole(told, "tokens", label),
                seed=_whole(told, "seed", label),
            )
        )
    return found


def _name(run: Run) -> str:
    return run.path.name if run.path is not None else run.manifest.model.name


def _whole(told: dict[str, Any], field: str, label: str) -> int | None:
    value: Any = told.get(field)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ValueError(f"run {label}: its checkpoint's {field!r} is {value!r}, not a whole number; correct run.json")
    return None if value is None else int(value)


def scores(runs: Sequence[Run], labels: Sequence[str], name: str) -> Scores:
    """Task ``name`` in all runs; ValueError where they were asked different things."""
    entry = runs[0].manifest.entry(name)
    first = runs[0].manifest.settings.model_dump()
    for run, label in zip(runs[1:], labels[1:], strict=True):
        other = run.manifest.settings.model_dump()
        different = [f"{key} ({first[key]!r} against {other[key]!r})" for key in first if first[key] != other[key]]
        own = run.manifest.entry(name)
        for field in ("version", "loglikelihood", "generation", "normalisation", "shots"):
            if getattr(own, field) != getattr(entry, field):
                different.append(f"{name}'s {field} ({getattr(entry, field)!r} against {getattr(own, field)!r})")
        if different:
            raise ValueError(f"runs {labels[0]} and {label} can't be ranked together: {'; '.join(different)}")
    records = [run.records(name) for run in runs]
    items = sorted(set.intersection(*map(set, records)))
    if not items:
        raise ValueError(f"task {name!r}: the runs have no item in common; score them with the same --limit")
    for item in items:
        for label, own_records in zip(labels, records, strict=True):
            if own_records[item].choices != records[0][item].choices or own_records[item].gold != records[0][item].gold:
                raise ValueError(
                    f"task {name!r}: item {item} has other choices in {labels[0]} and {label}; run one of them again"
                )
    rows = [[own[item] for item in items] for own in records]
    return Scores(
        entry=entry,
        loglikelihood={
            kind: np.array([[_right(record, entry, kind) for record in row] for row in rows], dtype=float)
            for kind in NORMALISATIONS
            if all(can_normalise(_ll(record, entry), kind) for row in rows for record in row)
        },
        generation=np.array([[_said_right(record, entry) for record in row] for row in rows], dtype=float),
        items=tuple(items),
        clusters=tuple(record.cluster or record.item for record in rows[0]),
        signal=all(_any_signal(rows, runs, name, mode) for mode in MODES),
    )


def _any_signal(rows: Sequence[Sequence[ItemRecord]], runs: Sequence[Run], name: str, mode: Mode) -> bool:
    return any(has_signal(row, run.manifest.entry(name), mode) for row, run in zip(rows, runs, strict=True))


def _ll(record: ItemRecord, entry: TaskEntry) -> Outcome:
    found = record.outcome(LOGLIKELIHOOD, entry.loglikelihood)
    if found is None:
        raise ValueError(f"{entry.name}: item {record.item} has no log-likelihood in view {entry.loglikelihood!r}")
    return found


def _right(record: ItemRecord, entry: TaskEntry, kind: Any) -> bool:
    outcome = _ll(record, entry)
    if kind != entry.normalisation:
        outcome = decide(outcome, record.gold, record.choices, kind, record.also)
    return outcome.outcome == "correct"


def _said_right(record: ItemRecord, entry: TaskEntry) -> bool:
    outcome = record.outcome(GENERATION, entry.generation)
    if outcome is None:
        raise ValueError(f"{entry.name}: item {record.item} has no reply in view {entry.generation!r}")
    return outcome.outcome == "correct"


def part(task: Scores, keep: np.ndarray) -> Scores:
    """``task`` on the items that ``keep`` marks."""
    return replace(
        task,
        loglikelihood={kind: values[:, keep] for kind, values in task.loglikelihood.items()},
        generation=task.generation[:, keep],
        items=tuple(item for item, kept in zip(task.items, keep, strict=True) if kept),
        clusters=tuple(cluster for cluster, kept in zip(task.clusters, keep, strict=True) if kept),
    )
