"""The two units of a gap: raw points, and formula scores that take chance out.

A formula score u is 1 for a right answer and -p / (1 - p) for a wrong one, where guessing is right with chance p: of C
options -1 / (C - 1), so that a guesser's mean is 0. No answer, or two, is 0: it was no guess.
"""

import math
from typing import Literal

from evalkit.records import LOGLIKELIHOOD, ItemRecord, Outcome
from evalkit.stats.intervals import Interval

Verdict = Literal[
    "log-likelihood hides loss",
    "log-likelihood shows more loss than generation",
    "depends on the scale",
    "no difference shown",
]


def penalty(record: ItemRecord) -> float:
    """What a wrong guess costs; 0 where all options are the same text, so that no guess is wrong."""
    chance = sum(choice in record.answers for choice in record.choices) / len(record.choices)
    return chance / (1 - chance) if chance < 1 else 0.0


def formula_score(record: ItemRecord, outcome: Outcome, listed: bool) -> float:
    """u of one outcome; ``listed``: generation saw the options, so that a wrong answer may have been a guess.

    A k-way tie in log-likelihood scores the mean of u over the tied choices.
    """
    if outcome.outcome == "correct":
        return 1.0
    guessed = outcome.mode == LOGLIKELIHOOD or listed
    if outcome.outcome == "wrong":
        return -penalty(record) if guessed else 0.0
    if outcome.mode == LOGLIKELIHOOD and outcome.tied:
        right = sum(record.choices[i] in record.answers for i in outcome.tied) / len(outcome.tied)
        return right - (1 - right) * penalty(record)
    return 0.0


def log_odds(teacher: float, student: float, gap: Interval) -> Interval:
    """logit(teacher) - logit(student) of two accuracies, with the interval of their ``gap`` carried over: each bound is
    the loss that it means about the mean accuracy. It excludes 0 exactly where the gap's does.

    Accuracies are kept half an item away from 0 and 1, where the log-odds have no end.
    """
    edge, middle = 0.5 / gap.n, (teacher + student) / 2

    def loss(difference: float) -> float:
        ends = (middle + difference / 2, middle - difference / 2)
        one, other = (min(max(end, edge), 1 - edge) for end in ends)
        return math.log(one / (1 - one)) - math.log(other / (1 - other))

    return Interval(mean=loss(teacher - student), low=loss(gap.low), high=loss(gap.high), n=gap.n)


def verdict(raw: Interval, formula: Interval) -> Verdict:
    """What a gap between the modes (generation's loss minus log-likelihood's) allows one to say.

    The sign of such a gap can depend on the unit, so a claim needs both intervals on one side of 0.
    """
    sides = {_side(raw), _side(formula)}
    if sides == {1}:
        return "log-likelihood hides loss"
    if sides == {-1}:
        return "log-likelihood shows more loss than generation"
    return "no difference shown" if sides == {0} else "depends on the scale"


def _side(interval: Interval) -> int:
    return 1 if interval.low > 0 else -1 if interval.high < 0 else 0
