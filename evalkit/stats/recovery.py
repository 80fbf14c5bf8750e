"""How much of the teacher's skill the student keeps: the ratio of their mean formula scores, by Fieller's theorem, and
beside it by a cluster bootstrap, which assumes no distribution but needs many clusters."""

import math
from collections.abc import Sequence

import numpy as np

from evalkit.stats.clustered import FEW, Values, critical, mean_error, sums
from evalkit.stats.intervals import Interval


def recovery(
    teacher: Values, student: Values, clusters: Sequence[str] | None = None, *, level: float = 0.95
) -> Interval | None:
    """mean(student) / mean(teacher) over the same items with Fieller's interval (1954), clustered where they are.

    None where the teacher's mean is not above 0 at ``level``: the interval would have no end, and a ratio to nothing
    says nothing.
    """
    t, s = np.asarray(teacher, dtype=float), np.asarray(student, dtype=float)
    below = mean_error(t, clusters)
    k2 = critical(below.df, level) ** 2
    a = below.mean**2 - k2 * below.se**2 if below.df else -1.0
    if below.mean <= 0 or a <= 0:
        return None
    above = mean_error(s, clusters)
    both = (mean_error(s + t, clusters).se ** 2 - mean_error(s - t, clusters).se ** 2) / 4
    b = above.mean * below.mean - k2 * both
    c = above.mean**2 - k2 * above.se**2
    root = math.sqrt(max(0.0, b * b - a * c))
    return Interval(mean=above.mean / below.mean, low=(b - root) / a, high=(b + root) / a, n=len(t))


def recovery_bootstrap(
    teacher: Values,
    student: Values,
    clusters: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    draws: int = 1999,
    seed: int = 0,
) -> tuple[float, float] | None:
    """(low, high) of mean(student) / mean(teacher): percentiles over clusters drawn with replacement (Efron, 1979).

    None under 40 clusters, where such an interval is too short, and where the teacher's mean is not above 0 in all.
    """
    t, s = np.asarray(teacher, dtype=float), np.asarray(student, dtype=float)
    names = clusters if clusters is not None else [str(at) for at in range(len(t))]
    total = np.stack([sums(t, names)[0], sums(s, names)[0]], axis=1)
    if len(total) < FEW:
        return None
    # Clusters with the same sums are the same to the ratio: what is drawn is how often each kind comes.
    kinds, counts = np.unique(np.round(total, 12), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(total), counts / len(total), size=draws)
    below, above = (drawn @ kinds).T
    if (below <= 0).any():
        return None
    low, high = np.quantile(above / below, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
