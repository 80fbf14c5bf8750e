"""Probability mass on the choices: letters renormalise, so a model may rank them well and never say one."""

import math
from collections.abc import Sequence

from evalkit.records import Outcome


def choice_mass(outcome: Outcome) -> float | None:
    """Chance that the model's next token is one of the choices, where each is one token; None otherwise.

    Choices of equal log-probability and text ("A" twice) do not occur in views that list options by letter.
    """
    if not outcome.logprobs or any(count != 1 for count in outcome.tokens):
        return None
    return min(1.0, math.fsum(math.exp(logprob) for logprob in outcome.logprobs))


def masses(outcomes: Sequence[Outcome]) -> list[float]:
    """The mass of every outcome that has one."""
    return [mass for outcome in outcomes if (mass := choice_mass(outcome)) is not None]
