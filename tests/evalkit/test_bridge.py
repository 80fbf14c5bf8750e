"""Bridge cells: whose reasoning is read, what it is cut to, and parts that add up."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import evalkit as ek
from evalkit.api_reports import bridge
from evalkit.bridge import endings, reasoning, rights_after
from evalkit.encoding import Encoder
from evalkit.records import GENERATION, LOGLIKELIHOOD, ItemRecord, Outcome, TaskEntry
from reports.bridge import bridge_cells, bridge_markdown
from tests.evalkit.test_cli import in_process
from tests.oracles import CharTokenizer, TableEngine

ENTRY = TaskEntry(
    name="t", version="1", loglikelihood="cot", generation="cot", normalisation="raw", shots=0, n=1, listed=True
)


def record(reply: str, span: tuple[int, int] | None, choices: tuple[str, ...] = ("cat", "dog")) -> ItemRecord:
    said = Outcome(mode=GENERATION, view="cot", outcome="correct", reply=reply, span=span)
    return ItemRecord(
        task="t",
        version="1",
        item="i",
        prompt_sha256="h",
        gold=1,
        choices=choices,
        prompts={"cot": "Q?\nAnswer:"},
        outcomes=(said,),
    )


@pytest.mark.parametrize(
    ("reply", "answer", "kept"),
    [
        ("It barks. So it is a dog. The answer is B.", "B", "It barks. So it is a dog."),
        ("It barks\nThe answer is B.", "B", "It barks"),
        ("B", "B", ""),
        ("It barks and barks", "", "It barks and barks"),
    ],
)
def test_reasoning_ends_before_the_sentence_that_answers(reply: str, answer: str, kept: str) -> None:
    at = reply.rindex(answer) if answer else 0
    assert reasoning(record(reply, (at, at + 1) if answer else None)) == kept


def test_endings_are_those_of_the_view() -> None:
    assert endings(record("", None), ENTRY) == ("The answer is A.", "The answer is B.")
    assert endings(record("", None, ("4", "5")), replace(ENTRY, listed=False)) == (
        "The answer is 4.",
        "The answer is 5.",
    )


def test_endings_are_ranked_after_prompt_and_reasoning() -> None:
    engine = TableEngine({" The answer is A.": -3.0, " The answer is B.": -1.0})
    encoder = Encoder(CharTokenizer())
    one = record("x", None)
    assert rights_after([one, one], ["It barks.", ""], ENTRY, encoder, engine) == [True, True]
    prompts = [engine._tokenizer.decode(request.prompt) for request in engine.seen]
    assert [prompt.partition("The answer")[0].rstrip() for prompt in prompts] == [
        "Q?\nAnswer: It barks.",
        "Q?\nAnswer:",
    ]


def test_options_of_equal_text_are_one_answer() -> None:
    engine = TableEngine({" The answer is 4.": -1.0, " The answer is 5.": -3.0})
    one = record("x", None, ("4", "5", "4"))
    other = replace(one, gold=2)
    free = replace(ENTRY, listed=False)
    assert rights_after([one, other], ["", ""], free, Encoder(CharTokenizer()), engine) == [False, True]


def test_the_parts_add_up_to_the_loss() -> None:
    rng = np.random.default_rng(0)
    draws = [(rng.random(300) < share).tolist() for share in (0.9, 0.85, 0.8, 0.6, 0.5)]
    names = ("teacher_own", "teacher_said", "student_given", "student_own", "student_said")
    found = bridge_cells(**dict(zip(names, draws, strict=True)), clusters=[str(i) for i in range(300)])  # type: ignore[arg-type]
    parts = {name: cell["mean"] for name, cell in found["parts"].items()}
    assert parts["reading"] + parts["rolling"] + parts["saying"] == pytest.approx(parts["loss"])
    assert parts["loss"] == pytest.approx(np.mean(draws[1]) - np.mean(draws[4]))
    assert parts["rolling"] == pytest.approx(np.mean(draws[2]) - np.mean(draws[3]))


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bridge")
    file = folder / "mine.jsonl"
    rows = [{"question": f"Which is {i}?", "choices": [f"{i}", f"{i + 1}"], "answer": i % 2} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, model in (("one", tiny_folder), ("two", other_folder)):
        ek.run(model, [str(file)], view="cot", max_tokens=12, out=folder / name)
    ek.run(tiny_folder, [str(file)], view="letters", out=folder / "letters")
    return folder


def test_after_no_reasoning_a_bridge_cell_is_the_view_s_own_ranking(runs: Path, tiny_folder: Path) -> None:
    from evalkit.engines.hf import HFEngine
    from models.load import load

    run = ek.load_run(runs / "one")
    loaded = load(str(tiny_folder))
    engine = HFEngine(loaded.model, loaded.tokenizer)
    records = list(run.records("mine").values())
    found = rights_after(records, [""] * 6, run.manifest.entry("mine"), Encoder(engine.tokenizer), engine)
    outcomes = [r.outcome(LOGLIKELIHOOD, "cot") for r in records]
    assert found == [o is not None and o.outcome == "correct" for o in outcomes]


def test_the_command_writes_cells_that_add_up(runs: Path, tmp_path: Path) -> None:
    done = in_process("bridge", runs / "one", runs / "two", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bridge.json").read_text())
    parts = {name: cell["mean"] for name, cell in result["tasks"][0]["parts"].items()}
    assert parts["reading"] + parts["rolling"] + parts["saying"] == pytest.approx(parts["loss"])
    assert (tmp_path / "bridge.md").read_text() == bridge_markdown(result)


def test_what_cannot_be_bridged_is_said(runs: Path, tiny_folder: Path, other_folder: Path) -> None:
    with pytest.raises(ValueError, match="no common task was generated in view 'cot'"):
        bridge(runs / "letters", runs / "letters")
    with pytest.raises(ValueError, match="is not the model that was scored"):
        bridge(runs / "one", runs / "two", models=(other_folder, other_folder))
    with pytest.raises(ValueError, match="no reply in view 'cot'"):
        reasoning(next(iter(ek.load_run(runs / "letters").records("mine").values())))
