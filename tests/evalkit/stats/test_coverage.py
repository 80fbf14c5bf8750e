"""Simulations with fixed seeds: how often 95 % intervals hold the truth.

At least 93 % everywhere; at most 97.5 % where 20 or more items are expected to differ. What is measured over R draws
may miss a bound by two of its own standard errors, sqrt(0.95 * 0.05 / R); where it is computed exactly, by none.
"""

from functools import lru_cache

import numpy as np
import pytest
from scipy import stats

from evalkit.stats.intervals import Interval, mean_from_zero, mean_t, tango
from evalkit.stats.recovery import recovery, recovery_bootstrap
from evalkit.stats.units import log_odds

LOW, HIGH = 0.93, 0.975


def check(share: float, expected_to_differ: float, draws: int | None) -> None:
    slack = 2 * (0.95 * 0.05 / draws) ** 0.5 if draws else 0.0
    assert share >= LOW - slack, f"covers {share:.4f}"
    if expected_to_differ >= 20:
        assert share <= HIGH + slack, f"covers {share:.4f}"


def exact_tango(n: int, lost: float, gained: float) -> float:
    """Coverage summed over all counts that matter."""
    most = int(n * (lost + gained) + 6 * (n * (lost + gained)) ** 0.5 + 6)
    a, b = np.meshgrid(np.arange(min(n, most) + 1), np.arange(min(n, most) + 1), indexing="ij")
    a, b = a[a + b <= n], b[a + b <= n]
    chance = stats.multinomial.pmf(np.stack([a, b, n - a - b], axis=1), n, [lost, gained, 1 - lost - gained])
    kept = chance > 1e-7
    return float(
        sum(
            p * ((found := tango(int(x), int(y), n)).low <= lost - gained <= found.high)
            for x, y, p in zip(a[kept], b[kept], chance[kept], strict=True)
        )
    )


@pytest.mark.parametrize("share_lost", [0.5, 0.75, 1.0])
@pytest.mark.parametrize(("n", "discordance"), [(50, 0.02), (50, 0.06), (50, 0.3), (100, 0.06), (200, 0.1)])
def test_tango_covers_exactly(n: int, discordance: float, share_lost: float) -> None:
    check(exact_tango(n, discordance * share_lost, discordance * (1 - share_lost)), n * discordance, None)


@pytest.mark.parametrize("n", [500, 2000])
@pytest.mark.parametrize(("discordance", "share_lost"), [(0.02, 1.0), (0.06, 0.75), (0.3, 0.5)])
def test_tango_covers_on_large_sets(n: int, discordance: float, share_lost: float) -> None:
    lost, gained = discordance * share_lost, discordance * (1 - share_lost)
    draws = np.random.default_rng(n).multinomial(n, [lost, gained, 1 - lost - gained], size=2000)
    found = lru_cache(None)(lambda a, b: tango(a, b, n))
    share = np.mean([(i := found(int(a), int(b))).low <= lost - gained <= i.high for a, b, _ in draws])
    check(float(share), n * discordance, 2000)


