"""A teacher that says what it is told: its answers as lines, resumed, and read back as a source."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill.generate import generate_answers, read_prompts
from distill.packing import Stream
from distill.sources import Example
from distill.stage import Source
from distill.tokens import Library
from models.load import Loaded
from tests.tiny import chain_llama, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def speaker(answer: str = " a dog") -> Loaded:
    """After the line break that follows "assistant" it says ``answer``."""
    [newline] = TOKENIZER.encode("\n", add_special_tokens=False)
    chain = [newline, *TOKENIZER.encode(answer, add_special_tokens=False)]
    return Loaded(
        name="speaker", model=chain_llama(len(TOKENIZER), chain), tokenizer=TOKENIZER, identity=f"says{answer}"
    )


def chats(file: Path, n: int = 5) -> Path:
    rows = [
        {
            "id": f"q{number}",
            "messages": [
                {"role": "system", "content": "Copy"},
                {"role": "user", "content": f"Which animal barks? {number}"},
                {"role": "assistant", "content": "someone else's answer"},
            ],
        }
        for number in range(n)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prompts(file: Path) -> list[Example]:
    return read_prompts([file])


def answer(file: Path, out: Path, loaded: Loaded | None = None, **options: Any) -> dict[str, int]:
    given: dict[str, Any] = {"max_tokens": 8, "batch_size": 2}
    return generate_answers(loaded or speaker(), prompts(file), out=out, **{**given, **options})


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_last_answer_is_replaced_by_the_teachers(tmp_path: Path):
    told: list[tuple[str, int, int]] = []
    counts = answer(chats(tmp_path / "c.jsonl"), tmp_path / "out" / "a.jsonl", report=lambda *args: told.append(args))
    assert counts == {"written": 5, "unfinished": 0, "known": 0, "too long": 0}
    assert told == [("speaker", 5, 5)]
    rows = lines(tmp_path / "out" / "a.jsonl")
    assert [row["id"] for row in rows] == [f"c.jsonl: q{n}" for n in range(5)]
    assert rows[3] == {
        "id": "c.jsonl: q3",
        "messages": [
            {"role": "system", "content": "Copy"},
            {"role": "user", "content": "Which animal barks? 3"},
            {"role": "assistant", "content": " a dog"},
        ],
        "source": "c.jsonl",
        "teacher": "says a dog",
        "finish": "eos",
        "generation": {"max_tokens": 8, "temperature": 0.0, "seed": 0},
    }


def test_conversation_that_ends_with_a_question_is_answered(tmp_path: Path):
    asked = [Example(label="q", messages=[{"role": "user", "content": "Which?"}])]
    generate_answers(speaker(), asked, max_tokens=8, out=tmp_path / "a.jsonl")
    [row] = lines(tmp_path / "a.jsonl")
    assert [turn["content"] for turn in row["messages"]] == ["Which?", " a dog"]


def test_killed_run_goes_on_and_redoes_a_line_that_was_cut_off(tmp_path: Path):
    file, out = chats(tmp_path / "c.jsonl"), tmp_path / "a.jsonl"
    answer(file, out)
    whole = out.read_bytes()
    cut = whole[: whole.index(b"\n", whole.index(b"q2")) - 20]
    out.write_bytes(cut)
    assert answer(file, out) == {"written": 3, "unfinished": 0, "known": 2, "too long": 0}
    assert out.read_bytes() == whole
    assert answer(file, out)["known"] == 5
    assert out.read_bytes() == whole


def test_unfinished_answers_are_marked_and_left_out_as_a_source(tmp_path: Path):
    file, out = chats(tmp_path / "c.jsonl", 2), tmp_path / "a.jsonl"
    assert answer(file, out, max_tokens=1)["unfinished"] == 2
    answer(chats(tmp_path / "d.jsonl", 3), other := tmp_path / "b.jsonl")
    assert {row["finish"] for row in lines(out)} == {"length"}
    made = Stream(
        [Source(chat=(str(out), str(other)))],
        Library(TOKENIZER),
        seq_len=256,
        rows=1,
        mask="completion-eos",
        prompt_weight=0.0,
        seed=0,
        window=2048,
    )
    assert made.left_out == {"with an answer cut off at its limit": 2}
    assert all("d.jsonl" in label for label in made.next().examples)


def test_prompts_without_room_for_an_answer_are_counted(tmp_path: Path):
    small = Loaded(name="small", model=tiny_llama(len(TOKENIZER), window=30), tokenizer=TOKENIZER, identity="small")
    assert answer(chats(tmp_path / "c.jsonl", 3), tmp_path / "a.jsonl", small) == {
        "written": 0,
        "unfinished": 0,
        "known": 0,
        "too long": 3,
    }


def test_samples_follow_the_seed(tmp_path: Path):
    file = chats(tmp_path / "c.jsonl", 3)
    model = Loaded(name="tiny", model=tiny_llama(len(TOKENIZER)), tokenizer=TOKENIZER, identity="tiny")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        answer(file, tmp_path / name, model, temperature=1.0, seed=seed, batch_size=3)
    a, b, c = ([row["messages"] for row in lines(tmp_path / name)] for name in "abc")
    assert a == b != c


def test_faults_are_named(tmp_path: Path):
    file, out = chats(tmp_path / "c.jsonl"), tmp_path / "a.jsonl"
    answer(file, out)
    with pytest.raises(ValueError, match=r"a.jsonl already holds answers: give another --out"):
        answer(file, out, resume=False)
    with pytest.raises(ValueError, match="there is no file .*none.jsonl"):
        read_prompts([tmp_path / "none.jsonl"])
    with pytest.raises(ValueError, match=r"line 1 was answered by says a dog with \{'max_tokens': 8.*now says B"):
        answer(file, out, speaker(" B"))
    with pytest.raises(ValueError, match=r"line 1 was answered by .* now says a dog with \{'max_tokens': 9"):
        answer(file, out, max_tokens=9)
    file.write_text(file.read_text().replace("barks", "swims"))
    with pytest.raises(ValueError, match="answers another prompt under the id 'c.jsonl: q0'"):
        answer(file, out)
    out.write_text("{}\n" + out.read_text())
    with pytest.raises(ValueError, match="a.jsonl, line 1 is damaged .*delete that line"):
        answer(file, out)
    file.write_text(file.read_text() * 2)
    with pytest.raises(ValueError, match="two conversations are named 'c.jsonl: q0'"):
        answer(file, tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="no message before the assistant's last"):
        generate_answers(
            speaker(),
            [Example(label="q", messages=[{"role": "assistant", "content": "Hi"}])],
            max_tokens=1,
            out=tmp_path / "c.jsonl",
        )
    with pytest.raises(ValueError, match="max_tokens is 0 and temperature 0.0: expected 1 or more"):
        answer(file, tmp_path / "d.jsonl", max_tokens=0)
    bare = Loaded(name="base", model=None, tokenizer=tiny_tokenizer(chat=None), identity="base")
    with pytest.raises(ValueError, match="the teacher base has no chat template"):
        answer(file, tmp_path / "d.jsonl", bare)
