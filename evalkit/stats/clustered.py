"""The error of a mean when items come in clusters: CR2 with Satterthwaite's degrees of freedom, and the wild cluster
bootstrap (Bell and McCaffrey, 2002; Pustejovsky and Tipton, 2018, J. Bus. Econ. Stat. 36:672; Webb, 2014).

For a mean both have closed forms. With w_g the share of the items that cluster g holds and s_g the sum of its
residuals, CR2's variance is sum_g s_g^2 / (1 - w_g) / n^2; the plain sum (CR0) is too small, because the residuals sum
to zero and large clusters pull the mean towards themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray

WEBB = np.array([-np.sqrt(1.5), -1.0, -np.sqrt(0.5), np.sqrt(0.5), 1.0, np.sqrt(1.5)])
FEW = 40
"""Under so many clusters the wild bootstrap stands beside CR2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanError:
    """How well a mean is known."""

    mean: float
    se: float
    df: float
    """Degrees of freedom of ``se``; 0 where nothing can be known of it (one cluster)."""
    clusters: int
    deff: float
    """Variance over that of as many independent items, at least 1."""


def sums(values: np.ndarray, clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(sum of the values, number of items) of each cluster, in the order of first appearance."""
    at = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    index = np.fromiter((at[name] for name in clusters), dtype=np.intp, count=len(values))
    return np.bincount(index, weights=values, minlength=len(at)), np.bincount(index, minlength=len(at))


def mean_error(values: Values, clusters: Sequence[str] | None = None) -> MeanError:
    """Standard error and degrees of freedom of the mean; ``clusters`` None: items are independent.

    With clusters of one item each this is the ordinary error with n - 1 degrees of freedom.
    """
    x = np.asarray(values, dtype=float)
    n, mean = len(x), float(x.mean())
    total, size = sums(x, clusters) if clusters is not None else (x, np.ones(n, dtype=np.intp))
    if len(size) < 2:
        return MeanError(mean=mean, se=0.0, df=0.0, clusters=len(size), deff=1.0)
    plain = float(x.var(ddof=1)) / n
    w = size / n
    residual = total - mean * size
    variance = float((residual**2 / (1 - w)).sum()) / n**2
    # Working model of Satterthwaite's approximation: independent items (clubSandwich's default too).
    part = w**2 / (1 - w)
    df = 1 / float((w**2).sum() + part.sum() ** 2 - (part**2).sum())
    deff = max(1.0, variance / plain) if plain > 0 else 1.0
    return MeanError(mean=mean, se=variance**0.5, df=df, clusters=len(size), deff=deff)


def wild_bootstrap(
    values: Values, clusters: Sequence[str], *, level: float = 0.95, draws: int = 1999, seed: int = 0
) -> tuple[float, float]:
    """(low, high): every mean that a wild cluster bootstrap test with the null imposed does not reject.

    Weights are Webb's six points under 13 clusters, where Rademacher's signs have too few combinations. Infinite where
    even the farthest mean is not rejected: with three clusters or fewer there may be no bound.
    """
    x = np.asarray(values, dtype=float)
    total, size = sums(x, clusters)
    n, groups = len(x), len(size)
    if groups < 2:
        return -np.inf, np.inf
    points = WEBB if groups < 13 else np.array([-1.0, 1.0])
    weights = np.random.default_rng(seed).choice(points, size=(draws, groups))
    w = size / n
    mean = float(total.sum()) / n

    def rejected(candidate: float) -> bool:
        score = total - candidate * size
        star = weights * score
        shift = star.sum(axis=1) / n
        spread = np.sqrt((((star - shift[:, None] * size) ** 2) / (1 - w)).sum(axis=1)) / n
        own = np.sqrt((((total - mean * size) ** 2) / (1 - w)).sum()) / n
        if own == 0:
            return bool(candidate != mean)
        t_star = np.abs(shift) / np.maximum(spread, 1e-300)
        farther = int((t_star >= abs(mean - candidate) / own * (1 - 1e-12)).sum())
        return (1 + farther) / (1 + draws) < 1 - level

    return _edge(rejected, mean, x, -1.0), _edge(rejected, mean, x, 1.0)


def _edge(rejected: Callable[[float], bool], mean: float, x: np.ndarray, sign: float) -> float:
    """Bisection for the last candidate on one side that is not rejected."""
    step = max(float(x.std()), 1e-9) / len(x) ** 0.5
    inside, outside = mean, mean + sign * step
    for _ in range(40):
        if rejected(outside):
            break
        inside, outside = outside, mean + 2 * (outside - mean)
    else:
        return sign * float(np.inf)
    for _ in range(30):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
    return float(outside)


def critical(df: float, level: float) -> float:
    """t's two-sided quantile; infinite without a degree of freedom."""
    return float(stats.t.ppf(0.5 + level / 2, df)) if df > 0 else float(np.inf)
