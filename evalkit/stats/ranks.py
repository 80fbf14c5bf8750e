"""Do both modes rank checkpoints alike? Kendall's tau-b and Spearman's rho, and how high tau could be at all.

Two series of accuracies measured on finitely many items disagree somewhere even if the true rankings are one. The
noise ceiling is the tau to be expected then. There is no percentile bootstrap of tau: resampled items add a second
helping of noise, so it is biased towards 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from evalkit.stats.clustered import sums

FEWEST = 6
"""Under so many checkpoints no p-value: of 5 only 120 rankings exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """How alike two rankings of the same checkpoints are; None where one of them is all ties."""

    tau: float | None
    spearman: float | None
    p: float | None
    """Of tau = 0, two-sided. None with under 6 checkpoints, or where they are not independent."""


def ranking(first: Sequence[float], second: Sequence[float], independent: bool = True) -> Ranking:
    """Kendall's tau-b (ties allowed) and Spearman's rho of two series, one value a checkpoint."""
    if len(first) < 2:
        raise ValueError(f"{len(first)} checkpoint can't be ranked; give at least 2 runs")
    if len(set(first)) == 1 or len(set(second)) == 1:
        return Ranking(tau=None, spearman=None, p=None)
    found = stats.kendalltau(first, second, variant="b")
    rho = float(stats.spearmanr(first, second).statistic)
    p = float(found.pvalue) if independent and len(first) >= FEWEST else None
    return Ranking(tau=_whole(float(found.statistic)), spearman=_whole(rho), p=p)


def _whole(value: float) -> float:
    """Perfect agreement is 1, not 0.9999999999999999, which would be below a ceiling of 1."""
    return round(value, 12)


def tau_within(first: Sequence[float], second: Sequence[float], groups: Sequence[object]) -> tuple[float | None, int]:
    """(tau-b over the pairs of checkpoints that share a group, number of such pairs); None: no such pair is untied."""
    a, b, pairs = [], [], 0
    for i, j in combinations(range(len(first)), 2):
        if groups[i] == groups[j]:
            a.append(np.sign(first[i] - first[j]))
            b.append(np.sign(second[i] - second[j]))
            pairs += 1
    untied = float(np.abs(a).sum() * np.abs(b).sum()) if pairs else 0.0
    return (float(np.dot(a, b)) / untied**0.5 if untied else None), pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Accuracies of K checkpoints in both modes on the same items, and how their errors hang together."""

    means: np.ndarray
    """[2K]: K by log-likelihood, then K by generation."""
    covariance: np.ndarray
    """[2K, 2K], of the means over new items: checkpoints share their items, so their errors rise and fall together."""


def measure(loglikelihood: np.ndarray, generation: np.ndarray, clusters: Sequence[str]) -> Measured:
    """From scores [K, items] in each mode; errors are clustered."""
    scores = np.concatenate([loglikelihood, generation]).astype(float)
    means = scores.mean(axis=1)
    n = scores.shape[1]
    residual = np.stack([sums(row - mean, clusters)[0] for row, mean in zip(scores, means, strict=True)])
    groups = residual.shape[1]
    covariance = residual @ residual.T / n**2 * (groups / max(1, groups - 1))
    return Measured(means=means, covariance=covariance)


def macro_measure(parts: Sequence[Measured]) -> Measured:
    """Equal-weight average over tasks, whose items are independent of each other's."""
    return Measured(
        means=np.mean([part.means for part in parts], axis=0),
        covariance=np.sum([part.covariance for part in parts], axis=0) / len(parts) ** 2,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """Tau between two measured rankings whose true rankings are one."""

    mean: float
    low: float
    """5 % of the time tau is lower than this: a lower one is more than item noise."""


def noise_ceiling(measured: Measured, *, draws: int = 2000, seed: int = 0) -> Ceiling | None:
    """Draw both modes' accuracies around true ones that are ranked alike, and take tau between the draws.

    The true ones are a guess, and a guess from noisy figures is spaced less evenly than the truth, which costs tau;
    how much it costs is found by guessing again from some of the draws, and added back (a bootstrap correction of the
    bias). None: a mode's accuracies differ by no more than noise, so there is no ranking to find.
    """
    k = len(measured.means) // 2
    centre = _ranked_alike(measured.means, measured.covariance)
    if centre is None:
        return None
    # Not the generator's multivariate_normal: a singular covariance (two equal checkpoints) must be no warning.
    value, vector = np.linalg.eigh(measured.covariance)
    root = vector * np.sqrt(np.maximum(value, 0.0))
    noise = np.random.default_rng(seed).standard_normal((draws, 2 * k)) @ root.T
    taus = _taus(centre + noise, k)
    again = [_ranked_alike(means, measured.covariance) for means in (centre + noise)[:AGAIN]]
    second = [0.0 if one is None else float(_taus(one + noise[:AGAIN], k).mean()) for one in again]
    mean = float(taus.mean())
    bias = float(np.mean(second)) - mean
    low = float(np.quantile(taus, 0.05)) - bias
    return Ceiling(mean=min(1.0, mean - bias), low=min(1.0, max(-1.0, low)))


AGAIN = 200
"""Draws from which the true accuracies are guessed again."""


def _ranked_alike(means: np.ndarray, covariance: np.ndarray) -> np.ndarray | None:
    """[2K] true accuracies of which the measured ones are a likely draw, ranked alike in both modes; None: none are.

    Measured accuracies spread more than true ones, by their noise; they are drawn in towards their mean until their
    variance is what remains after it (of differences between checkpoints: what all share moves no rank). Then the
    sorted values of each mode are dealt out in one order, that of the mean of both modes' standardised accuracies.
    """
    k = len(means) // 2
    true = []
    for at in (0, k):
        seen, part = means[at : at + k], covariance[at : at + k, at : at + k]
        noise = float((np.trace(part) - part.sum() / k) / (k - 1)) if k > 1 else 0.0
        spread = float(seen.var(ddof=1)) if k > 1 else 0.0
        if spread <= noise:
            return None
        true.append(seen.mean() + (seen - seen.mean()) * (1 - noise / spread) ** 0.5)
    common = sum((t - t.mean()) / t.std() for t in true)
    order = np.argsort(np.argsort(common, kind="stable"))
    return np.concatenate([np.sort(t)[order] for t in true])


def _taus(drawn: np.ndarray, k: int) -> np.ndarray:
    """Tau-b of each row's two halves; ``drawn``: [draws, 2K]."""
    i, j = np.triu_indices(k, 1)
    first = np.sign(drawn[:, i] - drawn[:, j])
    second = np.sign(drawn[:, k + i] - drawn[:, k + j])
    untied = np.sqrt(np.abs(first).sum(axis=1) * np.abs(second).sum(axis=1))
    return np.asarray((first * second).sum(axis=1) / np.maximum(untied, 1e-12))
