"""How far two series of right-or-wrong answers agree, and which options are picked."""

import math
from collections import Counter
from collections.abc import Sequence

from scipy import stats

from evalkit.stats.intervals import Interval


def kappa(pairs: Sequence[tuple[bool, bool]], level: float = 0.95) -> Interval | None:
    """Cohen's kappa (1960) with the large-sample interval of Fleiss, Cohen and Everitt (1969).

    None where both are always right, or both always wrong: chance alone then agrees always.
    """
    n = len(pairs)
    if n == 0:
        raise ValueError("the agreement of no items")
    cell = Counter((bool(a), bool(b)) for a, b in pairs)
    p = {key: cell[key] / n for key in ((True, True), (True, False), (False, True), (False, False))}
    first = {value: p[value, True] + p[value, False] for value in (True, False)}
    second = {value: p[True, value] + p[False, value] for value in (True, False)}
    seen = p[True, True] + p[False, False]
    chance = sum(first[value] * second[value] for value in (True, False))
    if chance >= 1 - 1e-12:
        return None
    k = (seen - chance) / (1 - chance)
    diagonal = sum(p[v, v] * (1 - (first[v] + second[v]) * (1 - k)) ** 2 for v in (True, False))
    off = (1 - k) ** 2 * sum(p[v, not v] * (second[v] + first[not v]) ** 2 for v in (True, False))
    variance = (diagonal + off - (k - chance * (1 - k)) ** 2) / (n * (1 - chance) ** 2)
    half = float(stats.norm.ppf(0.5 + level / 2)) * math.sqrt(max(0.0, variance))
    return Interval(mean=k, low=max(-1.0, k - half), high=min(1.0, k + half), n=n)


def flips(lost: int, gained: int, n: int) -> tuple[float, float | None]:
    """(volume (lost + gained) / n, direction (lost - gained) / (lost + gained)); no direction where nothing flipped."""
    both = lost + gained
    return both / n, (lost - gained) / both if both else None


def histogram(picked: Sequence[int | None], width: int) -> list[int]:
    """How often each of ``width`` positions was picked; None (no single pick) counts nowhere."""
    counts = Counter(picked)
    return [counts[position] for position in range(width)]
