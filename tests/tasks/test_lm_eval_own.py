"""YAML of a user's own, with data beside it: what it may say, and what an old run of it can be used for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import evalkit
from evalkit.api_reports import rescore
from evalkit.encoding import Encoder
from evalkit.records import MODES
from evalkit.requests import plan
from evalkit.settings import Settings
from evalkit.views import ask
from tasks.lm_eval_kinds import Kind, kind_of
from tasks.lm_eval_text import listing, one_place
from tests.tasks.lm_eval_cases import CASES, serve, yaml_of
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = [
    pytest.mark.usefixtures("lm_eval"),
    pytest.mark.filterwarnings("ignore:::lm_eval", "ignore:::datasets", "ignore:::multiprocess"),  # theirs, not ours
]

CHOICE = """output_type: multiple_choice
doc_to_text: "Question: {{q}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: choices
"""
SAID = """output_type: generate_until
doc_to_text: "Question: {{q}}\\nAnswer:"
doc_to_target: a
generation_kwargs: {until: ["\\n"], %s}
metric_list: [{metric: %s}]
"""
PLAIN = [{"q": f"What {i}?", "choices": [f"x{i}", f"y{i}", f"z{i}"], "gold": i % 3} for i in range(6)]
WHO = [{"q": f"Who {i}?", "a": f"name{i}"} for i in range(4)]


@pytest.fixture(autouse=True)
def own_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's index of its own 13,000 files takes seconds."""
    from tasks import lm_eval_tasks

    def index(include_path: str | None = None) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval_tasks, "manager", index)


def write(folder: Path, name: str, text: str, rows: list[dict[str, Any]], train: list[dict[str, Any]] = PLAIN) -> str:
    files = {"test": rows, "train": train} if "choices" in rows[0] else {"test": rows}
    for split, lines in files.items():
        (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {split: str(folder / f"{name}-{split}.jsonl") for split in files}
    splits = "test_split: test\n" + ("training_split: train\n" if "train" in files else "")
    kwargs = json.dumps({"data_files": found, "cache_dir": str(folder / "cache")})
    told = f"task: {name}\ndataset_path: json\ndataset_kwargs: {kwargs}\n{splits}{text}"
    (folder / f"{name}.yaml").write_text(told + "metadata: {version: 1.0}\n")
    return f"lm_eval:{folder / f'{name}.yaml'}"


def built(name: str, shots: int | None = None, include: Path | None = None) -> list[Any]:
    from tasks.lm_eval_tasks import lm_eval_tasks

    return lm_eval_tasks(name.removeprefix("lm_eval:"), MODES, shots, None if include is None else str(include))


def test_a_place_is_one_from_the_front_or_from_the_back_and_what_has_no_gold_does_not_count() -> None:
    two, three, four = ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]
    assert one_place([(two, [0]), (three, []), (four, [0])])
    assert one_place([(two, [1]), (three, [2]), (four, [3])])
    assert one_place([(four, [0]), (four, [0, 1]), (three, [0])])
    assert not one_place([(two, [1]), (three, [0]), (two, [1])]) and not one_place([(three, [])])


@pytest.mark.parametrize("golds", [[0, 0, 0, 0, 0, 7], [2, 2, 2, 2, 2, 2], [[0], [0, 1], [0], [0, 1], [0], [0, 2]]])
def test_where_one_place_is_always_right_the_options_are_mixed_and_those_of_examples_too(
    tmp_path: Path, golds: list[Any]
) -> None:
    rows = [{**row, "gold": gold} for row, gold in zip(PLAIN, golds, strict=True)]
    [task] = built(write(tmp_path, "mine", CHOICE, rows, rows))
    items = list(task.items(None))
    assert len({item.gold for item in items}) > 1 and len(items) == len(golds) - golds.count(7)
    # A few-shot split whose gold never moves would teach one letter.
    [task] = built(write(tmp_path, "other", CHOICE, PLAIN, [{**row, "gold": 0} for row in PLAIN]), 2)
    shown = {example.lettered[1] for item in task.items(None) for example in item.native.examples}
    assert len(shown) > 1 and [item.gold for item in task.items(None)] == [row["gold"] for row in PLAIN]


