"""Rates estimated from a stratified sample: each stratum's own interval, weighted by the stratum's share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evalkit.stats.intervals import Interval, wilson


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratum:
    """Of ``population`` replies ``sampled`` were looked at, and ``hits`` of those were what is counted."""

    population: int
    sampled: int
    hits: int


def stratified_rate(strata: Sequence[Stratum], level: float = 0.95) -> Interval:
    """Share of hits in the population, with MOVER limits from each stratum's Wilson interval (Zou and Donner, 2008).

    A stratum that was looked at whole adds no doubt; one that was not looked at could hold anything from 0 to 1.
    """
    total = sum(s.population for s in strata)
    if total == 0:
        raise ValueError("the rate in an empty population")
    mean = down = up = 0.0
    for s in strata:
        weight = s.population / total
        found = wilson(s.hits, s.sampled, level) if s.sampled else Interval(mean=0.5, low=0.0, high=1.0, n=0)
        # Finite population: of the unseen share only can the truth still move.
        unseen = math.sqrt(max(0.0, 1 - s.sampled / s.population)) if s.population else 0.0
        mean += weight * found.mean
        down += (weight * unseen * (found.mean - found.low)) ** 2
        up += (weight * unseen * (found.high - found.mean)) ** 2
    low, high = max(0.0, mean - math.sqrt(down)), min(1.0, mean + math.sqrt(up))
    return Interval(mean=mean, low=low, high=high, n=sum(s.sampled for s in strata))


def shifted(base: Interval, plus: Interval, minus: Interval) -> Interval:
    """base + plus - minus of independent estimates, from the arms of their intervals."""
    mean = base.mean + plus.mean - minus.mean
    down = math.hypot(base.mean - base.low, plus.mean - plus.low, minus.high - minus.mean)
    up = math.hypot(base.high - base.mean, plus.high - plus.mean, minus.mean - minus.low)
    return Interval(mean=mean, low=mean - down, high=mean + up, n=base.n)
