"""Where generation's loss comes from: net flows between outcomes that add up to it exactly."""

from collections.abc import Sequence

from evalkit.records import VERDICTS, Verdict
from evalkit.stats.intervals import Interval, mean_t

Pairs = Sequence[tuple[Verdict, Verdict]]
"""(teacher's outcome, student's outcome) of each item."""


def net_flows(pairs: Pairs, clusters: Sequence[str] | None = None) -> dict[Verdict, tuple[int, int, Interval]]:
    """For each outcome o but "correct": (items T right and S o, items S right and T o, their difference over n).

    The differences sum to P(T correct) - P(S correct). Marginal differences of outcome rates would not: they also
    count items that the teacher missed too.
    """
    flows: dict[Verdict, tuple[int, int, Interval]] = {}
    for kind in VERDICTS:
        if kind != "correct":
            steps = [int(t == "correct" and s == kind) - int(s == "correct" and t == kind) for t, s in pairs]
            flows[kind] = (steps.count(1), steps.count(-1), mean_t(steps, clusters))
    return flows