def test_letters_in_another_order_and_last_lines_that_differ_are_not_taken_for_the_tasks_own(tmp_path: Path) -> None:
    assert listing("Which? (A) dog (B) cat", ("cat", "dog"))[0] == ""
    assert listing("Which? (A) cat (B) dog", ("cat", "dog"))[0] == "letters"
    text = CHOICE.replace('"Question: {{q}}\\nAnswer:"', "q")
    names = ("He", "She", "It", "We", "You", "I")
    said = [{**row, "q": f"A door opened.\n{who} said:"} for row, who in zip(PLAIN, names, strict=True)]
    [task] = built(write(tmp_path, "mine", text, said))
    question = ask("letters", task, next(iter(task.items(None)))).question
    assert question == "A door opened.\nHe said:\nA. x0\nB. y0\nC. z0\nAnswer:"


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ("max_new_tokens: 6", 6),
        ("max_tokens: 7", 7),
        ("max_completion_tokens: 8", 8),
        ("max_tokens: 9, max_gen_toks: 5", 5),
    ],
)
def test_the_length_of_a_reply_goes_by_all_of_lm_evals_names(tmp_path: Path, lengths: str, expected: int) -> None:
    [task] = built(write(tmp_path, "mine", SAID % (lengths, "exact_match"), WHO))
    assert {item.native.max_tokens for item in task.items(None)} == {expected}


def test_numbers_are_ranked_against_near_ones_though_a_document_has_no_gold(tmp_path: Path) -> None:
    rows = [{"q": f"How many {i}?", "a": str(10 + i)} for i in range(3)] + [{"q": "How many?", "a": ""}]
    [task] = built(write(tmp_path, "mine", SAID % ("max_gen_toks: 5", "exact_match"), rows))
    items = list(task.items(None))
    assert len(items) == 3 and not set(items[0].choices) <= {"10", "11", "12"}


