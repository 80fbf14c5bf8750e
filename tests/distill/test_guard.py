"""The guard asks about items that nothing is trained on, and leaves the model as it was."""

import json
from pathlib import Path

import pytest
import torch

from distill.guard import Guardian
from distill.stage import Guard, Source
from evalkit.registry import get_task
from tests.distill.streams import TOKENIZER, epochs_of, stream
from tests.distill.students import loaded

ANSWER = {"role": "assistant", "content": "A dog."}


def guardian(**options: object) -> Guardian:
    return Guardian(Guard.model_validate({"tasks": ["arithmetic"], "items": 3, **options}), TOKENIZER, None)


def asked(made: Guardian) -> set[str]:
    [(_, items)] = made._items
    return {item.id for item in items}


def test_its_items_are_of_the_train_split_and_always_the_same() -> None:
    task = get_task("arithmetic")
    assert task.pool is not None
    assert asked(guardian()) == asked(guardian()) <= {item.id for item in task.pool(None)}
    assert not set(guardian().questions) & {item.question for item in task.items(None)}
    assert len(guardian().questions) == 3 and asked(guardian(items=2)) < asked(guardian())


def test_its_items_are_never_in_the_stream_from_whatever_source(tmp_path: Path) -> None:
    made = guardian()
    quoted = [
        {"id": f"q{n}", "messages": [{"role": "user", "content": f"Tell me:  {question.upper()}"}, ANSWER]}
        for n, question in enumerate([*made.questions, "Which animal barks?"])
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in quoted), encoding="utf-8")
    mixture = (Source(task="arithmetic", views=("open",)), Source(chat=(str(file),)))
    rows = stream(*mixture, exclude=made.questions, seq_len=256)
    seen = {label for batch in epochs_of("arithmetic", rows, 2) for label in batch.examples}
    free = {label for batch in epochs_of("arithmetic", stream(*mixture, seq_len=256), 2) for label in batch.examples}
    held = {f"arithmetic: {name} (open)" for name in asked(made)} | {f"chat.jsonl: q{n}" for n in range(3)}
    assert "chat.jsonl: q3" in seen and not seen & held
    assert free == seen | held
    assert rows.left_out == {"with a held-out question": 6}


def test_it_generates_and_leaves_the_model_as_it_was() -> None:
    model = loaded().model
    model.train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    generator = torch.get_rng_state()
    found = guardian().evaluate(model)
    assert found["arithmetic"]["items"] == 3
    assert 0 <= found["arithmetic"]["accuracy"] <= 1 and 0 <= found["arithmetic"]["unparsed"] <= 1
    assert model.training and torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    model(torch.arange(5)[None]).logits.sum().backward()  # nothing made under inference_mode stays behind


def test_what_it_can_t_ask_is_refused_before_anything_starts() -> None:
    assert not guardian(tasks=[]).wanted and guardian(tasks=[]).questions == ()
    with pytest.raises(ValueError, match="unknown task 'arithmetics': did you mean 'arithmetic'"):
        guardian(tasks=["arithmetics"])
    with pytest.raises(ValueError, match="task 'arithmetic' has no view 'riddle': its views are"):
        guardian(view="riddle")
    with pytest.raises(ValueError, match="can't use task 'quick': it has no TRAIN split"):
        guardian(tasks=["quick"])
