"""Rank correlations against scipy and textbook values, and the noise ceiling against simulation."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from evalkit.stats.ranks import macro_measure, measure, noise_ceiling, ranking, tau_within


def test_kendall_with_ties_textbook_value() -> None:
    """x = 12 2 1 12 2, y = 1 4 7 1 0: tau-b = -0.471405 (scipy's and R's documentation)."""
    found = ranking([12, 2, 1, 12, 2], [1, 4, 7, 1, 0])
    assert found.tau == pytest.approx(-0.4714045207910316)
    assert found.p is None, "under 6 checkpoints no p"


def test_ranking_equals_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 12).tolist(), rng.integers(0, 6, 12).tolist()
    found = ranking(a, b)
    assert found.tau == pytest.approx(stats.kendalltau(a, b).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found.p == pytest.approx(stats.kendalltau(a, b).pvalue)
    assert ranking(a, b, independent=False).p is None, "points of one training run are not independent"


def test_equal_checkpoints_have_no_ranking_and_one_alone_is_refused() -> None:
    assert ranking([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]).tau is None
    with pytest.raises(ValueError, match="at least 2 runs"):
        ranking([0.5], [0.5])


def test_tau_within_one_group_is_tau_and_groups_of_one_have_none() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 5, 9).tolist(), rng.integers(0, 5, 9).tolist()
    found, pairs = tau_within(a, b, ["x"] * 9)
    assert found == pytest.approx(stats.kendalltau(a, b).statistic) and pairs == 36
    assert tau_within(a, b, list(range(9))) == (None, 0)


def test_a_trend_over_budgets_does_not_count_within_them() -> None:
    """Both modes rise with the budget, and rank the two checkpoints of each budget the other way round."""
    loglikelihood, generation = [0.1, 0.2, 0.4, 0.5, 0.7, 0.8], [0.2, 0.1, 0.5, 0.4, 0.8, 0.7]
    assert ranking(loglikelihood, generation).tau == pytest.approx(0.6)
    assert tau_within(loglikelihood, generation, [1, 1, 2, 2, 3, 3]) == (pytest.approx(-1.0), 3)


def answers(rng: np.random.Generator, accuracies: np.ndarray, n: int) -> np.ndarray:
    """[K, n] right or wrong: items differ in difficulty, which all checkpoints share."""
    logit = np.log(accuracies / (1 - accuracies))[:, None] * 1.2 + rng.normal(0, 1.2, n)
    return (rng.random((len(accuracies), n)) < 1 / (1 + np.exp(-logit))).astype(float)


@pytest.mark.parametrize("spread", [0.05, 0.15, 0.4])
def test_the_ceiling_is_the_tau_of_16_checkpoints_that_both_modes_rank_alike(spread: float) -> None:
    rng = np.random.default_rng(int(100 * spread))
    loglikelihood = np.linspace(0.5 - spread / 2, 0.5 + spread / 2, 16)
    generation = np.linspace(0.3, 0.3 + 1.3 * spread, 16)
    taus, ceilings, below = [], [], []
    for _ in range(60):
        ll, gen = answers(rng, loglikelihood, 400), answers(rng, generation, 400)
        tau = stats.kendalltau(ll.mean(axis=1), gen.mean(axis=1)).statistic
        found = noise_ceiling(measure(ll, gen, [str(i) for i in range(400)]), draws=400)
        if found is None:  # at the smallest spread noise may be all there is
            continue
        taus.append(tau)
        ceilings.append(found.mean)
        below.append(tau < found.low)
    assert len(taus) >= 40
    assert np.mean(ceilings) == pytest.approx(np.mean(taus), abs=0.06)
    assert np.mean(below) <= 0.05 + 2 * (0.05 * 0.95 / len(below)) ** 0.5 + 0.03


def test_a_ranking_that_differs_between_the_modes_is_below_the_ceiling() -> None:
    rng = np.random.default_rng(9)
    order = np.linspace(0.3, 0.7, 16)
    ll, gen = answers(rng, order, 1000), answers(rng, rng.permutation(order), 1000)
    found = noise_ceiling(measure(ll, gen, [str(i) for i in range(1000)]))
    assert found is not None and stats.kendalltau(ll.mean(axis=1), gen.mean(axis=1)).statistic < found.low


def test_checkpoints_without_differences_have_no_ceiling() -> None:
    one = np.tile(answers(np.random.default_rng(0), np.array([0.5]), 50), (4, 1))
    assert noise_ceiling(measure(one, one, [str(i) for i in range(50)])) is None


def test_the_covariance_of_means_is_that_of_new_items() -> None:
    rng = np.random.default_rng(1)
    accuracies = np.array([0.4, 0.6, 0.7])
    means, covariances = [], []
    for _ in range(600):
        shared = rng.random(100)
        ll = (shared < accuracies[:, None]).astype(float)
        gen = (rng.random((3, 100)) < 0.5).astype(float)
        found = measure(ll, gen, [str(i) for i in range(100)])
        means.append(found.means)
        covariances.append(found.covariance)
    assert np.mean(covariances, axis=0) == pytest.approx(np.cov(np.array(means).T), abs=4e-4)
    both = macro_measure([found, found])
    assert both.means == pytest.approx(found.means) and both.covariance == pytest.approx(found.covariance / 2)


def test_pairs_of_a_group_are_counted() -> None:
    groups = ["a", "a", "b", "b", "b", "c"]
    expected = sum(x == y for x, y in combinations(groups, 2))
    assert tau_within([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], groups) == (1.0, expected)
