"""The gate: is a new model no worse than a baseline on the same items? Margins in, a verdict out; no files.

It passes on the pre-declared primaries alone: the equal-weight average loss by log-likelihood and by generation, both
below their margins. Single tasks are guardrails, which fail only on proof (Holm's, over all of them) of a loss above
the guardrail: asking each of ten tasks of 1,000 items to pass at 2 points would fail identical models 99 times of 100.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from evalkit.records import MODES, Mode
from evalkit.stats.intervals import Interval
from evalkit.stats.noninferiority import Decision, Losses, average, decide, items_needed, p_above
from evalkit.stats.paired_tests import holm
from evalkit.store import Run
from reports.baseline import HASH, LETTERS, Baseline, BaselineTask
from reports.table import NAMES

Result = Literal["pass", "regression", "inconclusive", "not comparable"]
EXIT: dict[Result, int] = {"pass": 0, "regression": 1, "inconclusive": 3, "not comparable": 3}
"""2 is wrong usage or input, as everywhere."""


Points = Annotated[float, Field(gt=0, lt=100)]


class ModeMargins(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    loglikelihood: Points = 2.0
    generation: Points = 2.0


class Margins(BaseModel):
    """How much worse is tolerable; points of accuracy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Intervals are of level 1 - 2 alpha."""
    margins: ModeMargins = ModeMargins()
    """Of the primaries."""
    guardrail: Points = 5.0
    """Of every single task, in each mode."""
    guardrails: dict[str, Points] = {}
    """Of tasks that need another one, by name."""
    primaries: Annotated[tuple[Mode, ...], Field(min_length=1)] = MODES


@dataclass(frozen=True, slots=True, kw_only=True)
class Primary:
    mode: Mode
    margin: float
    """Fraction, as all figures here."""
    loss: Interval
    decision: Decision
    p: float
    """Of no loss, one-sided, after Holm over the primaries."""
    needed: int | None
    """Items at which the verdict would be clear; None where it is, or where no number would do."""
    tasks: tuple[str, ...]
    left_out: tuple[str, ...]
    """Without signal in the baseline: a drop there could not be seen, and would only thin the average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guardrail:
    task: str
    mode: Mode
    margin: float
    loss: Interval
    p: float
    """Of a loss of at most the margin, one-sided, after Holm over all guardrails."""
    failed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one baseline says of the new model."""

    result: Result
    baseline: str
    anchor: bool
    level: float
    reasons: tuple[str, ...] = ()
    """Why the two are not comparable."""
    primaries: tuple[Primary, ...] = ()
    guardrails: tuple[Guardrail, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return EXIT[self.result]


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """A proven regression comes first; then whatever keeps the gate from passing."""
    codes = {verdict.exit_code for verdict in verdicts}
    return 1 if 1 in codes else 3 if 3 in codes or not codes else 0


def gate(new: Run, baseline: Baseline, margins: Margins) -> Verdict:
    level = 1 - 2 * margins.alpha
    reasons, notes = differences(new, baseline, margins)
    told: dict[str, Any] = {"baseline": baseline.name, "anchor": baseline.anchor, "level": level, "notes": notes}
    if reasons:
        return Verdict(result="not comparable", reasons=reasons, **told)
    losses = {
        (task.entry.name, mode): losses_of(new, task, mode)
        for task in baseline.tasks
        for mode in MODES
        if mode in baseline.settings.modes
    }
    primaries = _primaries(baseline, losses, margins, level)
    blind = [mode for mode in margins.primaries if not any(task.signal[mode] for task in baseline.tasks)]
    guardrails = _guardrails(losses, margins, level)
    result: Result = "pass"
    if any(one.decision == "regression" for one in primaries) or any(one.failed for one in guardrails):
        result = "regression"
    elif blind:
        told["reasons"] = tuple(
            f"no task of the baseline is above its floor by {mode}, so a loss could not be seen" for mode in blind
        )
        result = "not comparable"
    elif any(one.decision == "inconclusive" for one in primaries):
        result = "inconclusive"
    return Verdict(result=result, primaries=primaries, guardrails=guardrails, **told)


def differences(new: Run, baseline: Baseline, margins: Margins) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what forbids a comparison, what a reader should know)."""
    one, two = baseline.settings.model_dump(), new.manifest.settings.model_dump()
    found = [f"setting {key} ({one[key]!r} in the baseline, now {two[key]!r})" for key in one if one[key] != two[key]]
    before, now = baseline.versions.get("evalkit"), new.manifest.versions.get("evalkit")
    if before != now:
        found.append(f"evalkit ({before} in the baseline, now {now}: its rules may read replies differently)")
    for mode in margins.primaries:
        if mode not in baseline.settings.modes:
            found.append(f"the primary {mode} was not scored")
    for name in margins.guardrails:
        if all(task.entry.name != name for task in baseline.tasks):
            found.append(f"the guardrail's task {name!r} is not in the baseline")
    for task in baseline.tasks:
        if task.entry.name not in new.tasks:
            found.append(f"task {task.entry.name!r} is missing")
        else:
            found += _task_differences(new, baseline, task)
    known = {task.entry.name for task in baseline.tasks}
    notes = [f"Task {name!r} is not in the baseline and was not checked." for name in new.tasks if name not in known]
    if baseline.dtype != new.manifest.model.dtype:
        notes.append(f"The baseline was scored in {baseline.dtype}, the new model in {new.manifest.model.dtype}.")
    if baseline.fingerprint == new.manifest.model.fingerprint:
        notes.append("The new model is the baseline's model.")
    return tuple(found), tuple(notes)


