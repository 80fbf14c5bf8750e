"""Tests of "no difference" on paired right-or-wrong answers, and Holm's correction for many of them."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import stats


def mcnemar(lost: int, gained: int) -> tuple[float, float]:
    """(exact p, mid-p), two-sided (McNemar, 1947; Fagerland et al., 2013, BMC Med. Res. Methodol. 13:91).

    The exact one decides: it never errs more often than it says. Mid-p is less conservative and only printed.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"{lost} lost and {gained} gained: a count cannot be negative")
    both = lost + gained
    if both == 0:
        return 1.0, 1.0
    fewer = min(lost, gained)
    tail = float(stats.binom.cdf(fewer, both, 0.5))
    exact = min(1.0, 2 * tail)
    mid = min(1.0, 2 * (tail - float(stats.binom.pmf(fewer, both, 0.5)) / 2))
    return exact, 1.0 if lost == gained else mid


def sign_flip(sums: Sequence[int]) -> float:
    """Exact two-sided p of the cluster sign-flip test: were each cluster's sum of differences as likely to have the
    other sign, how often would their total be as far from 0?

    ``sums``: one integer a cluster. Nothing is drawn: totals of independent signs are convolved, all clusters of one
    size at once. Clusters of one item make it McNemar's exact test.
    """
    sizes = Counter(abs(int(s)) for s in sums if s)
    if not sizes:
        return 1.0
    chances = np.ones(1)  # of each total, in steps of 1 from -(sum of sizes)
    for size, count in sizes.items():
        steps = np.zeros(2 * size * count + 1)
        steps[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, steps)
    middle = len(chances) // 2
    distance = abs(int(sum(sums)))
    return min(1.0, float(chances[: middle - distance + 1].sum() + chances[middle + distance :].sum()))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given: each below alpha is a finding, however many were looked at,
    with a chance of at most alpha that any of them is false."""
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, at in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[at]))
        adjusted[at] = worst
    return adjusted
