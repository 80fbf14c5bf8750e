"""Score interval of a mean of few distinct values: Tango's idea for more than three of them.

A t interval trusts the spread it saw, and misses too often where only a handful of items differ at all. Here each
candidate mean is judged by the spread that the data would have if it were true: the multinomial likelihood is
maximised under that mean, and the candidate stays where |observed - candidate| <= z * its standard error. With the
values -1, 0 and 1 this is Tango's interval (1998, Stat. Med. 17:891).
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

STEPS = 24
"""Points of each refinement; five of them find a bound to 24^-5."""


def score_bounds(
    values: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray, bound: float, level: float = 0.95
) -> tuple[float, float]:
    """(low, high) of the mean of ``values`` that came ``counts`` times and can reach -bound and bound.

    Counts may be fractions: what is left of them when clusters are worth fewer items.
    """
    x, n_x = np.asarray(values, dtype=float), np.asarray(counts, dtype=float)
    assert bound > 0 and float(np.abs(x).max()) <= bound + 1e-9, "a value beyond the bound"
    z = float(stats.norm.ppf(0.5 + level / 2))
    return _bound(x, n_x, -bound, z), _bound(x, n_x, bound, z)


def _bound(x: np.ndarray, counts: np.ndarray, end: float, z: float) -> float:
    """The candidate farthest towards ``end`` that the data do not contradict.

    Under a given mean the likeliest distribution has p_j proportional to counts_j / (1 + s x_j); s moves from 0 (the
    observed mean) to -1/end, and from there weight w moves to the value ``end`` itself, which may not have been seen.
    """
    n = float(counts.sum())
    observed = float(x @ counts) / n
    first, last = 0.0, 2.0 - 1e-9
    for _ in range(5):
        u = np.linspace(first, last, STEPS)
        s, w = -np.minimum(u, 1.0) / end, np.maximum(u - 1.0, 0.0)
        p = counts / np.maximum(1.0 + s[:, None] * x, 1e-12)
        p *= ((1.0 - w) / p.sum(axis=1))[:, None]
        mean = p @ x + w * end
        variance = (p * (x - mean[:, None]) ** 2).sum(axis=1) + w * (end - mean) ** 2
        distance = np.abs(mean - observed) / np.sqrt(np.maximum(variance / n, 1e-18))
        out = np.flatnonzero(distance[1:] >= z)
        if not out.size:
            return end
        first, last = float(u[out[0]]), float(u[out[0] + 1])
    return float(mean[out[0] + 1])