def test_what_does_not_tell_right_from_wrong_is_no_judge(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lm_eval:mine can only be scored by loglikelihood .*\(it has acc\)"):
        built(write(tmp_path, "mine", SAID % ("max_gen_toks: 5", "acc"), WHO))
    none = "filter_list: [{name: n, filter: [{function: regex, regex_pattern: '(\\d+)'}, {function: take_first}]}]\n"
    with pytest.raises(ValueError, match="lm_eval:mine can't be judged: exact_match of the gold answer 'name0' is 0.0"):
        built(write(tmp_path, "mine", SAID % ("max_gen_toks: 5", "exact_match") + none, WHO))
    (tmp_path / "code.py").write_text("def always(doc, results):\n    return {'exact_match': 1}\n")
    with pytest.raises(ValueError, match="lm_eval:mine can't be judged: .* is 1, of nonsense 1"):
        text = SAID % ("max_gen_toks: 5", "exact_match") + "process_results: !function code.always\n"
        built(write(tmp_path, "mine", text, WHO))


def test_kinds_from_yaml_alone_are_those_of_loaded_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.lm_eval_tasks import _members

    data = serve(monkeypatch)
    for name, case in CASES.items():
        data.clear()
        data[name] = case
        [member] = _members(yaml_of(case), None)
        loaded = member.load().config.to_dict(keep_callable=True)
        assert kind_of(member.config) == kind_of(loaded) == Kind(modes=MODES), name


def test_metrics_that_are_shares_or_arguments_say_nothing_of_one_reply() -> None:
    code = {"output_type": "generate_until", "doc_to_target": "a"}
    for process_results, metric, known in (
        ("/x/lm_eval/tasks/coqa/utils.process_results", "em", False),
        ("/x/lm_eval/tasks/drop/utils.process_results", "em", True),
        ("/x/lm_eval/tasks/babilong/common_utils.process_results", "acc", True),
        (None, "acc", False),
        (None, "/x/lm_eval/tasks/super_glue/multirc/t5_utils.em", False),
        (None, "/x/lm_eval/tasks/french_bench/utils.exact", True),
    ):
        kind = kind_of({**code, "process_results": process_results, "metric_list": [{"metric": metric}]})
        assert (kind.modes == MODES) == known, (process_results, metric)


def test_examples_that_are_not_there_and_faults_in_a_yaml_are_told_with_the_tasks_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for text, shots, message in (
        (CHOICE, 9, "with 9 examples .*Sample larger than population"),
        (CHOICE.replace("{{q}}", "{{q | nofilter}}"), 0, "nofilter"),
        (CHOICE.replace("doc_to_choice: choices", "doc_to_choice: !function code.missing"), 0, "nosuch"),
    ):
        (tmp_path / "code.py").write_text("def missing(doc):\n    return doc['nosuch']\n")
        with pytest.raises(ValueError, match=f"lm_eval:mine.*{message}") as caught:
            built(write(tmp_path, "mine", text, PLAIN), shots)
        assert "\n" not in str(caught.value)
    write(tmp_path, "one", CHOICE, PLAIN)
    write(tmp_path, "zero", CHOICE + "num_fewshot: 0\n", PLAIN)
    (tmp_path / "group.yaml").write_text("group: both\ntask: [one, zero]\n")
    assert [task.name for task in built("both", 2, tmp_path)] == ["lm_eval:one"]
    assert "lm_eval:zero fixes num_fewshot: 0" in caplog.text
    with pytest.raises(ValueError, match="fixes num_fewshot: 0"):
        built("zero", 2, tmp_path)


def test_the_prompts_hash_holds_what_joins_prompt_and_answer(tmp_path: Path) -> None:
    [task] = built(write(tmp_path, "mine", CHOICE, PLAIN))
    item = next(iter(task.items(None)))
    assert item.native is not None
    other = replace(item, native=replace(item.native, joint="\n"))
    encoder = Encoder(tiny_tokenizer())
    hashes = {plan(task, one, [], encoder, Settings(), 2048).prompt_sha256 for one in (item, other)}
    assert len(hashes) == 2


def test_a_task_that_a_group_changed_or_a_file_holds_is_asked_for_by_that_before_anything_is_scored(
    tmp_path: Path,
) -> None:
    tokenizer = tiny_tokenizer()
    how: dict[str, Any] = {"tokenizer": tokenizer, "max_tokens": 4, "batch_size": 8}
    model, include = tiny_llama(len(tokenizer)), {"include_path": str(tmp_path)}
    path = write(tmp_path, "one", CHOICE, PLAIN)
    inline = "".join(f"    {line}\n" for line in (tmp_path / "one.yaml").read_text().splitlines()[1:])
    (tmp_path / "group.yaml").write_text(f"group: g\ntask:\n  - task: one\n    num_fewshot: 2\n  - task: two\n{inline}")
    run = evalkit.run(model, "lm_eval:g", out=tmp_path / "run", **include, **how)
    assert run.tasks == ("lm_eval:one", "lm_eval:g::two")
    assert [task.name for task in built("g::two", None, tmp_path)] == ["lm_eval:g::two"]
    changed = r"lm_eval:one was scored in .* with 2 examples, .* with 0 now; .*--tasks lm_eval:g"
    with pytest.raises(ValueError, match=changed):
        evalkit.compare(run, "nothing", **include)
    with pytest.raises(ValueError, match=changed):
        evalkit.check("nothing", [tmp_path / "run"], **include)
    with pytest.raises(ValueError, match=changed):
        rescore(run, rules="strict", **include)
    both = evalkit.compare(run, model, "lm_eval:g", **include, **how)
    assert set(both.tasks) == set(run.tasks)
    assert rescore(run, rules="strict", files=["lm_eval:g"], **include).tasks == run.tasks
    alone = evalkit.run(model, path, **how)
    for ask_again in (lambda: evalkit.compare(alone, "nothing"), lambda: rescore(alone, rules="strict")):
        with pytest.raises(ValueError, match=r"none of lm-eval's own tasks; name its file: --tasks lm_eval:PATH/one"):
            ask_again()
