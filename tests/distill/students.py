"""Recipes and tiny teachers, loaded as the distiller has them."""

from typing import Any

from distill.stage import Recipe
from models.load import Loaded, describe
from tests.models.hybrids import tiny_teacher
from tests.tiny import tiny_tokenizer


def loaded(family: str = "llama", **options: Any) -> Loaded:
    """A tiny teacher of three layers with a tokenizer of its vocabulary."""
    return describe(tiny_teacher(family, vocab_size=400, **options), tiny_tokenizer(), "tiny")


def recipe(dtype: str = "float32", seed: int = 0, **student: Any) -> Recipe:
    """Of one stage that nobody runs; ``student``: fields of distill.stage.Student. Layer 1 of three is kept."""
    stage = {"name": "s", "loss": "ce", "train": ["all"], "data": "d", "tokens": 64, "seq_len": 16, "batch": 1, "lr": 1}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "teacher": "tiny",
            "student": {"keep": "1", **student},
            "data": {"d": [{"text": ["own"]}]},
            "stages": [stage],
            "dtype": dtype,
            "seed": seed,
        }
    )
