"""Is a loss small enough? Non-inferiority of paired answers, as a gate needs it (fractions; loss = old - new)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from evalkit.stats.intervals import Interval, macro, mean_t, tango

Decision = Literal["pass", "tolerated", "regression", "inconclusive"]
"""tolerated: a loss is there and smaller than the margin; it passes too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """One task in one mode: old right minus new right, item by item."""

    steps: tuple[int, ...]
    clusters: tuple[str, ...]

    @property
    def lost(self) -> int:
        return self.steps.count(1)

    @property
    def gained(self) -> int:
        return self.steps.count(-1)

    @property
    def n(self) -> int:
        return len(self.steps)

    def interval(self, level: float, factor: float = 1.0) -> Interval:
        """Tango's, or clustered t. ``factor``: as it would be with so many times the items, all like these."""
        if len(set(self.clusters)) == self.n:
            return tango(self.lost * factor, self.gained * factor, self.n * factor, level)
        found = mean_t(self.steps, self.clusters, level=level)
        root = math.sqrt(factor)
        low, high = found.mean - (found.mean - found.low) / root, found.mean + (found.high - found.mean) / root
        return Interval(mean=found.mean, low=low, high=high, n=found.n)


def average(parts: Sequence[Losses], level: float, factor: float = 1.0) -> Interval:
    """Equal-weight macro over tasks."""
    return macro([part.interval(level, factor) for part in parts])


def p_above(interval: Callable[[float], Interval], margin: float) -> float:
    """One-sided p of "the loss is at most ``margin``": the largest alpha whose interval of level 1 - 2 alpha still
    holds it. Found by bisection down to 1e-9."""
    if interval(1e-6).mean <= margin:
        return 0.5
    low, high = math.log(1e-9), math.log(0.5)
    for _ in range(30):
        middle = (low + high) / 2
        if interval(1 - 2 * math.exp(middle)).low > margin:
            high = middle
        else:
            low = middle
    return math.exp(high)


def decide(interval: Interval, margin: float, proven: bool) -> Decision:
    """``interval``: of level 1 - 2 alpha; ``proven``: that there is a loss at all, after Holm over the primaries."""
    if interval.high < margin:
        return "tolerated" if interval.low > 0 else "pass"
    return "regression" if proven else "inconclusive"


def items_needed(parts: Sequence[Losses], margin: float, level: float) -> int | None:
    """Items over all tasks at which the verdict would be clear if all items were like these: the upper limit below the
    margin, or, where the loss seen is at least the margin, the lower limit above 0. None: not even 10,000 times these.
    """
    small = average(parts, level).mean < margin

    def clear(factor: float) -> bool:
        found = average(parts, level, factor)
        return found.high < margin if small else found.low > 0

    low, high = 0.0, math.log(1e4)
    if clear(1.0) or not clear(1e4):
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if clear(math.exp(middle)) else (middle, high)
    return math.ceil(math.exp(high) * sum(part.n for part in parts) - 1e-6)
