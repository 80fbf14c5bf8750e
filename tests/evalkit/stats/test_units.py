"""Formula scores, verdicts, flows, agreement, mass, recovery, seeds: closed forms and other implementations."""

import math
import random

import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa

from evalkit.records import GENERATION, LOGLIKELIHOOD, VERDICTS, ItemRecord, Mode, Outcome, Verdict
from evalkit.stats.agreement import flips, histogram, kappa
from evalkit.stats.flows import net_flows
from evalkit.stats.intervals import Interval
from evalkit.stats.mass import choice_mass, masses
from evalkit.stats.recovery import recovery, recovery_bootstrap
from evalkit.stats.seeds import pooled, recipe_interval
from evalkit.stats.units import formula_score, log_odds, verdict


def record(choices: tuple[str, ...] = ("a", "b", "c", "d"), gold: int = 0) -> ItemRecord:
    return ItemRecord(task="t", version="1", item="i", prompt_sha256="h", gold=gold, choices=choices)


def outcome(kind: Verdict, mode: Mode = LOGLIKELIHOOD, tied: tuple[int, ...] = ()) -> Outcome:
    return Outcome(mode=mode, view="cloze", outcome=kind, tied=tied)


def test_formula_scores_take_chance_out() -> None:
    assert formula_score(record(), outcome("correct"), True) == 1
    assert formula_score(record(), outcome("wrong"), True) == pytest.approx(-1 / 3)
    assert formula_score(record(("a", "b")), outcome("wrong"), True) == -1
    guesser = (1 + 3 * formula_score(record(), outcome("wrong"), True)) / 4
    assert guesser == pytest.approx(0)


@pytest.mark.parametrize("kind", ["unparsed", "ambiguous", "truncated", "empty"])
def test_no_answer_is_no_guess(kind: Verdict) -> None:
    assert formula_score(record(), outcome(kind, GENERATION), True) == 0


def test_a_wrong_free_answer_was_no_guess_among_options() -> None:
    assert formula_score(record(), outcome("wrong", GENERATION), listed=False) == 0
    assert formula_score(record(), outcome("wrong", LOGLIKELIHOOD), listed=False) < 0


def test_a_tie_scores_the_mean_over_the_tied() -> None:
    assert formula_score(record(), outcome("ambiguous", tied=(0, 2)), True) == pytest.approx((1 - 1 / 3) / 2)
    assert formula_score(record(), outcome("ambiguous", tied=(0, 1, 2, 3)), True) == pytest.approx(0)
    assert formula_score(record(), outcome("wrong", tied=(1, 2)), True) == pytest.approx(-1 / 3)


def test_options_of_equal_text_are_one_answer_that_is_guessed_more_often() -> None:
    twice = record(("a", "b", "a", "c"))
    assert formula_score(twice, outcome("wrong"), True) == -1, "half of the guesses are right"
    assert formula_score(record(("a", "a")), outcome("wrong"), True) == 0


def interval(low: float, high: float) -> Interval:
    return Interval(mean=(low + high) / 2, low=low, high=high, n=9)


def test_loss_is_called_hidden_only_when_both_units_say_so() -> None:
    up, down, both = interval(0.1, 0.2), interval(-0.2, -0.1), interval(-0.1, 0.1)
    assert verdict(up, up) == "log-likelihood hides loss"
    assert verdict(down, down) == "log-likelihood shows more loss than generation"
    assert verdict(both, both) == "no difference shown"
    for one, other in ((up, both), (both, up), (up, down), (down, both)):
        assert verdict(one, other) == "depends on the scale"


def test_log_odds_of_a_loss_and_of_its_bounds() -> None:
    found = log_odds(0.8, 0.6, Interval(mean=0.2, low=0.0, high=0.3, n=100))
    assert found.mean == pytest.approx(math.log(0.8 / 0.2) - math.log(0.6 / 0.4))
    assert found.low == 0.0 and found.high == pytest.approx(math.log(0.85 / 0.15) - math.log(0.55 / 0.45))
    ends = log_odds(1.0, 0.0, Interval(mean=1.0, low=0.9, high=1.0, n=50))
    assert ends.high == ends.mean == pytest.approx(2 * math.log(99)), "half an item from the ends"


def test_flows_add_up_to_the_loss_exactly() -> None:
    rng = random.Random(0)
    pairs: list[tuple[Verdict, Verdict]] = [(rng.choice(VERDICTS), rng.choice(VERDICTS)) for _ in range(500)]
    flows = net_flows(pairs)
    loss = sum(t == "correct" for t, _ in pairs) - sum(s == "correct" for _, s in pairs)
    assert sum(out - back for out, back, _ in flows.values()) == loss
    assert sum(found.mean for *_, found in flows.values()) == pytest.approx(loss / 500)
    assert set(flows) == set(VERDICTS) - {"correct"}