@pytest.mark.parametrize("accuracy", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(("n", "discordance"), [(50, 0.06), (50, 0.3), (200, 0.1), (500, 0.02), (2000, 0.06)])
def test_a_loss_in_log_odds_is_covered(n: int, discordance: float, accuracy: float) -> None:
    """Both models' accuracies vary from draw to draw, and not only their difference."""
    for share_lost in (0.5, 0.8):
        lost, gained = discordance * share_lost, discordance * (1 - share_lost)
        if lost > accuracy or gained > 1 - accuracy:
            continue
        student = accuracy - lost + gained
        truth = float(np.log(accuracy / (1 - accuracy)) - np.log(student / (1 - student)))
        cells = [accuracy - lost, lost, gained, 1 - accuracy - gained]
        draws = np.random.default_rng(n).multinomial(n, np.maximum(cells, 0), size=2000)
        found = lru_cache(None)(lambda a, b: tango(a, b, n))  # noqa: B023  (used up within the round)
        held = []
        for both, a, b, _ in draws:
            loss = log_odds((both + a) / n, (both + b) / n, found(int(a), int(b)))
            held.append(loss.low <= truth <= loss.high)
        check(float(np.mean(held)), n * discordance, 2000)


def hidden_gap_coverage(n: int, discordance: float, share_lost: float, unit: float, draws: int) -> float:
    """Generation's answers differ on ``discordance`` of the items, log-likelihood's on half as many; ``unit`` is what
    a right answer and a wrong one differ by (1 in raw points, 4/3 in formula scores of 4 options)."""
    generation = [discordance * (1 - share_lost), 1 - discordance, discordance * share_lost]
    loglikelihood = [discordance / 4, 1 - discordance / 2, discordance / 4]
    chances = np.convolve(generation, loglikelihood)
    values = unit * np.arange(-2, 3)
    truth = float(chances @ values)
    counts = np.random.default_rng(int(1000 * discordance) + n).multinomial(n, chances, size=draws)

    @lru_cache(None)
    def holds(*count: int) -> bool:
        found = mean_t(np.repeat(values, count).tolist(), bound=2 * unit)
        return found.low - 1e-12 <= truth <= found.high + 1e-12

    return float(np.mean([holds(*map(int, count)) for count in counts]))


@pytest.mark.parametrize("share_lost", [0.5, 0.8, 1.0])
@pytest.mark.parametrize(
    ("n", "discordance"), [(50, 0.02), (50, 0.06), (50, 0.3), (200, 0.1), (500, 0.06), (2000, 0.02)]
)
def test_a_hidden_gap_is_covered(n: int, discordance: float, share_lost: float) -> None:
    for unit in (1.0, 4 / 3):
        check(hidden_gap_coverage(n, discordance, share_lost, unit, 1500), n * discordance, 1500)


@pytest.mark.slow
@pytest.mark.parametrize("share_lost", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("discordance", [0.02, 0.04, 0.1, 0.3])
@pytest.mark.parametrize("n", [50, 100, 200, 500, 2000])
def test_a_hidden_gap_is_covered_everywhere(n: int, discordance: float, share_lost: float) -> None:
    check(hidden_gap_coverage(n, discordance, share_lost, 1.0, 3000), n * discordance, 3000)


def sizes(clusters: int, n: int, steep: bool) -> np.ndarray:
    """Uneven: falling by 40 % (or 15 % with many) from one to the next, or rising evenly from 1 to ``clusters``."""
    falling = (0.6 if clusters <= 8 else 0.85) ** np.arange(clusters)
    weight = falling if steep else np.arange(1.0, clusters + 1)
    return np.maximum(1, np.round(n * weight / weight.sum())).astype(int)


def clustered_coverage(clusters: int, n: int, steep: bool, discordance: float, lost: float, vary: float, draws: int):  # type: ignore[no-untyped-def]
    """Each cluster has rates of its own, of coefficient of variation ``vary`` (gamma) around the common ones."""
    rng = np.random.default_rng(clusters * n)
    size = sizes(clusters, n, steep)
    names = np.repeat(np.arange(clusters), size).astype(str).tolist()

    def rates(mean: float, count: int) -> np.ndarray:
        if mean == 0 or vary == 0:
            return np.full((count, clusters), mean)
        return np.minimum(rng.gamma(1 / vary**2, mean * vary**2, (count, clusters)), 0.45)

    a, b = discordance * lost, discordance * (1 - lost)
    truth = float(rates(a, 40_000).mean() - rates(b, 40_000).mean())
    held = []
    for p, q in zip(rates(a, draws), rates(b, draws), strict=True):
        u = rng.random(len(names))
        up, both = np.repeat(p, size), np.repeat(p + q, size)
        x = np.where(u < up, 1.0, np.where(u < both, -1.0, 0.0))
        found: Interval = mean_t(x.tolist(), names)
        held.append(found.low - 1e-3 / n <= truth <= found.high + 1e-3 / n)
    return float(np.mean(held)), int(size.sum()) * discordance


CLUSTERED = [
    (4, 60, True, 0.06, 0.75),
    (4, 300, False, 0.3, 0.8),
    (4, 1000, True, 0.02, 1.0),
    (8, 300, False, 0.02, 1.0),
    (8, 1000, True, 0.06, 0.75),
    (20, 500, True, 0.06, 0.75),
    (40, 200, False, 0.02, 1.0),
    (100, 1000, False, 0.02, 0.6),
    (100, 2000, False, 0.3, 0.8),
]


@pytest.mark.parametrize("case", CLUSTERED, ids=str)
def test_uneven_clusters_are_covered(case: tuple[int, int, bool, float, float]) -> None:
    for vary in (0.0, 0.5):
        check(*clustered_coverage(*case, vary, 700), 700)


@pytest.mark.slow
@pytest.mark.parametrize("vary", [0.0, 0.5])
@pytest.mark.parametrize(("discordance", "lost"), [(0.02, 1.0), (0.02, 0.6), (0.06, 0.75), (0.3, 0.8)])
@pytest.mark.parametrize("steep", [False, True])
@pytest.mark.parametrize(
    ("clusters", "n"), [(4, 60), (4, 2000), (8, 300), (20, 100), (20, 1500), (40, 1000), (100, 2000)]
)
def test_uneven_clusters_are_covered_everywhere(  # type: ignore[no-untyped-def]
    clusters: int, n: int, steep: bool, discordance: float, lost: float, vary: float
):
    check(*clustered_coverage(clusters, n, steep, discordance, lost, vary, 1000), 1000)


def test_copies_of_one_item_are_covered() -> None:
    """Four permutations of each of 60 items, nearly always answered alike."""
    rng, held = np.random.default_rng(7), []
    names = [str(i) for i in range(60) for _ in range(4)]
    for _ in range(700):
        own = rng.choice([1.0, 0.0, -1.0], size=60, p=[0.12, 0.84, 0.04])
        x = np.repeat(own, 4)
        again = rng.random(240) < 0.1
        x[again] = rng.choice([1.0, 0.0, -1.0], size=int(again.sum()), p=[0.12, 0.84, 0.04])
        found = mean_t(x.tolist(), names)
        held.append(found.low <= 0.08 <= found.high)
    check(float(np.mean(held)), 240 * 0.16, 700)


@pytest.mark.parametrize("clustered", [False, True])
def test_recovery_is_covered(clustered: bool) -> None:
    """u of 400 items: the teacher's mean is 0.6 and the student's 0.45, so 75 % is kept."""
    rng, held = np.random.default_rng(3), []
    names = [str(i // 8) for i in range(400)] if clustered else None
    for _ in range(800):
        shift = np.repeat(rng.normal(0, 0.1, 50), 8)
        u = rng.random(400)
        teacher = np.where(u < 0.7 + shift, 1.0, -1 / 3)
        student = np.where(u + rng.normal(0, 0.2, 400) < 0.5875 + shift, 1.0, -1 / 3)
        found = recovery(teacher.tolist(), student.tolist(), names)
        again = recovery_bootstrap(teacher, student, names, draws=999)
        assert found is not None and again is not None
        held.append((found.low, found.high, *again, teacher.mean(), student.mean()))
    *bounds, t, s = np.array(held).T
    truth = s.mean() / t.mean()
    for low, high in (bounds[:2], bounds[2:]):
        check(float(np.mean((low <= truth) & (truth <= high))), 400, 800)


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("n", [50, 200, 1000])
def test_a_mean_kl_is_covered(n: int, clustered: bool) -> None:
    """Per-item means with a tail to the right: a gamma of shape 2, and with clusters a share of it in common."""
    rng, held = np.random.default_rng(n), []
    names = [str(i // 5) for i in range(n)] if clustered else None
    for _ in range(1500):
        shared = np.repeat(rng.gamma(1, size=n // 5), 5) if clustered else rng.gamma(1, size=n)
        found = mean_from_zero(shared + rng.gamma(1, size=n), names)
        assert found is not None
        held.append(found.low <= 2.0 <= found.high)
    check(float(np.mean(held)), n, 1500)
