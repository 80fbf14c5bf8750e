"""What an experiment of this size can see: smallest detectable effects at 80 % power, and items needed."""

import math

import numpy as np
from scipy import optimize, stats

from evalkit.stats.clustered import MeanError, critical

POWER = 0.80
ALPHA = 0.05


def mcnemar_power(n: int, discordance: float, effect: float, alpha: float = ALPHA) -> float:
    """Chance that McNemar's exact test finds a loss of ``effect`` when ``discordance`` of ``n`` pairs differ.

    Exact: over how many pairs differ, and how many of those are losses. 0 <= effect <= discordance <= 1.
    """
    centre, spread = n * discordance, math.sqrt(n * discordance * (1 - discordance))
    m = np.arange(max(0, int(centre - 8 * spread) - 1), min(n, int(centre + 8 * spread) + 1) + 1)
    weight = stats.binom.pmf(m, n, discordance)
    # The test rejects where the rarer side has at most k of m pairs, with 2 P(X <= k) <= alpha.
    k = stats.binom.ppf(alpha / 2, m, 0.5)
    k = np.where(2 * stats.binom.cdf(k, m, 0.5) <= alpha, k, k - 1)
    share = (1 + effect / discordance) / 2
    found = stats.binom.cdf(k, m, 1 - share) + stats.binom.cdf(k, m, share)
    return float((weight * np.where(k >= 0, found, 0.0)).sum())


def detectable_loss(n: int, discordance: float, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Smallest loss that McNemar's exact test finds with ``power``; fraction of items.

    ``discordance``: share of pairs that differ. Where that is less than the loss itself, every differing pair is one
    that was lost. None: even losing every item would not show (under 6 items at 5 %).
    """

    def short(effect: float) -> float:
        return mcnemar_power(n, max(discordance, effect), effect, alpha) - power

    if short(1.0) < 0:
        return None
    return float(optimize.brentq(short, 1e-9, 1.0, xtol=1e-7))


def detectable_mean(error: MeanError, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Smallest mean that a t test with this error finds with ``power`` (Bloom, 1995, Eval. Rev. 19:547); None where the
    error is not known."""
    if error.df == 0 or error.se == 0:
        return None
    return (critical(error.df, 1 - alpha) + float(stats.t.ppf(power, error.df))) * error.se


def items_for_loss(lost: int, gained: int, n: int, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Items at which a loss of the size seen would be found with ``power`` (Connor, 1987, Biometrics 43:207); None
    where none was seen."""
    if lost == gained:
        return None
    effect, discordance = abs(lost - gained) / n, (lost + gained) / n
    a, b = float(stats.norm.ppf(1 - alpha / 2)), float(stats.norm.ppf(power))
    root = a * math.sqrt(discordance) + b * math.sqrt(max(0.0, discordance - effect**2))
    return math.ceil((root / effect) ** 2)


def items_for_mean(error: MeanError, n: int, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Items (more of the same, clusters included) at which a mean of the size seen would be found with ``power``."""
    smallest = detectable_mean(error, alpha, power)
    if smallest is None or abs(error.mean) < 1e-12:
        return None
    return math.ceil(n * (smallest / error.mean) ** 2)
