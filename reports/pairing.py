"""Two runs, item by item: what is comparable, and the differences between the modes."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from evalkit.records import GENERATION, LOGLIKELIHOOD, MODES, ItemRecord, Mode, Outcome, TaskEntry
from evalkit.stats.intervals import Interval, mean_t, tango
from evalkit.stats.units import formula_score, penalty
from evalkit.store import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """One task's common items in both runs."""

    teacher_entry: TaskEntry
    student_entry: TaskEntry
    pairs: tuple[tuple[ItemRecord, ItemRecord], ...]
    left_out: int
    """Items that only one run holds."""
    other_prompt: int
    """Common items whose prompts differ between the runs."""

    @property
    def clusters(self) -> list[str]:
        return [teacher.cluster or teacher.item for teacher, _ in self.pairs]


def check_settings(teacher: Run, student: Run) -> None:
    """Only runs that were asked the same thing are compared."""
    one, two = teacher.manifest.settings.model_dump(), student.manifest.settings.model_dump()
    different = [f"{name} ({one[name]!r} against {two[name]!r})" for name in one if one[name] != two[name]]
    if different:
        raise ValueError(
            f"the runs can't be compared, their settings differ in {'; '.join(different)}; run one of them again"
        )


def pair(teacher: Run, student: Run, name: str) -> Paired:
    one, two = teacher.manifest.entry(name), student.manifest.entry(name)
    for field in ("version", "loglikelihood", "generation", "normalisation", "shots"):
        if getattr(one, field) != getattr(two, field):
            raise ValueError(
                f"task {name!r} can't be compared: its {field} is {getattr(one, field)!r} in the teacher's run and "
                f"{getattr(two, field)!r} in the student's; run one of them again"
            )
    ours, theirs = teacher.records(name), student.records(name)
    common = [item for item in ours if item in theirs]
    if not common:
        raise ValueError(f"task {name!r}: the two runs have no item in common")
    pairs = tuple((ours[item], theirs[item]) for item in sorted(common))
    for t, s in pairs:
        if t.choices != s.choices or t.gold != s.gold:
            raise ValueError(f"task {name!r}: item {t.item} has other choices in the two runs; run one of them again")
    return Paired(
        teacher_entry=one,
        student_entry=two,
        pairs=pairs,
        left_out=len(ours) + len(theirs) - 2 * len(common),
        other_prompt=sum(t.prompt_sha256 != s.prompt_sha256 for t, s in pairs),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """The differences of one task in one unit; None where a mode or a shared view is missing."""

    gaps: dict[Mode, Interval]
    hidden: Interval | None
    """Inside generation's view."""
    protocol: Interval | None
    """Between the primary views."""
    view_shift: Interval | None
    """Log-likelihood gap in generation's view minus that in its own."""
    one_view: bool
    """Both modes share view and prompt bytes up to the answer."""


def view_of(paired: Paired, mode: Mode) -> str:
    return paired.teacher_entry.view(mode)


def outcomes_of(paired: Paired, mode: Mode, view: str | None = None) -> list[tuple[Outcome, Outcome]]:
    """(teacher's, student's) outcome of each item; empty when the mode was not scored in the view."""
    view = view or view_of(paired, mode)
    found = [(t.outcome(mode, view), s.outcome(mode, view)) for t, s in paired.pairs]
    return [(t, s) for t, s in found if t is not None and s is not None]


def rights_of(paired: Paired, mode: Mode, view: str | None = None) -> list[tuple[bool, bool]]:
    return [(t.outcome == "correct", s.outcome == "correct") for t, s in outcomes_of(paired, mode, view)]


def discordant(rights: Iterable[tuple[bool, bool]]) -> tuple[int, int]:
    counts = Counter(rights)
    return counts[True, False], counts[False, True]


def losses(rights: Iterable[tuple[bool, bool]]) -> list[int]:
    """Teacher minus student, item by item."""
    return [int(t) - int(s) for t, s in rights]


def same_bytes(paired: Paired) -> bool:
    """Generation answered after the same bytes as log-likelihood in its view (no thinking block of its own)."""
    said = f"{view_of(paired, GENERATION)} (thinking)"
    return not any(said in record.prompts for pair in paired.pairs for record in pair)


def hidden_steps(paired: Paired) -> list[int]:
    """Generation's loss minus log-likelihood's inside generation's view, item by item; empty where there is none."""
    said = view_of(paired, GENERATION)
    generation, inside = losses(rights_of(paired, GENERATION)), losses(rights_of(paired, LOGLIKELIHOOD, said))
    if not generation or not inside or not same_bytes(paired):
        return []
    return [g - i for g, i in zip(generation, inside, strict=True)]


def formulas_of(paired: Paired, mode: Mode, view: str | None = None) -> list[tuple[float, float]]:
    """(teacher's, student's) formula score of each item."""
    listed = paired.teacher_entry.listed
    found = zip(paired.pairs, outcomes_of(paired, mode, view), strict=False)
    return [(formula_score(t, one, listed), formula_score(s, two, listed)) for (t, s), (one, two) in found]


def gaps_of(paired: Paired) -> Gaps:
    """In raw points (fractions): Tango's intervals, t between the modes, clustered where items are."""
    clusters = paired.clusters
    clustered = len(set(clusters)) < len(clusters)

    def gap(mode: Mode) -> Interval:
        rights = rights_of(paired, mode)
        return mean_t(losses(rights), clusters) if clustered else tango(*discordant(rights), len(rights))

    return _gaps(paired, lambda mode, view: losses(rights_of(paired, mode, view)), gap, bound=1.0)


def formula_gaps_of(paired: Paired) -> Gaps:
    """In formula scores (a right answer is 1, a guess 0 on average): t, clustered where items are."""
    bound = 1 + max(penalty(record) for record, _ in paired.pairs)

    def steps(mode: Mode, view: str | None) -> list[float]:
        return [t - s for t, s in formulas_of(paired, mode, view)]

    return _gaps(paired, steps, lambda mode: mean_t(steps(mode, None), paired.clusters, bound=bound), bound=bound)


def _gaps(
    paired: Paired,
    steps: Callable[[Mode, str | None], Sequence[float]],
    gap: Callable[[Mode], Interval],
    bound: float,
) -> Gaps:
    """``steps``: teacher minus student, item by item, within ``bound``; empty where the mode was not scored."""
    gaps = {mode: gap(mode) for mode in MODES if steps(mode, None)}
    if len(gaps) < 2:
        return Gaps(gaps=gaps, hidden=None, protocol=None, view_shift=None, one_view=False)

    def difference(a: Sequence[float], b: Sequence[float]) -> Interval:
        return mean_t([x - y for x, y in zip(a, b, strict=True)], paired.clusters, bound=2 * bound)

    own, said = view_of(paired, LOGLIKELIHOOD), view_of(paired, GENERATION)
    generation, primary = steps(GENERATION, None), steps(LOGLIKELIHOOD, None)
    inside = steps(LOGLIKELIHOOD, said)
    same = same_bytes(paired)
    return Gaps(
        gaps=gaps,
        hidden=difference(generation, inside) if inside and same else None,
        protocol=difference(generation, primary),
        view_shift=difference(inside, primary) if inside and own != said else None,
        one_view=own == said and same,
    )
