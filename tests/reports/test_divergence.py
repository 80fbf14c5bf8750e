"""The divergence report's figures: quantiles, the share not yet parted, and the split by what became of an item."""

import math

import numpy as np
import pytest
from scipy import stats

from evalkit.forced import Forced
from evalkit.stats.intervals import mean_from_zero, wilson
from reports.divergence import divergence_cells, divergence_markdown, quantile


def made(firsts: list[int | None], kls: list[float] | None = None) -> list[Forced]:
    return [
        Forced(item=f"i{at}", steps=10, kl=kls[at] if kls else 0.5, first=first, logprob=-1.0)
        for at, first in enumerate(firsts)
    ]


FIRSTS = [0, 0, 1, 3, 3, 7, 20, None, None, None]
NAMES = [f"i{at}" for at in range(10)]


def test_a_reply_survives_to_the_step_at_which_it_parts() -> None:
    cells = divergence_cells(made(FIRSTS), NAMES)
    assert {cell["after"]: cell["mean"] for cell in cells["survival"]} == {
        1: 0.8,
        2: 0.7,
        4: 0.5,
        8: 0.4,
        16: 0.4,
        32: 0.3,
        64: 0.3,
    }
    expected = wilson(8, 10)
    assert cells["survival"][0]["ci95"] == [expected.low, expected.high]
    assert cells["same"]["mean"] == 0.3
    assert cells["first"] == {"0.1": 0, "0.25": 1, "0.5": 3, "0.75": None, "0.9": None}


def test_quantiles_are_those_of_the_inverse_distribution_function() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 40):
        drawn = [int(x) if x < 12 else None for x in rng.integers(0, 16, n)]
        filled = [10**6 if at is None else at for at in drawn]
        for q in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
            expected = int(np.quantile(filled, q, method="inverted_cdf"))
            assert quantile(drawn, q) == (None if expected == 10**6 else expected)


def test_mean_kl_has_the_t_interval_of_scipy_above_zero() -> None:
    kls = np.random.default_rng(1).gamma(2, size=30)
    found = mean_from_zero(kls)
    assert found is not None
    expected = stats.t.interval(0.95, 29, kls.mean(), stats.sem(kls))
    assert (found.low, found.high) == pytest.approx(expected)
    near = mean_from_zero([0.0] * 9 + [1.0])
    assert near is not None
    assert near.low == 0.0
    assert mean_from_zero([0.3]) is None, "one item tells nothing of the spread"
    assert mean_from_zero([0.3, 0.4], ["a", "a"]) is None


def test_items_of_one_cluster_widen_the_intervals() -> None:
    kls = np.repeat(np.random.default_rng(2).gamma(2, size=20), 5).tolist()
    firsts: list[int | None] = [None if kl < 1 else 0 for kl in kls]
    alone, together = (
        divergence_cells(made(firsts, kls), names)
        for names in ([f"i{at}" for at in range(100)], [f"c{at // 5}" for at in range(100)])
    )
    for name in ("kl", "same"):
        assert np.diff(together[name]["ci95"]) > 1.5 * np.diff(alone[name]["ci95"])
        assert together[name]["mean"] == pytest.approx(alone[name]["mean"])


def test_groups_are_what_became_of_the_items() -> None:
    kls = [0.1 * at for at in range(10)]
    became = {name: ("lost" if at < 4 else "both right") for at, name in enumerate(NAMES[:9])}
    cells = divergence_cells(made(FIRSTS, kls), NAMES, became)
    assert {name: cell["n"] for name, cell in cells["groups"].items()} == {
        "both right": 5,
        "lost": 4,
        "gained": 0,
        "both wrong": 0,
    }
    assert cells["groups"]["lost"]["kl"]["mean"] == pytest.approx(0.15)
    assert cells["groups"]["gained"] == {"n": 0, "steps": 0, "kl": None, "first": None, "same": None, "survival": []}
    task = {"name": "t", "left_out": {"cut": 2, "thought": 0, "empty": 0}, "respelled": 1, **cells}
    page = divergence_markdown({"student": "<s>|", "teacher": "t", "tasks": [task]})
    assert "t: items left out: 2 (prompt cut to the window)." in page
    assert "t: 1 of 10 replies were generated in other tokens" in page
    assert "t: 1 items are not in the student's run" in page
    rows = [line for line in page.splitlines() if line.startswith("| t |")]
    assert rows[0].startswith("| t | all | 10 | 100 | 0.450 [")
    assert "| 0 | 1 | 3 | – | – | 30.0 [" in rows[0]
    assert "gained" not in page, "an empty group has no row"


def test_one_item_has_no_interval_and_no_items_no_figures() -> None:
    cells = divergence_cells(made([2]), ["i0"])
    assert cells["kl"] == {"mean": 0.5, "ci95": None}
    assert not math.isnan(cells["same"]["mean"])
    task = {"name": "t", "left_out": {"cut": 5, "thought": 0, "empty": 0}, "respelled": 0, **divergence_cells([], [])}
    assert "items left out: 5" in divergence_markdown({"student": "s", "teacher": "t", "tasks": [task]})
