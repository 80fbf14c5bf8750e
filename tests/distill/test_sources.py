"""What the sources give, and what is said of those that can't be read."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from distill.chat import Chat
from distill.sources import Corpus, Example, Flow, Held, find_files, open_source
from distill.stage import Source
from distill.tokens import encode, tokenise
from evalkit.encoding import Encoder
from evalkit.records import Item
from evalkit.registry import TASKS, Task, get_task
from evalkit.selection import shuffled
from evalkit.views import VIEWS, ask
from tests.tiny import tiny_tokenizer

TURNS = [{"role": "user", "content": "Which animal barks?"}, {"role": "assistant", "content": "a dog"}]


def lines(file: Path, *rows: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def corpus(source: Source, data_dir: Path | None = None) -> Corpus:
    opened = open_source(source, data_dir)
    assert isinstance(opened, Corpus)
    return opened


def read(source: Source, data_dir: Path | None = None) -> list[Example]:
    return list(corpus(source, data_dir).examples())


# --- files ---


def test_files_are_read_in_sorted_order_with_their_ids(tmp_path: Path):
    lines(tmp_path / "text" / "b.jsonl.gz", {"id": "x", "text": "one"}, "", {"text": "two"})
    lines(tmp_path / "text" / "a.jsonl", {"id": 7, "text": "zero"})
    (tmp_path / "text" / "c.txt").write_text("three\nlines\n")
    lines(tmp_path / "text" / "left_test.jsonl", {"text": "never"})
    found = corpus(Source(text=("text/*", "text/a.jsonl"), exclude=("left_*",)), tmp_path)
    assert [(one.label, one.text) for one in found.examples()] == [
        ("a.jsonl: 7", "zero"),
        ("b.jsonl.gz: x", "one"),
        ("b.jsonl.gz: line 3", "two"),
        ("c.txt", "three\nlines\n"),
    ]
    assert found.splits


def test_chats_are_read_and_empty_fields_dropped(tmp_path: Path):
    row = {"id": "q", "messages": [{**turn, "tool_calls": None} for turn in TURNS]}
    lines(tmp_path / "c.jsonl", row, {"messages": TURNS, "finish": "length"})
    found = corpus(Source(chat=("c.jsonl",)), tmp_path)
    first, second = found.examples()
    assert first.messages == TURNS and first.label == "c.jsonl: q" and first.prompt == "Which animal barks?"
    assert second.unusable == "with an answer cut off at its limit"
    assert not found.splits
    chat = Chat(tiny_tokenizer())
    assert tokenise(found, chat, Held(()), None).left_out == {"with an answer cut off at its limit": 1}


def test_relative_patterns_are_looked_up_in_the_data_folder_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here, data = tmp_path / "here", tmp_path / "data"
    in_data, in_here = lines(data / "a.jsonl", {"text": "data"}), lines(here / "a.jsonl", {"text": "here"})
    only_here = lines(here / "b.jsonl", {"text": "here"})
    monkeypatch.chdir(here)
    assert find_files(["a.jsonl", "b.jsonl"], (), "text", data) == [in_data, Path("b.jsonl")]
    assert find_files(["a.jsonl"], (), "text", None) == [Path("a.jsonl")]
    assert find_files([str(in_here), str(only_here)], (), "text", data) == [in_here, only_here]
    with pytest.raises(ValueError, match=rf"no text file matches 'c\*.jsonl' in {data} or in {here}: .*--data-dir"):
        find_files(["a.jsonl", "c*.jsonl"], (), "text", data)
    with pytest.raises(ValueError, match=r"no chat file matches 'c' in .* \(no data folder was named\)"):
        find_files(["c"], (), "chat", None)
    with pytest.raises(ValueError, match="exclude leaves out all 1 files of a.jsonl"):
        find_files(["a.jsonl"], ["a*"], "text", data)
    with pytest.raises(ValueError, match="a.txt is no chat file: expected a name that ends in .jsonl or .jsonl.gz"):
        (data / "a.txt").write_text("a")
        find_files(["a.txt"], (), "chat", data)


def test_own_stands_for_what_evalkit_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distill.sources.OWN", tmp_path)
    lines(tmp_path / "text.jsonl", {"id": "t", "text": "own text"})
    lines(tmp_path / "chat.jsonl", {"id": "c", "messages": TURNS})
    assert [one.text for one in read(Source(text=("own",)))] == ["own text"]
    assert [one.label for one in read(Source(chat=("own",)))] == ["chat.jsonl: c"]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("text", "{broken", r"a.jsonl, line 2: not JSON \(.* at column 2\)"),
        ("text", "[1]", "a.jsonl, line 2: found list, expected one JSON object a line"),
        ("text", {"txt": "a"}, "a.jsonl, line 2: no 'text', expected a string; the row has txt"),
        ("text", {"text": 3}, "a.jsonl, line 2: int as 'text', expected a string"),
        ("chat", {"text": "a"}, "a.jsonl, line 2: no 'messages', expected a list"),
        ("chat", {"messages": []}, "a.jsonl, line 2: no 'messages'"),
        ("chat", {"messages": [*TURNS, {"role": "user"}]}, "a.jsonl, line 2: message 3 has no string 'content'"),
        ("chat", {"messages": ["a"]}, "a.jsonl, line 2: message 1 has no string 'role'"),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "line 2: message 1 has no string 'content'"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, kind: str, row: Any, message: str):
    lines(tmp_path / "a.jsonl", {"text": "good", "messages": TURNS}, row)
    with pytest.raises(ValueError, match=message):
        read(Source.model_validate({kind: ("a.jsonl",)}), tmp_path)


def test_bytes_that_are_no_text_are_named(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="a.txt is not UTF-8"):
        read(Source(text=("a.txt",)), tmp_path)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}')[:-9])
    with pytest.raises(ValueError, match="a.jsonl.gz can't be read"):
        read(Source(text=("a.jsonl.gz",)), tmp_path)


def test_identity_follows_the_content(tmp_path: Path):
    lines(tmp_path / "a.jsonl", {"text": "a"})
    one = corpus(Source(text=("a.jsonl",)), tmp_path).identity()
    assert corpus(Source(text=("a.jsonl",)), tmp_path).identity() == one
    lines(tmp_path / "a.jsonl", {"text": "b"})
    assert corpus(Source(text=("a.jsonl",)), tmp_path).identity() != one


def test_text_without_words_is_left_out(tmp_path: Path):
    lines(tmp_path / "a.jsonl", {"text": "a dog"}, {"text": " \n"}, {"text": ""})
    found = tokenise(corpus(Source(text=("a.jsonl",)), tmp_path), Chat(tiny_tokenizer()), Held(()), None)
    assert found.left_out == {"without text": 2} and found.labels == ("a.jsonl: line 1",)


# --- data sets of the hub, from folders ---


@pytest.fixture
def no_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.mark.usefixtures("no_hub_cache")
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_hub_data_sets_are_read_whole_or_on_the_way(tmp_path: Path, form: str):
    import datasets

    rows = [{"id": f"r{n}", "messages": TURNS, "body": f"text {n}"} for n in range(5)]
    folder = tmp_path / "data" / "org" / "set"
    if form == "jsonl":
        lines(folder / "train.jsonl", *rows)
    else:
        folder.mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    source = Source(hub="org/set")
    whole = read(source, tmp_path / "data")
    assert [one.label for one in whole] == [f"org/set: r{n}" for n in range(5)]
    assert whole[0].messages == TURNS
    flow = open_source(source.model_copy(update={"streaming": True}), tmp_path / "data")
    assert isinstance(flow, Flow)
    streamed = list(flow.start(None))
    assert [one for one, _ in streamed] == whole
    for at in range(5):
        *_, (_, cursor) = islice(flow.start(None), at + 1)
        state = json.loads(json.dumps(cursor()))
        assert [one for one, _ in flow.start(state)] == whole[at + 1 :]


@pytest.mark.usefixtures("no_hub_cache")
def test_hub_data_set_of_texts_and_its_faults(tmp_path: Path):
    lines(tmp_path / "set" / "train.jsonl", {"body": "a"}, {"body": "b"})
    found = corpus(Source(hub=str(tmp_path / "set"), field="body"))
    assert [one.text for one in found.examples()] == ["a", "b"] and found.splits
    with pytest.raises(ValueError, match="neither 'messages' nor 'text': its rows have body; name the text's column"):
        open_source(Source(hub=str(tmp_path / "set")), None)
    with pytest.raises(ValueError, match="neither 'messages' nor 'text'"):
        open_source(Source(hub=str(tmp_path / "set"), streaming=True), None)
    with pytest.raises(ValueError, match="could not read split 'valid' of the data set .*set .*offline, put a copy"):
        open_source(Source(hub=str(tmp_path / "set"), split="valid"), None)


# --- benchmarks ---


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    def register(**options: Any) -> None:
        given = {"views": ("letters", "cloze", "cot"), "loglikelihood": "letters", "generation": "letters"}
        monkeypatch.setitem(TASKS, "made", lambda: Task(**{**given, **options}))

    return register


def items(prefix: str, *questions: str, **options: Any) -> list[Item]:
    given: dict[str, Any] = {"choices": ("a cat", "a dog", "a fish"), "gold": 1}
    return [Item(id=f"{prefix}-{n}", question=text, **{**given, **options}) for n, text in enumerate(questions)]


QUESTIONS = [f"Which animal barks {n} times?" for n in range(40)]


def test_training_items_are_asked_as_evalkit_asks_them(register: Any):
    pool = items("train", *QUESTIONS, solution="Dogs bark.")
    register(items=lambda _: items("test", "Which is it?"), pool=lambda _: pool, shuffle=True)
    found = read(Source(task="made", views=("letters", "cot"), chat_share=0.5))
    tokenizer, task = tiny_tokenizer(), get_task("made")
    plain, chatty = Encoder(tokenizer), Encoder(tokenizer, chat=True)
    kinds: Counter[str] = Counter()
    encoded = encode(found, Chat(tokenizer), Held(()))
    for (item, view), one, marked in zip(
        ((i, v) for i in pool for v in ("letters", "cot")), found, encoded, strict=True
    ):
        asked = ask(view, task, shuffled(item, 0))
        assert one.label == f"made: {item.id} ({view})"
        encoder = chatty if one.messages else plain
        prompt = encoder.prompt([], asked, closed=False)
        head, [tail] = encoder.join(prompt, [encoder.delimiter + asked.reply])
        assert not isinstance(marked, str)
        ids, marks = marked[0].tolist(), marked[1].tolist()
        assert ids[: len(head) + len(tail)] == head + tail
        assert marks[: len(head) + len(tail) + 1] == [0] * len(head) + [1] * len(tail) + [2]
        assert asked.reply.startswith("Dogs bark. The answer is") or view == "letters"
        kinds["chat" if one.messages else "plain"] += 1
    assert 0.3 < kinds["chat"] / len(found) < 0.7
    shares = [read(Source(task="made", views=("cot",), chat_share=share)) for share in (0.0, 0.5, 1.0)]
    chats = [{one.label for one in share if one.messages} for share in shares]
    assert not chats[0] and len(chats[2]) == 40
    assert chats[1] == {one.label for one in found if one.messages and "cot" in one.label}


def test_view_blank_trains_on_the_text_behind_the_gap_and_skips_items_without_one(register: Any):
    pool = items("train", "The _ barks loudly.", "No gap here.")
    register(items=lambda _: items("test", "A _ swims."), pool=lambda _: pool, views=("blank", "letters"))
    opened = corpus(Source(task="made", views=("blank", "letters")))
    found = list(opened.examples())
    assert found[0].pair == ("The a dog", "barks loudly.")
    assert [one.label for one in found] == [
        "made: train-0 (blank)",
        "made: train-0 (letters)",
        "made: train-1 (letters)",
    ]
    assert opened.left_out == {"without the gap that view 'blank' needs": 1}
    [chatty] = read(Source(task="made", views=("blank",), chat_share=1.0))
    assert chatty.messages[0]["content"] == "Fill in the blank: The _ barks loudly."
    assert chatty.messages[1]["content"] == "The a dog barks loudly."


def test_other_views_that_fail_are_errors(register: Any, monkeypatch: pytest.MonkeyPatch):
    def fail(task: Task, item: Item) -> Any:
        raise ValueError(f"{item.id}: broken")

    monkeypatch.setitem(VIEWS, "letters", fail)
    register(items=lambda _: [], pool=lambda _: items("train", "Which?"))
    with pytest.raises(ValueError, match="train-0: broken"):
        open_source(Source(task="made", views=("letters",)), None)


def test_reported_items_are_never_trained_on(register: Any):
    test = items("test", "Which animal barks?", "Which one swims?")
    twin = [
        replace(test[0], id="train-9", question="which  animal barks?", choices=("a dog", "a fish", "a cat"), gold=0)
    ]
    register(items=lambda _: test, pool=lambda _: [*items("train", "Which one flies?"), *twin])
    opened = corpus(Source(task="made", views=("letters",)))
    assert [one.label for one in opened.examples()] == ["made: train-0 (letters)"]
    assert opened.left_out == {"the same as a reported item": 1}
    register(items=lambda _: test, pool=lambda _: test[:1])
    with pytest.raises(ValueError, match="all 1 training items of task 'made' are reported items"):
        open_source(Source(task="made", views=("letters",)), None)


@pytest.mark.parametrize("pool", [None, lambda _: []])
def test_task_without_training_items_is_refused_by_name(register: Any, pool: Any, tmp_path: Path):
    register(items=lambda _: items("test", "Which?"), pool=pool)
    with pytest.raises(ValueError, match=f"task 'made' has no training split here.*data folder {tmp_path}"):
        open_source(Source(task="made", views=("letters",)), tmp_path)


def test_unknown_tasks_and_views_are_refused(register: Any):
    register(items=lambda _: [], pool=lambda _: items("train", "Which?"))
    with pytest.raises(ValueError, match="task 'made' has no view 'copy': its views are letters, cloze, cot"):
        open_source(Source(task="made", views=("copy",)), None)
    with pytest.raises(ValueError, match="unknown task 'mode'"):
        open_source(Source(task="mode", views=("letters",)), None)


def test_held_out_items_of_the_pool_are_left_out(register: Any):
    pool = items("train", *QUESTIONS[:3])
    register(items=lambda _: [], pool=lambda _: pool)
    opened = corpus(Source(task="made", views=("letters", "cloze")))
    found = tokenise(opened, Chat(tiny_tokenizer()), Held([pool[1].question]), None)
    assert found.left_out == {"with a held-out question": 2} and len(found.labels) == 4


def test_embedded_tasks_train_on_examples_that_are_not_scored():
    for name in ("arithmetic", "recall", "copy"):
        if name in TASKS:
            task = get_task(name)
            found = read(Source(task=name, views=task.views[:1]))
            assert found and not {one.label.split()[1] for one in found} & {item.id for item in task.items(None)}


def test_reported_split_must_be_there_to_compare_with(register: Any):
    def missing(_: Path | None) -> list[Item]:
        raise ValueError("it is not in the data folder")

    register(items=missing, pool=lambda _: items("train", "Which?"))
    with pytest.raises(ValueError, match="'made': its reported split can't be read, .*: it is not in the data folder"):
        open_source(Source(task="made", views=("letters",)), None)


@pytest.mark.slow
def test_data_pack_sources_are_read(shared_data: Path):
    assert len(read(Source(text=("text/us_inaugural.jsonl.gz",)), shared_data)) > 100
    assert len(read(Source(chat=("instruct/openstax_qa.jsonl.gz",)), shared_data)) > 1000
    opened = corpus(Source(task="arc_easy", views=("letters",)), shared_data)
    assert sum(1 for _ in opened.examples()) + opened.left_out["the same as a reported item"] == 2251
