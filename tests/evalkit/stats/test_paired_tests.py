"""Tests of no difference against textbook values, scipy, statsmodels, enumeration and simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_of_statsmodels
from statsmodels.stats.multitest import multipletests

from evalkit.stats.intervals import mean_t
from evalkit.stats.noninferiority import Losses, average, decide, p_above
from evalkit.stats.paired_tests import holm, mcnemar, sign_flip


def test_mcnemar_of_three_wins_of_three_is_a_quarter() -> None:
    assert mcnemar(3, 0) == (0.25, 0.125)
    assert mcnemar(0, 0) == (1.0, 1.0) and mcnemar(4, 4) == (1.0, 1.0)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_statsmodels(lost: int, gained: int) -> None:
    expected = mcnemar_of_statsmodels([[10, lost], [gained, 10]], exact=True).pvalue
    exact, mid = mcnemar(lost, gained)
    assert exact == pytest.approx(expected)
    assert mid <= exact


def test_mid_p_takes_half_of_the_seen_probability_off() -> None:
    exact, mid = mcnemar(2, 9)
    assert exact - mid == pytest.approx(stats.binom.pmf(2, 11, 0.5))


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_sign_flip_equals_all_sign_patterns(sums: list[int]) -> None:
    totals = [
        abs(sum(s * x for s, x in zip(signs, sums, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(sums))
    ]
    assert sign_flip(sums) == pytest.approx(np.mean([total >= abs(sum(sums)) for total in totals]))


def test_sign_flip_of_single_items_is_mcnemar() -> None:
    assert sign_flip([1] * 9 + [-1] * 2 + [0] * 30) == pytest.approx(mcnemar(9, 2)[0])


def test_sign_flip_of_thousands_of_clusters() -> None:
    rng = np.random.default_rng(0)
    sums = rng.integers(-5, 6, 5000)
    z = sums.sum() / np.sqrt((sums.astype(float) ** 2).sum())
    assert sign_flip(sums.tolist()) == pytest.approx(2 * stats.norm.sf(abs(z)), abs=5e-3)


def test_holm_textbook_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.7, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_holm_equals_statsmodels(count: int) -> None:
    p = (np.random.default_rng(count).random(count) ** 3).tolist()
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([0.02] * count) == pytest.approx(multipletests([0.02] * count, method="holm")[1])


ALPHA = 0.05


def wrongly(rejected: list[bool]) -> None:
    assert np.mean(rejected) <= ALPHA + 2 * (ALPHA * (1 - ALPHA) / len(rejected)) ** 0.5


@pytest.mark.parametrize(("n", "discordance"), [(50, 0.06), (50, 0.3), (500, 0.02), (2000, 0.1)])
def test_mcnemar_errs_no_more_than_it_says(n: int, discordance: float) -> None:
    draws = np.random.default_rng(n).multinomial(n, [discordance / 2, discordance / 2, 1 - discordance], size=3000)
    wrongly([mcnemar(int(a), int(b))[0] < ALPHA for a, b, _ in draws])


@pytest.mark.parametrize("clusters", [6, 20, 100])
def test_sign_flip_errs_no_more_than_it_says_where_clusters_move_together(clusters: int) -> None:
    rng = np.random.default_rng(clusters)
    sizes = rng.integers(1, 12, clusters)
    rejected = []
    for _ in range(1500):
        tilt = rng.normal(0, 0.4, clusters)  # a cluster's items tend to one side, either side alike
        sums = [int(np.sign(rng.normal(t, 1, size)).sum()) for t, size in zip(tilt, sizes, strict=True)]
        rejected.append(sign_flip(sums) < ALPHA)
    wrongly(rejected)


def test_t_on_hidden_gaps_errs_no_more_than_it_says() -> None:
    rng, rejected = np.random.default_rng(4), []
    for _ in range(1500):
        x = rng.choice([-1.0, 0.0, 1.0], size=300, p=[0.1, 0.8, 0.1])
        rejected.append(not (found := mean_t(x.tolist(), bound=2.0)).low <= 0 <= found.high)
    wrongly(rejected)


def test_holm_errs_once_no_more_than_it_says() -> None:
    rng = np.random.default_rng(2)
    wrongly([min(holm(rng.random(12).tolist())) < ALPHA for _ in range(3000)])


def losses(rng: np.random.Generator, n: int, lost: float, gained: float) -> Losses:
    steps = rng.choice([1, -1, 0], size=n, p=[lost, gained, 1 - lost - gained])
    return Losses(steps=tuple(map(int, steps)), clusters=tuple(map(str, range(n))))


def test_a_loss_of_exactly_the_margin_passes_no_more_often_than_alpha() -> None:
    rng, passed = np.random.default_rng(6), []
    for _ in range(1200):
        parts = [losses(rng, 600, 0.07, 0.05), losses(rng, 300, 0.05, 0.03)]
        found = average(parts, 1 - 2 * ALPHA)
        passed.append(decide(found, 0.02, proven=False) in ("pass", "tolerated"))
    wrongly(passed)


def test_p_above_is_small_no_more_often_than_it_says() -> None:
    rng, found = np.random.default_rng(8), []
    for _ in range(400):
        part = losses(rng, 400, 0.10, 0.05)
        found.append(p_above(part.interval, 0.05) < ALPHA)
    wrongly(found)


def test_p_above_is_the_score_test_s() -> None:
    part = Losses(steps=(1,) * 60 + (-1,) * 20 + (0,) * 420, clusters=tuple(map(str, range(500))))
    p = p_above(part.interval, 0.05)
    assert part.interval(1 - 2 * p).low == pytest.approx(0.05, abs=1e-6)
    assert p_above(part.interval, 0.2) == 0.5
