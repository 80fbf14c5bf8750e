"""What a user may ask of a run, and nothing that could not change a score."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from evalkit.records import MODES, Mode, Normalisation, Rules
from evalkit.registry import Task

THOUGHT_TOKENS = 4096
"""The thinking budget of ``--thinking on``."""


class Settings(BaseModel):
    """Two runs are comparable when these are equal. ``None``: as the task declares it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    modes: tuple[Mode, ...] = MODES
    view: str | None = None
    """One view for both modes ("letters"), or log-likelihood's and generation's ("cloze:letters")."""
    shots: Annotated[int, Field(ge=0)] | None = None
    chat: bool = False
    """Prompts go through the tokenizer's chat template."""
    system: str = ""
    """System message; needs ``chat``."""
    thinking: str = "off"
    """"off", "on" (at most 4,096 tokens, an unfinished block is truncated) or "budget=N" (closed after N)."""
    shuffle_seed: int | None = None
    """Shuffle every item's options with this seed."""
    permutations: Annotated[int, Field(ge=1)] = 1
    """Every item in so many orders of its options, each option in another place each time; they are one cluster."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Items a task, the same for every model: those with the lowest hash."""
    normalisation: Normalisation | None = None
    rules: Rules = "lenient"
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Length limit of a generated answer (tokens); the thinking block has a budget of its own."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    seed: int = 0

    def views_of(self, task: Task) -> tuple[str, str]:
        """(log-likelihood's view, generation's view) of ``task``; ValueError if it lacks one."""
        if self.view is None:
            return task.loglikelihood, task.generation
        first, _, second = self.view.partition(":")
        chosen = (first, second or first)
        for mode, view in zip(MODES, chosen, strict=True):
            if mode in self.modes and view not in task.views:
                raise ValueError(f"task {task.name!r} has no view {view!r}: its views are {', '.join(task.views)}")
        if "generation" in self.modes and chosen[1] == "blank":
            raise ValueError(
                f"view 'blank' scores text after the gap and cannot generate; "
                f"give generation another one, e.g. --view blank:{task.generation}"
            )
        return chosen

    def thought_budget(self) -> tuple[int, bool] | None:
        """(tokens, close by force at the budget) of the thinking block; None: thinking is off."""
        if self.thinking == "off":
            return None
        if self.thinking == "on":
            return THOUGHT_TOKENS, False
        match = re.fullmatch(r"budget=([1-9]\d*)", self.thinking)
        if match is None:
            raise ValueError(f"thinking is {self.thinking!r}: expected 'on', 'off' or 'budget=N' with N of 1 or more")
        return int(match[1]), True