def test_flows_count_only_items_that_one_of_both_had_right() -> None:
    flows = net_flows(
        [("correct", "truncated"), ("wrong", "truncated"), ("truncated", "correct"), ("correct", "wrong")]
    )
    assert flows["truncated"][:2] == (1, 1) and flows["wrong"][:2] == (1, 0) and flows["empty"][:2] == (0, 0)


@pytest.mark.parametrize("table", [(40, 9, 11, 20), (5, 20, 3, 2), (1, 0, 0, 1), (10, 5, 1, 0)])
def test_kappa_equals_statsmodels(table: tuple[int, int, int, int]) -> None:
    a, b, c, d = table
    pairs = [(True, True)] * a + [(True, False)] * b + [(False, True)] * c + [(False, False)] * d
    expected, found = cohens_kappa(np.array([[a, b], [c, d]])), kappa(pairs)
    assert found is not None and found.mean == pytest.approx(expected.kappa)
    assert found.low == pytest.approx(max(-1, expected.kappa_low)) and found.high == pytest.approx(
        min(1, expected.kappa_upp)
    )


def test_kappa_of_two_that_are_always_right_is_none() -> None:
    assert kappa([(True, True)] * 5) is None


def test_flips_and_histogram() -> None:
    assert flips(6, 2, 100) == (0.08, 0.5) and flips(0, 0, 10) == (0.0, None)
    assert histogram([0, 0, 3, None, 2], 4) == [2, 0, 1, 1]


def test_mass_is_the_chance_of_any_choice_as_the_next_token() -> None:
    one = Outcome(
        mode=LOGLIKELIHOOD, view="letters", outcome="correct", logprobs=(math.log(0.2), math.log(0.05)), tokens=(1, 1)
    )
    assert choice_mass(one) == pytest.approx(0.25)
    several = Outcome(mode=LOGLIKELIHOOD, view="cloze", outcome="correct", logprobs=(-1.0, -2.0), tokens=(1, 2))
    assert choice_mass(several) is None
    assert masses([one, several, one]) == pytest.approx([0.25, 0.25])


def test_recovery_solves_fiellers_quadratic() -> None:
    rng = np.random.default_rng(0)
    teacher, noise = rng.normal(0.6, 0.4, 80), rng.normal(0, 0.3, 80)
    student = 0.7 * teacher + noise
    found = recovery(teacher, student)
    assert found is not None and found.mean == pytest.approx(student.mean() / teacher.mean())
    from scipy import stats

    for bound in (found.low, found.high):  # each is the ratio at which a t test of S - bound * T is just significant
        assert stats.ttest_1samp(student - bound * teacher, 0).pvalue == pytest.approx(0.05)


def test_the_bootstrap_of_recovery_is_that_of_scipy_over_whole_clusters() -> None:
    rng = np.random.default_rng(4)
    teacher = np.where(rng.random(600) < 0.7, 1.0, -1 / 3)
    student = np.where(rng.random(600) < 0.6, 1.0, -1 / 3)
    names = [str(i // 10) for i in range(600)]
    sums = np.stack([teacher.reshape(60, 10).sum(axis=1), student.reshape(60, 10).sum(axis=1)])
    from scipy import stats

    expected = stats.bootstrap(
        (sums[0], sums[1]), lambda t, s, axis=-1: s.sum(axis=axis) / t.sum(axis=axis), paired=True, method="percentile"
    ).confidence_interval
    found = recovery_bootstrap(teacher, student, names, draws=9999)
    assert found == pytest.approx((expected.low, expected.high), abs=0.01)
    assert recovery_bootstrap(teacher, student, [str(i // 20) for i in range(600)]) is None, "30 clusters"
    assert recovery_bootstrap(-teacher, student) is None


def test_recovery_needs_a_teacher_above_zero() -> None:
    rng = np.random.default_rng(1)
    assert recovery(rng.normal(0.01, 1, 50), rng.normal(0.5, 1, 50)) is None
    assert recovery([-0.5, -0.6, -0.4], [0.1, 0.2, 0.3]) is None


def test_intervals_of_a_recipe_cover_over_seeds_and_items() -> None:
    rng, held = np.random.default_rng(2), []
    for _ in range(600):
        cells = []
        for k in (3, 1, 3, 2):  # the second cell has one seed, and borrows the others' seed variance
            item = rng.normal(0, 1, 60)
            seed = rng.normal(0, 0.15, (k, 1))
            cells.append(0.5 + item + seed + rng.normal(0, 0.5, (k, 60)))
        variance = pooled(cells)
        assert variance is not None and variance.df == 5
        for cell in cells[:2]:
            found = recipe_interval(cell, variance)
            held.append(found.low <= 0.5 <= found.high)
    assert 0.93 <= np.mean(held) <= 0.985


def test_a_recipe_without_two_seeds_has_no_seed_variance() -> None:
    assert pooled([np.zeros((1, 10)), np.ones((1, 5))]) is None
