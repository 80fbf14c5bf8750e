"""Intervals for a recipe (items x seeds), not for one checkpoint: seed variance pooled over replicated cells.

Items and seeds are crossed: every seed's checkpoint answers the same items. The mean of a cell of k seeds and n items
varies as (MS_seed + MS_item - MS_rest) / (k n), whose mean squares come from the usual two-way table (Satterthwaite,
1946, for its degrees of freedom). MS_seed of one cell has k - 1 degrees of freedom, so it is pooled over all cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from evalkit.stats.intervals import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedVariance:
    """How much one item's worth of score differs between seeds."""

    mean_square: float
    """Pooled MS_seed: n times the variance of a cell's per-seed means."""
    df: int


def pooled(cells: Sequence[np.ndarray]) -> SeedVariance | None:
    """``cells``: [seeds, items] of scores, one a recipe (and task, and budget), with one or more seeds.

    Cells of different n are put on one scale, the variance of a mean times its n. None: no cell has two seeds.
    """
    total, df = 0.0, 0
    for cell in cells:
        k, n = cell.shape
        total += n * float(((cell.mean(axis=1) - cell.mean()) ** 2).sum())
        df += k - 1
    return SeedVariance(mean_square=total / df, df=df) if df else None


def recipe_interval(cell: np.ndarray, seed: SeedVariance, level: float = 0.95) -> Interval:
    """Interval of the recipe's mean score over new seeds and new items; ``cell``: [seeds, items]."""
    k, n = cell.shape
    mean = float(cell.mean())
    items = cell.mean(axis=0)
    ms_item = k * float(items.var(ddof=1)) if n > 1 else 0.0
    parts = [(seed.mean_square, seed.df), (ms_item, n - 1)]
    rest = 0.0
    if k > 1 and n > 1:
        residual = cell - items - cell.mean(axis=1, keepdims=True) + mean
        rest = float((residual**2).sum()) / ((k - 1) * (n - 1))
    # With one seed MS_item holds the rest as well, and nothing can be taken off.
    variance = max(sum(ms for ms, _ in parts) - rest, ms_item, seed.mean_square) / (k * n)
    weight = sum(ms**2 / df for ms, df in parts if df > 0)
    if variance == 0 or weight == 0:
        return Interval(mean=mean, low=mean, high=mean, n=n)
    df = (variance * k * n) ** 2 / weight
    half = float(stats.t.ppf(0.5 + level / 2, max(1.0, df))) * variance**0.5
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n)