def _task_differences(new: Run, baseline: Baseline, task: BaselineTask) -> list[str]:
    name, entry, records = task.entry.name, new.manifest.entry(task.entry.name), new.records(task.entry.name)
    found = [
        f"{name}: {field} ({getattr(task.entry, field)!r} in the baseline, now {getattr(entry, field)!r})"
        for field in ("version", "loglikelihood", "generation", "normalisation", "shots")
        if getattr(task.entry, field) != getattr(entry, field)
    ]
    missing, more = set(task.items) - set(records), set(records) - set(task.items)
    if missing or more:
        found.append(f"{name}: items ({len(missing)} of the baseline are missing, {len(more)} are not in it)")
        return found
    prompts = [records[item].prompt_sha256[:HASH].ljust(HASH) != task.prompt(at) for at, item in enumerate(task.items)]
    if any(prompts):
        parts = (baseline.parts.get("chat_template"), new.manifest.model.parts.get("chat_template"))
        template = ": the chat template differs" if baseline.settings.chat and parts[0] != parts[1] else ""
        found.append(f"{name}: the prompts of {sum(prompts)} of {len(prompts)} items{template}")
    golds = sum(records[item].gold != gold for item, gold in zip(task.items, task.golds, strict=True))
    if golds:
        found.append(f"{name}: the gold answers of {golds} items")
    return found


def losses_of(new: Run, task: BaselineTask, mode: Mode) -> Losses:
    """Old right minus new right, item by item."""
    records, entry = new.records(task.entry.name), task.entry
    steps, clusters = [], []
    for letter, item in zip(task.outcomes[mode], task.items, strict=True):
        outcome = records[item].outcome(mode, entry.view(mode))
        if outcome is None:
            raise ValueError(f"{entry.name}: item {item} has no {mode} outcome; run the same `evalkit run` again")
        steps.append(int(letter == LETTERS["correct"]) - int(outcome.outcome == "correct"))
        clusters.append(records[item].cluster or item)
    return Losses(steps=tuple(steps), clusters=tuple(clusters))


def _primaries(
    baseline: Baseline, losses: dict[tuple[str, Mode], Losses], margins: Margins, level: float
) -> tuple[Primary, ...]:
    cells = []
    for mode in margins.primaries:
        used = [task.entry.name for task in baseline.tasks if task.signal[mode]]
        left_out = tuple(task.entry.name for task in baseline.tasks if not task.signal[mode])
        if used:
            parts = [losses[name, mode] for name in used]
            cells.append((mode, parts, tuple(used), left_out, p_above(_at(parts), 0.0)))
    adjusted = holm([cell[-1] for cell in cells])
    found = []
    for (mode, parts, used_names, left_out, _), p in zip(cells, adjusted, strict=True):
        margin = getattr(margins.margins, mode) / 100
        loss = average(parts, level)
        decision = decide(loss, margin, proven=p < margins.alpha)
        needed = items_needed(parts, margin, level) if decision == "inconclusive" else None
        found.append(
            Primary(
                mode=mode,
                margin=margin,
                loss=loss,
                decision=decision,
                p=p,
                needed=needed,
                tasks=used_names,
                left_out=left_out,
            )
        )
    return tuple(found)


def _at(parts: Sequence[Losses]) -> Any:
    return lambda level: average(parts, level)


def _guardrails(losses: dict[tuple[str, Mode], Losses], margins: Margins, level: float) -> tuple[Guardrail, ...]:
    limits = {key: margins.guardrails.get(key[0], margins.guardrail) / 100 for key in losses}
    p = holm([p_above(part.interval, limits[key]) for key, part in losses.items()])
    return tuple(
        Guardrail(
            task=name,
            mode=mode,
            margin=limits[name, mode],
            loss=part.interval(level),
            p=adjusted,
            failed=adjusted < margins.alpha,
        )
        for ((name, mode), part), adjusted in zip(losses.items(), p, strict=True)
    )


def sentence(verdict: Verdict) -> str:
    """The verdict with the figures it rests on."""
    against = f"against {'the anchor ' if verdict.anchor else ''}{verdict.baseline}"
    if verdict.result == "not comparable" and not verdict.primaries:
        return f"Not comparable {against}: {'; '.join(verdict.reasons)}."
    said = [_primary_sentence(one) for one in verdict.primaries]
    failed = [
        f"{one.task} by {NAMES[one.mode]} loses {_points(one.loss)}, beyond its guardrail of {100 * one.margin:g} "
        "points"
        for one in verdict.guardrails
        if one.failed
    ]
    head = {
        "pass": "Pass",
        "regression": "Regression",
        "inconclusive": "Inconclusive",
        "not comparable": "Not comparable",
    }
    return f"{head[verdict.result]} {against}: {'; '.join([*verdict.reasons, *said, *failed])}."


def _primary_sentence(one: Primary) -> str:
    how = {
        "pass": "within the margin",
        "tolerated": "measurable, tolerated",
        "regression": "a regression",
        "inconclusive": "inconclusive",
    }[one.decision]
    needed = f", about {one.needed:,} items like these would settle it" if one.needed else ""
    return (
        f"loss by {NAMES[one.mode]} {_points(one.loss)} points over {one.loss.n:,} items, "
        f"margin {100 * one.margin:g}: {how}{needed}"
    )


def _points(loss: Interval) -> str:
    return f"{100 * loss.mean:+.1f} [{100 * loss.low:+.1f}, {100 * loss.high:+.1f}]"
