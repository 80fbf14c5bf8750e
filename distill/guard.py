"""A sign of life while training: accuracy by generation on TRAIN items that no stage is trained on.

Never a figure to report, and never what a checkpoint is chosen by for a report: its items come from the pool that the
training data comes from, and every example that holds one of their questions is left out of that data.
"""

from pathlib import Path
from typing import Any

import tasks  # noqa: F401  # registers them
from distill.stage import Guard
from evalkit.encoding import Encoder
from evalkit.engines.hf import HFEngine
from evalkit.evaluate import evaluate
from evalkit.records import GENERATION, Item
from evalkit.registry import Task, get_task
from evalkit.requests import plan
from evalkit.selection import digest
from evalkit.settings import Settings


class Guardian:
    """The guard's items, and the questions that training must not see."""

    def __init__(self, guard: Guard, tokenizer: Any, data_dir: Path | None) -> None:
        self._tokenizer = tokenizer
        self._settings = Settings(modes=(GENERATION,), view=guard.view, shots=0)
        self._items: list[tuple[Task, list[Item]]] = []
        for task in map(get_task, guard.tasks):
            self._settings.views_of(task)  # refuses a view that the task lacks
            self._items.append((task, _items(task, guard.items, data_dir)))

    @property
    def wanted(self) -> bool:
        return bool(self._items)

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(item.question for _, items in self._items for item in items)

    def evaluate(self, model: Any) -> dict[str, dict[str, float]]:
        """Task -> accuracy and unparsed (rates), and items (how many)."""
        engine = HFEngine(model, self._tokenizer)
        encoder = Encoder(self._tokenizer, chat=False, system="", thinking=False)
        found = {}
        try:
            for task, items in self._items:
                plans = [plan(task, item, (), encoder, self._settings, engine.max_length) for item in items]
                said = [record.outcomes[0] for record in evaluate(task, plans, engine, self._settings)]
                found[task.name] = {
                    "accuracy": sum(one.outcome == "correct" for one in said) / len(said),
                    "unparsed": sum(one.outcome == "unparsed" for one in said) / len(said),
                    "items": float(len(said)),
                }
        finally:
            engine.close()  # the training goes on in the same memory
        return found


def _items(task: Task, number: int, data_dir: Path | None) -> list[Item]:
    if task.pool is None:
        raise ValueError(f"the guard can't use task {task.name!r}: it has no TRAIN split, only items that are reported")
    items = list(task.pool(data_dir))
    if not items:
        raise ValueError(f"the guard's task {task.name!r} has no TRAIN items in {data_dir}: name another --data-dir")
    return sorted(items, key=lambda item: digest("guard", task.name, item.id))[:number]
