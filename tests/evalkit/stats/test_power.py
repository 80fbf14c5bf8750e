"""Smallest detectable effects and items needed, against enumeration, published formulas and simulation."""

import numpy as np
import pytest

from evalkit.stats.clustered import mean_error
from evalkit.stats.intervals import mean_t
from evalkit.stats.paired_tests import mcnemar
from evalkit.stats.power import (
    detectable_loss,
    detectable_mean,
    items_for_loss,
    items_for_mean,
    mcnemar_power,
)


@pytest.mark.parametrize(("n", "discordance", "effect"), [(40, 0.3, 0.2), (60, 0.2, 0.2), (30, 0.5, 0.0)])
def test_power_of_mcnemar_equals_enumeration(n: int, discordance: float, effect: float) -> None:
    from scipy import stats

    lost, gained = (discordance + effect) / 2, (discordance - effect) / 2
    expected = sum(
        stats.multinomial.pmf([a, b, n - a - b], n, [lost, gained, 1 - discordance])
        for a in range(n + 1)
        for b in range(n + 1 - a)
        if mcnemar(a, b)[0] <= 0.05
    )
    assert mcnemar_power(n, discordance, effect) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("n", "discordance"), [(100, 0.2), (500, 0.06), (2000, 0.1)])
def test_power_at_the_smallest_detectable_loss_is_80_percent(n: int, discordance: float) -> None:
    effect = detectable_loss(n, discordance)
    assert effect is not None
    shares = [(max(discordance, effect) + effect) / 2, (max(discordance, effect) - effect) / 2]
    draws = np.random.default_rng(n).multinomial(n, [*shares, 1 - sum(shares)], size=4000)
    found = np.mean([mcnemar(int(a), int(b))[0] <= 0.05 for a, b, _ in draws])
    assert found == pytest.approx(0.80, abs=0.025)


def test_where_no_pair_differs_a_loss_must_be_of_several_items() -> None:
    effect = detectable_loss(50, 0.0)
    assert effect is not None and 6 / 50 < effect < 10 / 50  # 6 lost of 6 have p = 0.03
    assert detectable_loss(5, 0.0) is None, "5 lost of 5 have p = 0.06"


@pytest.mark.parametrize("clustered", [False, True])
def test_power_at_the_smallest_detectable_hidden_gap_is_80_percent(clustered: bool) -> None:
    rng = np.random.default_rng(1)
    names = [str(i // 5) for i in range(400)] if clustered else None

    def draw() -> np.ndarray:
        own = np.repeat(rng.normal(0, 0.15, 80), 5) if clustered else 0.0
        return np.sign(np.round(rng.normal(0, 0.6, 400) + own))

    effect = np.mean([detectable_mean(mean_error(draw(), names)) or 0.0 for _ in range(200)])
    found = [mean_t(draw() + effect, names, bound=3.0).low > 0 for _ in range(2500)]
    assert np.mean(found) == pytest.approx(0.80, abs=0.025)


def test_items_needed_find_the_loss_seen_four_times_of_five() -> None:
    n = items_for_loss(30, 18, 400)
    assert n is not None and n > 400
    draws = np.random.default_rng(0).multinomial(n, [30 / 400, 18 / 400, 352 / 400], size=3000)
    assert np.mean([mcnemar(int(a), int(b))[1] <= 0.05 for a, b, _ in draws]) == pytest.approx(0.8, abs=0.03)
    assert items_for_loss(7, 7, 100) is None


def test_items_needed_grow_with_the_inverse_square_of_the_effect() -> None:
    x = np.array([1.0, -1.0, 0.0, 0.0, 0.0] * 40 + [1.0] * 4)
    one = items_for_mean(mean_error(x), len(x))
    other = items_for_mean(mean_error(x + x.mean()), len(x))
    assert one is not None and other is not None
    assert one / other == pytest.approx(4, rel=0.02)
    assert items_for_mean(mean_error([0.0, 0.0]), 2) is None
