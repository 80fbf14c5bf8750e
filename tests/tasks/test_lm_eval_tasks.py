"""lm-eval's tasks through its own YAML: log-likelihoods are lm-eval's item by item, and generation sees a known text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

import evalkit
from evalkit.encoding import Encoder
from evalkit.records import GENERATION, LOGLIKELIHOOD, MODES, Item
from evalkit.registry import Task
from evalkit.scoring import decide
from evalkit.views import ask, labels
from tests.tasks.lm_eval_cases import CASES, Case
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = [
    pytest.mark.usefixtures("lm_eval"),
    pytest.mark.filterwarnings("ignore:::lm_eval", "ignore:::datasets", "ignore:::multiprocess"),  # theirs, not ours
]
NATS = 1e-4


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return tiny_llama(len(tokenizer))


def yaml_of(case: Case) -> str:
    import lm_eval.tasks

    return str(Path(lm_eval.tasks.__file__).parent / case.path)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Case]]:
    """What ``datasets.load_dataset`` finds: the rows of the one case put in here."""
    found: dict[str, Case] = {}

    def load_dataset(path: str, name: str | None = None, **kwargs: Any) -> Any:
        [case] = found.values()
        columns = next(iter(case.splits.values()))[0].keys()
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list(rows) if rows else datasets.Dataset.from_dict({c: [] for c in columns})
                for split, rows in case.splits.items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    yield found


def loaded(data: dict[str, Case], name: str, shots: int | None = None) -> tuple[Task, list[Item]]:
    from tasks.lm_eval_tasks import lm_eval_tasks

    data[name] = CASES[name]
    [task] = lm_eval_tasks(yaml_of(CASES[name]), MODES, shots)
    return task, list(task.items(None))


def lm_eval_samples(case: Case, model: Any, tokenizer: Any, shots: int | None, chat: bool = False) -> list[Any]:
    """What lm-eval logs of each document of its own run, under its first filter."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=[yaml_of(case)],
        num_fewshot=shots,
        gen_kwargs={"max_gen_toks": 8},
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        log_samples=True,
        bootstrap_iters=0,
    )
    [samples] = results["samples"].values()
    first = samples[0]["filter"]
    return sorted((s for s in samples if s["filter"] == first), key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("name", CASES)
def test_generation_sees_the_text_written_here(data: dict[str, Case], tokenizer: Any, name: str) -> None:
    case = CASES[name]
    task, items = loaded(data, name, 0 if case.shots else None)
    item, encoder = items[0], Encoder(tokenizer)
    assert (task.loglikelihood, task.generation) == ("native", case.view)
    assert [i.id for i in items] == [f"{task.name}-{at:05d}" for at in range(len(items))]
    assert encoder.prompt([], ask("native", task, item), closed=True) == case.native
    rows = labels(len(item.choices))
    shown = "\n".join(f"{label}. {choice}" for label, choice in zip(rows, item.choices, strict=True))
    expected = (case.generated or case.native).replace("{options}", shown)
    assert encoder.prompt([], ask(task.generation, task, item), closed=False) == expected
    right = {case.choices[i] for i in (case.gold, *case.also)}
    assert set(item.answers) == right
    if len(case.choices) > 1:
        assert sorted(item.choices) == sorted(case.choices)
        if "{options}" not in case.generated:
            assert item.choices == case.choices
    else:
        assert len(item.choices) >= 3 and case.choices[0] in item.choices


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_loglikelihoods_and_accuracies_are_lm_evals(
    data: dict[str, Case], model: Any, tokenizer: Any, name: str, shots: int
) -> None:
    case = CASES[name]
    if shots and (not case.shots or name in ("race", "lambada_openai")):
        number = None
    else:
        number = shots if case.shots else None
    task, items = loaded(data, name, number)
    samples = lm_eval_samples(case, model, tokenizer, number)
    run = evalkit.run(
        model, f"lm_eval:{yaml_of(case)}", tokenizer=tokenizer, shots=number, max_tokens=8, batch_size=8
    )
    encoder = Encoder(tokenizer)
    for item, sample in zip(items, samples, strict=True):
        record = run.records(task.name)[item.id]
        outcome = record.outcome(LOGLIKELIHOOD, "native")
        assert outcome is not None
        one = ask("native", task, item)
        questions = one.questions or (one.question,) * len(one.answers)
        mine = {
            encoder.prompt([], ask_of(one, question), closed=True) + encoder.answer(one, answer): value
            for question, answer, value in zip(questions, one.answers, outcome.logprobs, strict=True)
        }
        theirs = sample["arguments"]
        if task_kind(sample) == "generate_until":
            assert {text[: len(theirs[0][0])] for text in mine} == {theirs[0][0]}
            said = record.outcome(GENERATION, "native")
            assert said is not None and said.reply == sample["resps"][0][0]
            assert float(said.outcome == "correct") == sample["exact_match"]
            continue
        expected = {a[0] + a[1]: r[0] for a, r in zip(theirs, sample["filtered_resps"], strict=True)}
        assert set(expected) <= set(mine)
        assert all(abs(mine[text] - value) <= NATS for text, value in expected.items())
        for metric, normalisation in (("acc", "raw"), ("acc_norm", "character")):
            if len(expected) > 1 and metric in sample:
                decided = decide(outcome, item.gold, item.choices, normalisation, item.also)
                assert not decided.tied and float(decided.outcome == "correct") == sample[metric]


def ask_of(one: Any, question: str) -> Any:
    from dataclasses import replace

    return replace(one, question=question)


def task_kind(sample: Any) -> str:
    return "generate_until" if isinstance(sample["arguments"][0][1], dict) else "loglikelihood"
