"""How much of the teacher's skill the student keeps: the ratio of their mean formula scores, by Fieller's theorem."""

import math
from collections.abc import Sequence

import numpy as np

from evalkit.stats.clustered import Values, critical, mean_error
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
