"""lm-eval's tasks through its own YAML: its log-likelihoods item by item, and for generation the text written here."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

import evalkit
from evalkit.encoding import Encoder
from evalkit.records import GENERATION, LOGLIKELIHOOD, MODES, Generated, Item, Outcome
from evalkit.registry import Task
from evalkit.requests import plan
from evalkit.scoring import decide, score_generation
from evalkit.selection import select
from evalkit.settings import Settings
from evalkit.views import ask, labels
from tasks.lm_eval_text import gap, listing
from tests.tasks.lm_eval_cases import CASES, serve, yaml_of
from tests.tasks.lm_eval_rows import ARC, Case, arc
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


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> dict[str, Case]:
    return serve(monkeypatch)


def loaded(data: dict[str, Case], name: str, shots: int | None = None) -> tuple[Task, list[Item]]:
    from tasks.lm_eval_tasks import lm_eval_tasks

    data.clear()
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
        assert len(item.choices) >= 2 and case.choices[0] in item.choices


@pytest.mark.parametrize(
    ("name", "shots"), [(name, shots) for name, case in CASES.items() for shots in ((0, 2) if case.shots else (0,))]
)
def test_loglikelihoods_and_accuracies_are_lm_evals(
    data: dict[str, Case], model: Any, tokenizer: Any, name: str, shots: int
) -> None:
    case = CASES[name]
    number = shots if case.shots else None
    task, items = loaded(data, name, number)
    samples = lm_eval_samples(case, model, tokenizer, number)
    run = evalkit.run(model, f"lm_eval:{yaml_of(case)}", tokenizer=tokenizer, shots=number, max_tokens=8, batch_size=8)
    encoder = Encoder(tokenizer)
    for item, sample in zip(items, samples, strict=True):
        record = run.records(task.name)[item.id]
        outcome = record.outcome(LOGLIKELIHOOD, "native")
        assert outcome is not None
        one = ask("native", task, item)
        questions = one.questions or (one.question,) * len(one.answers)
        mine = {
            encoder.prompt([], replace(one, question=question), closed=True) + encoder.answer(one, answer): value
            for question, answer, value in zip(questions, one.answers, outcome.logprobs, strict=True)
        }
        theirs = sample["arguments"]
        if task_kind(sample) == "generate_until":
            gold = sample["target"] if isinstance(sample["target"], str) else sample["target"][0]
            joint = " " if name != "babi" else ""
            expected = f"{theirs[0][0]}{joint}{gold.rpartition('#### ')[2].replace(',', '')}"
            assert expected in mine and all(text.startswith(theirs[0][0]) for text in mine)
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


def task_kind(sample: Any) -> str:
    return "generate_until" if isinstance(sample["arguments"][0][1], dict) else "loglikelihood"


@pytest.mark.parametrize("name", ["arc_easy", "mmlu_anatomy", "winogrande", "gsm8k", "arc_challenge_chat"])
def test_in_a_chat_the_prompts_are_lm_evals(data: dict[str, Case], model: Any, tokenizer: Any, name: str) -> None:
    shots = 2 if CASES[name].shots else None
    task, items = loaded(data, name, shots)
    samples = lm_eval_samples(CASES[name], model, tokenizer, shots, chat=True)
    encoder = Encoder(tokenizer, chat=True)
    for item, sample in zip(items, samples, strict=True):
        one = ask("native", task, item)
        asked = [replace(one, question=question) for question in one.questions] or [one]
        theirs = [context for context, _ in sample["arguments"]]
        assert {encoder.prompt([], x, closed=True) for x in asked} == set(theirs)
        if name not in ("gsm8k", "arc_challenge_chat"):
            assert [encoder.answer(one, answer) for answer in one.answers] == [text for _, text in sample["arguments"]]


def test_examples_list_their_options_too_where_the_item_does(data: dict[str, Case], tokenizer: Any) -> None:
    task, [item, *_] = loaded(data, "winogrande", 1)
    [example] = item.native.examples if item.native else []
    assert example.lettered in {
        ("The dog chased the cat because the _ was angry.\nA. dog\nB. cat\nAnswer:", "A"),
        ("Tom paid Jim since _ had won.\nA. Tom\nB. Jim\nAnswer:", "B"),
        ("The ice beat the fire as the _ was weak.\nA. ice\nB. fire\nAnswer:", "B"),
    }
    text = Encoder(tokenizer).prompt([], ask("letters", task, item), closed=False)
    assert text == f"{example.lettered[0]} {example.lettered[1]}\n\n{CASES['winogrande'].generated}"
    # Where the gold always stands at one place, the examples' options are in an order by hash as well.
    _, sciq = loaded(data, "sciq", 3)
    assert len({example.lettered[1] for one in sciq for example in (one.native.examples if one.native else ())}) > 1


REPLIES = {
    "gsm8k": {
        "3 + 4 = 7\n#### 7": ("correct", "7"),
        "#### 8": ("wrong", "8"),
        "It is 7.": ("unparsed", ""),
        "": ("empty", ""),
    },
    "triviaqa": {" jane austen ": ("correct", "jane austen"), "Austen": ("correct", "Austen"), "Bob": ("wrong", "Bob")},
    "lambada_openai": {
        " key, which": ("correct", "key"),
        "keyhole": ("wrong", "keyhole"),
        " the key": ("wrong", "the"),
    },
    "arc_easy": {" B. root": ("correct", "B"), "petal": ("wrong", "petal"), "Answer: (B)": ("correct", "B")},
    "mmlu_anatomy": {" B": ("correct", "B"), "heart": ("correct", "heart"), "C. skin": ("wrong", "C")},
    "anli_r1": {" True": ("correct", "True"), "Neither": ("wrong", "Neither"), "Perhaps so": ("unparsed", "")},
    "agieval_aqua_rat": {" B": ("correct", "B"), "(D)": ("correct", "D"), " A": ("wrong", "A")},
}


@pytest.mark.parametrize("name", REPLIES)
def test_replies_are_judged_by_the_tasks_own_filter_and_metric_or_read_as_anywhere(
    data: dict[str, Case], name: str
) -> None:
    task, [item, *_] = loaded(data, name, 0 if CASES[name].shots else None)
    for reply, expected in REPLIES[name].items():
        said = Generated(text=reply, tokens=(5,), finish="stop")
        outcome = score_generation(task.generation, ask(task.generation, task, item), item, said, "lenient")
        assert (outcome.outcome, outcome.answer) == expected, reply


@pytest.mark.parametrize(
    ("question", "choices", "expected"),
    [
        ("Q\nA. x\nB. y, or A. z\nAnswer:", ("A", "B"), ("letters", ("x", "y, or A. z"))),
        ("Q Options: (A) one two (B) three", ("(A)", "(B)"), ("letters", ("one two", "three"))),
        ("Which, A or B?", ("A", "B"), ("letters", ("A", "B"))),
        ("Q\nA: red\nB: blue\nAnswer:", ("red", "blue"), ("letters", ("red", "blue"))),
        ("Q\n1. red\n2. blue\nAnswer:", ("red", "blue"), ("words", ("red", "blue"))),
        ("Is it wet? Yes or no?", ("no", "yes"), ("words", ("no", "yes"))),
        ("Is it 'positive', 'neutral' or 'negative'?", ("negative", "neutral", "positive"), None),
        ("The dog saw the cat. Who ran?", ("dog", "cat"), ("", ("dog", "cat"))),
        ("An entailed text: true?", ("true", "untrue"), ("", ("true", "untrue"))),
    ],
)
def test_a_question_lists_its_options_where_nothing_else_stands_between_them(
    question: str, choices: tuple[str, ...], expected: tuple[str, tuple[str, ...]] | None
) -> None:
    assert listing(question, choices) == (expected or ("words", choices))


def test_contexts_are_cut_at_words_into_what_they_share_and_what_each_has() -> None:
    assert gap(["Ann ate as Ann was", "Ann ate as Andy was"]) == (("Ann ate as ", " was"), ("Ann", "Andy"))
    assert gap(["a cat", "a cat sat"]) == (("a ", ""), ("cat", "cat sat"))
    assert gap(["so it went", "so went"]) == (("so ", ""), ("it went", "went"))
    assert gap(["a b ", "a b c"]) == (("", ""), ("a b ", "a b c")), "nothing would be left of the first"


def test_generation_keeps_the_tasks_own_stops_and_length(data: dict[str, Case], tokenizer: Any) -> None:
    task, [item, *_] = loaded(data, "gsm8k", 2)
    for chat in (False, True):
        planned = plan(task, item, [], Encoder(tokenizer, chat=chat), Settings(chat=chat), 10_000)
        [generation] = [request.generation for request in planned.requests if request.generation]
        assert generation.stops == ("Question:", "</s>", "<|im_end|>") and generation.max_tokens == 256


def test_several_right_choices_are_right_in_both_modes_and_tie_without_loss(data: dict[str, Case]) -> None:
    _, [item, *_] = loaded(data, "agieval_aqua_rat")
    outcome = Outcome(mode=LOGLIKELIHOOD, view="native", outcome="wrong")
    for sums, verdict in (
        ((-3.0, -1.0, -2.0, -1.0), "correct"),
        ((-3.0, -2.0, -2.0, -1.0), "correct"),
        ((-1.0, -1.0, -2.0, -3.0), "ambiguous"),
        ((-1.0, -2.0, -3.0, -3.0), "wrong"),
    ):
        assert decide(replace(outcome, logprobs=sums), item.gold, item.choices, "raw", item.also).outcome == verdict


REFUSED = {
    "truthfulqa/truthfulqa_mc2.yaml": r"lm_eval:truthfulqa_mc2 can't be scored: its own code \(process_results_mc2\)",
    "wikitext/wikitext.yaml": "lm_eval:wikitext can't be scored: output_type loglikelihood_rolling",
    "humaneval/humaneval.yaml": "lm_eval:humaneval can't be scored: it runs code that the model wrote",
    "squadv2/squadv2.yaml": "lm_eval:squadv2 can't be scored: a Python class of its own",
    "wmt2016/ro_en-t5_prompt.yaml": r"can only be scored by loglikelihood \(--mode loglikelihood\): no metric says",
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_lacks_a_mode_or_cannot_be_derived_is_refused_by_name(path: str) -> None:
    import lm_eval.tasks

    with pytest.raises(ValueError, match=REFUSED[path]):
        evalkit.run("nothing", f"lm_eval:{Path(lm_eval.tasks.__file__).parent / path}")


def test_what_lm_eval_would_not_do_either_is_refused(data: dict[str, Case], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fixes num_fewshot: 0"):
        loaded(data, "blimp_adjunct_island", 3)
    (tmp_path / "group.yaml").write_text("group: mine\ntask: [arc_easy]\n")
    with pytest.raises(ValueError, match="no file with a task in it"):
        evalkit.run("nothing", f"lm_eval:{tmp_path / 'group.yaml'}")


def test_documents_that_make_no_item_are_left_out_and_said(
    data: dict[str, Case], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*ARC, arc("Which is none?", "a", " ", key="A")]
    monkeypatch.setitem(CASES, "broken", replace(CASES["arc_easy"], splits={**CASES["arc_easy"].splits, "test": rows}))
    _, items = loaded(data, "broken", 0)
    assert [item.id[-5:] for item in items] == ["00000", "00001"]
    assert "1 of 3 documents are left out; lm_eval:arc_easy-00002: choice 1 is empty" in caplog.text


def test_only_a_text_that_lists_its_options_fixes_their_order(data: dict[str, Case], tokenizer: Any) -> None:
    listed, _ = loaded(data, "mmlu_anatomy", 0)
    with pytest.raises(ValueError, match="their order can't be changed"):
        select(listed, Settings(shuffle_seed=1), None)
    task, items = loaded(data, "winogrande", 0)
    one, turned, *_ = select(task, Settings(permutations=2), None).items
    assert turned.choices == one.choices[::-1]
    assert ask("native", task, turned).questions == ask("native", task, one).questions[::-1]
    with pytest.raises(ValueError, match="a prompt for each choice and can't generate"):
        plan(task, items[0], [], Encoder(tokenizer), Settings(view="native"), 2048)


def test_names_groups_tags_and_own_files_are_lm_evals(data: dict[str, Case], tmp_path: Path) -> None:
    """lm-eval's index of its 13,000 YAML files takes most of this test's time."""
    from tasks.lm_eval_tasks import kinds, lm_eval_tasks, members

    arc_easy = yaml_of(CASES["arc_easy"])
    (tmp_path / "mine.yaml").write_text(f"include: {arc_easy}\ntask: mine\ntag: my_tag\nnum_fewshot: 1\n")
    (tmp_path / "group.yaml").write_text("group: my_group\ntask:\n  - mine\n  - truthfulqa_mc2\n  - task: copa\n")
    own = str(tmp_path)
    assert members("my_tag", own) == ["lm_eval:mine"]
    assert members("my_group", own) == ["lm_eval:mine", "lm_eval:truthfulqa_mc2", "lm_eval:copa"]
    assert members("ai2_arc", own) == ["lm_eval:arc_challenge", "lm_eval:arc_easy"]
    assert len(members("mmlu", own)) == 57
    with pytest.raises(ValueError, match="no task, group or tag 'arc_eazy': did you mean lm_eval:arc_easy"):
        members("arc_eazy", own)
    data["mine"] = CASES["arc_easy"]
    [task] = lm_eval_tasks("my_tag", MODES, None, own)
    assert (task.name, task.shots, task.normalisation) == ("lm_eval:mine", 1, "character")
    told = dict(kinds("", own))
    ranked = {name for name, kind in told.items() if kind.modes == MODES}
    assert {"arc_easy", "hellaswag", "gsm8k", "lambada_openai", "agieval_lsat_ar", "mine"} <= ranked
    assert len(ranked) > 11_000 and told["wikitext"].modes == told["unfair_tos"].modes == ()
    assert all(kind.reason for kind in told.values() if kind.modes != MODES)


def test_of_a_group_what_is_refused_is_left_out_and_said(
    data: dict[str, Case], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import lm_eval_tasks

    def index(include_path: str | None) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval_tasks, "manager", index)
    (tmp_path / "one.yaml").write_text(f"include: {yaml_of(CASES['arc_easy'])}\ntask: one\n")
    (tmp_path / "two.yaml").write_text("task: two\noutput_type: loglikelihood_rolling\n")
    (tmp_path / "group.yaml").write_text("group: both\nnum_fewshot: 2\ntask:\n  - one\n  - two\n")
    data["one"] = CASES["arc_easy"]
    [task] = lm_eval_tasks.lm_eval_tasks("both", MODES, None, str(tmp_path))
    assert (task.name, task.shots) == ("lm_eval:one", 2)
    assert "lm_eval:two can't be scored: output_type loglikelihood_rolling" in caplog.text


def test_a_copy_on_disk_takes_the_hubs_place_in_a_yaml_of_ones_own(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rows = {"test": ARC, "train": CASES["arc_easy"].splits["train"]}
    for split, lines in rows.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "mine.yaml").write_text(
        f"include: {yaml_of(CASES['arc_easy'])}\ntask: mine\ndataset_path: json\ndataset_name: null\n"
        f"validation_split: null\ndataset_kwargs:\n  cache_dir: {tmp_path / 'cache'}\n  data_files:\n"
        f"    test: {tmp_path / 'test.jsonl'}\n    train: {tmp_path / 'train.jsonl'}\n"
    )
    task = f"lm_eval:{tmp_path / 'mine.yaml'}"
    one = evalkit.run(model, task, tokenizer=tokenizer, shots=1, max_tokens=4, out=tmp_path / "run")
    assert one.tasks == ("lm_eval:mine",)
    both = evalkit.compare(tmp_path / "run", model, task, tokenizer=tokenizer)
    assert both.gap("lm_eval:mine", LOGLIKELIHOOD).mean == 0 and "protocol" in both.to_markdown().lower()


def test_without_lm_eval_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(ValueError, match=r"pip install 'evalkit\[lm-eval\]'"):
        evalkit.run("nothing", "lm_eval:x.yaml")


def test_data_that_cannot_be_read_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"lm_eval:arc_easy could not be loaded \(no network\)"):
        evalkit.run("nothing", f"lm_eval:{yaml_of(CASES['arc_easy'])}")
