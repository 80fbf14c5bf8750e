"""Packed rows against the documents they are made of: nothing lost, nothing twice, nothing across, exactly resumed."""

import json
import random
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.chat import CONTENT, END, Chat, Unusable
from distill.feeds import CHAPTER, order
from distill.packing import Batch, Stream, share
from distill.stage import Source
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WORDS = "a dog barks yes no the capital of France is Paris question answer which letter 1 2 3 apple arrow".split()


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def chats(file: Path, n: int, *, low: int = 1, high: int = 20, seed: int = 0) -> Path:
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        turns = [
            {"role": role, "content": words(rng, low, high)}
            for _ in range(rng.randint(1, 2))
            for role in ("user", "assistant")
        ]
        rows.append({"id": f"c{number}", "messages": turns})
    return write(file, rows)


def texts(file: Path, n: int, *, low: int = 1, high: int = 60, seed: int = 0) -> Path:
    rng = random.Random(seed)
    return write(file, [{"id": f"t{number}", "text": words(rng, low, high)} for number in range(n)])


def stream(*mixture: Source, **options: Any) -> Stream:
    given = {"seq_len": 64, "rows": 4, "mask": "completion-eos", "prompt_weight": 0.0, "seed": 0, "data_dir": None}
    return Stream(mixture, TOKENIZER, **{**given, "window": 2048, **options})


def documents(batch: Batch) -> list[tuple[str, list[int], list[float]]]:
    """(label, tokens, weights) of every document that isn't padding."""
    tokens, weights = batch.tokens.reshape(-1).tolist(), batch.weights.reshape(-1).tolist()
    T = batch.tokens.shape[1]
    found = []
    labels = iter(batch.examples)
    starts = batch.starts.tolist()
    for begin, end in zip(starts, starts[1:], strict=False):
        if begin % T < batch.filled[begin // T]:
            found.append((next(labels), tokens[begin:end], weights[begin:end]))
    assert next(labels, None) is None
    return found


def check(batch: Batch) -> None:
    """What holds of every batch."""
    B, T = batch.tokens.shape
    starts = batch.starts.tolist()
    assert starts[0] == 0 and starts[-1] == B * T
    assert all(begin < end for begin, end in zip(starts, starts[1:], strict=False))
    assert set(range(0, B * T, T)) <= set(starts), "every row begins anew"
    position = [i for begin, end in zip(starts, starts[1:], strict=False) for i in range(end - begin)]
    assert batch.position.reshape(-1).tolist() == position
    weights = batch.weights.reshape(-1)
    assert (weights[batch.starts[1:] - 1] == 0).all(), "a document's last token predicts nothing"
    assert batch.valid == sum(batch.filled) == sum(len(tokens) for _, tokens, _ in documents(batch))
    for row, filled in enumerate(batch.filled):
        assert (batch.weights[row, filled:] == 0).all()
        assert filled == T or row * T + filled in starts, "padding is a document of its own"
    assert batch.tokens.dtype == batch.starts.dtype == batch.position.dtype == torch.int64
    assert batch.weights.dtype == torch.float32


def same(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(Batch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def epochs_of(name: str, made: Stream, passes: int) -> list[Batch]:
    batches = []
    while made.epochs[name] < passes:
        batches.append(made.next())
    return batches


def expected(file: Path, weight_of: tuple[float, float, float]) -> dict[str, tuple[list[int], list[float]]]:
    """Label -> tokens and weights of each document, from the tokenizer itself."""
    chat = Chat(TOKENIZER)
    out = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if "messages" in row:
            [found] = chat.encode([("it", row["messages"])])
            assert not isinstance(found, Unusable)
            ids, marks = found[0].tolist(), found[1].tolist()
        else:
            ids = [*TOKENIZER.encode(row["text"], add_special_tokens=False), TOKENIZER.eos_token_id]
            marks = [CONTENT] * len(ids)
        by_mark = {0: weight_of[0], CONTENT: weight_of[1], END: weight_of[2]}
        out[f"{file.name}: {row['id']}"] = ids, [*(by_mark[mark] for mark in marks[1:]), 0.0]
    return out


@pytest.mark.parametrize(
    ("mask", "prompt_weight", "weight_of"),
    [
        ("all", 0.0, (1, 1, 1)),
        ("completion", 0.0, (0, 1, 0)),
        ("completion-eos", 0.0, (0, 1, 1)),
        ("completion", 0.25, (0.25, 1, 0.25)),
        ("completion-eos", 0.5, (0.5, 1, 1)),
    ],
)
def test_conversations_come_whole_with_the_mask_shifted_to_what_predicts(
    tmp_path: Path, mask: str, prompt_weight: float, weight_of: tuple[float, float, float]
):
    file = chats(tmp_path / "c.jsonl", 60)
    wanted = expected(file, weight_of)
    made = stream(Source(chat=(str(file),)), seq_len=128, mask=mask, prompt_weight=prompt_weight)
    seen = 0
    for batch in epochs_of(str(file), made, 2):
        check(batch)
        for label, tokens, weights in documents(batch):
            assert (tokens, weights) == wanted[label]
            seen += 1
    assert seen >= 60


def test_each_pass_draws_every_document_once_and_each_in_another_order(tmp_path: Path):
    file = chats(tmp_path / "c.jsonl", 40)
    made = stream(Source(chat=(str(file),)), seq_len=256)
    feed = made._feeds[0]
    drawn = [[feed.draw()[0] for _ in range(40)] for _ in range(3)]
    assert [sorted(keys) for keys in drawn] == [list(range(40))] * 3
    assert drawn[0] != drawn[1] != drawn[2]
    assert feed.epoch == 3


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    seq_len=st.integers(8, 90),
    rows=st.integers(1, 5),
    n=st.integers(1, 12),
    high=st.sampled_from([2, 20, 300]),
)
def test_text_is_cut_and_goes_on_without_losing_or_repeating_a_token(
    tmp_path: Path, seed: int, seq_len: int, rows: int, n: int, high: int
):
    file = texts(tmp_path / f"t{seed}-{n}-{high}.jsonl", n, high=high, seed=seed)
    wanted = expected(file, (1, 1, 1))
    made = stream(Source(text=(str(file),)), seq_len=seq_len, rows=rows, seed=seed)
    pieces: dict[str, list[list[int]]] = defaultdict(list)
    for _ in range(6):
        batch = made.next()
        check(batch)
        for label, tokens, weights in documents(batch):
            assert weights == [1.0] * (len(tokens) - 1) + [0.0]
            pieces[label].append(tokens)
    part = CHAPTER * seq_len
    for label, found in pieces.items():
        whole = wanted[label][0]
        chapters = [whole[i : i + part] for i in range(0, len(whole), part)]
        # Pieces join to whole chapters, but for those still waiting when the batches stopped; copies of one document
        # may wait at once, so a piece belongs to any copy that goes on with it.
        open_: list[tuple[list[int], int]] = []
        for piece in found:
            for index, (chapter, at) in enumerate(open_):
                if chapter[at : at + len(piece)] == piece:
                    at += len(piece)
                    open_[index] = (chapter, at)
                    if at == len(chapter):
                        del open_[index]
                    break
            else:
                begun = next(chapter for chapter in chapters if chapter[: len(piece)] == piece)
                if len(piece) < len(begun):
                    open_.append((begun, len(piece)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 12), again=st.integers(0, 3), streaming=st.booleans())
def test_resumed_stream_gives_the_batches_of_an_uninterrupted_one(
    tmp_path: Path, seed: int, cut: int, again: int, streaming: bool
):
    mixture = (
        Source(text=(str(texts(tmp_path / "t.jsonl", 9, high=400)),)),
        Source(chat=(str(chats(tmp_path / "c.jsonl", 30)),), weight=2.0),
        Source(task="arithmetic", views=("open", "cot"), chat_share=0.5, weight=0.5),
    )
    if streaming:
        mixture = (*mixture[1:], Source(hub=str(hub(tmp_path / "hub", 50)), streaming=True))
    whole = stream(*mixture, seed=seed, rows=2)
    batches = [whole.next() for _ in range(cut + again + 3)]
    first = stream(*mixture, seed=seed, rows=2)
    for batch in batches[:cut]:
        assert same(first.next(), batch)
    second = stream(*mixture, seed=seed, rows=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in batches[cut : cut + again]:
        assert same(second.next(), batch)
    third = stream(*mixture, seed=seed, rows=2)
    third.next()  # a stream that has moved on goes back, too
    third.load_state_dict(json.loads(json.dumps(second.state_dict())))
    for batch in batches[cut + again :]:
        assert same(third.next(), batch)
    assert third.state_dict() == whole.state_dict()
    assert third.left_out == whole.left_out and third.epochs == whole.epochs


def hub(folder: Path, n: int) -> Path:
    if not folder.exists():
        folder.mkdir()
        chats(folder / "train.jsonl", n, seed=5)
    return folder


def test_streamed_source_resumes_over_many_blocks_and_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distill.feeds.BLOCK", 16)
    mixture = (
        Source(hub=str(hub(tmp_path / "hub", 70)), streaming=True),
        Source(text=(str(texts(tmp_path / "t.jsonl", 3, high=3000)),), weight=3),
    )
    whole = stream(*mixture)
    states, batches = [], []
    for _ in range(60):
        states.append(json.dumps(whole.state_dict()))
        batches.append(whole.next())
    assert whole.epochs[mixture[0].hub] >= 2
    assert max(len(state) for state in states) < 40_000
    for at in (0, 1, 7, 23, 24, 41, 59):
        resumed = stream(*mixture)
        resumed.load_state_dict(json.loads(states[at]))
        for batch in batches[at : at + 4]:
            assert same(resumed.next(), batch)


def test_streamed_source_gives_every_document_once_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distill.feeds.BLOCK", 16)
    folder = hub(tmp_path / "hub", 70)
    feed = stream(Source(hub=str(folder), streaming=True), seq_len=256)._feeds[0]
    for passed in range(3):
        drawn = [feed.document(feed.draw()[0])[2] for _ in range(70)]
        assert sorted(drawn) == sorted(f"{folder}: c{n}" for n in range(70))
        assert drawn[:16] != sorted(drawn[:16])
        assert feed.epoch == passed


def test_realistic_chats_fill_97_percent(tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(3000):
        lengths = np.clip(rng.lognormal((2.6, 4.0), 0.8), 1, 450).astype(int)  # a question, an answer: words
        turns = [
            {"role": role, "content": " ".join(["dog"] * length)}
            for role, length in zip(("user", "assistant"), lengths.tolist(), strict=True)
        ]
        rows.append({"id": number, "messages": turns})
    file = write(tmp_path / "c.jsonl", rows)
    for seq_len in (512, 1024):
        made = stream(Source(chat=(str(file),)), seq_len=seq_len, rows=16)
        batches = epochs_of(str(file), made, 2)
        fill = sum(batch.valid for batch in batches) / sum(batch.tokens.numel() for batch in batches)
        assert fill >= 0.97
        # Nothing waits for ever: the oldest document begins every row.
        assert made._serial - min(made._waiting) < 2000


def test_text_fills_rows(tmp_path: Path):
    made = stream(Source(text=(str(texts(tmp_path / "t.jsonl", 50, high=300)),)), seq_len=128, rows=16)
    batches = [made.next() for _ in range(10)]
    assert sum(batch.valid for batch in batches) / sum(batch.tokens.numel() for batch in batches) > 0.99


def test_mixture_keeps_its_shares_of_tokens_within_two_percent(tmp_path: Path):
    mixture = (
        Source(text=(str(texts(tmp_path / "t.jsonl", 40, high=500)),), weight=0.5),
        Source(chat=(str(chats(tmp_path / "c.jsonl", 80)),), weight=0.3),
        Source(chat=(str(chats(tmp_path / "d.jsonl", 50, low=20, high=40)),), weight=0.2),
    )
    made = stream(*mixture, seq_len=256, rows=16)
    tokens: dict[str, int] = defaultdict(int)
    for _ in range(150):
        for label, found, _ in documents(made.next()):
            tokens[label[0]] += len(found)
    total = sum(tokens.values())
    for name, wanted in {"t": 0.5, "c": 0.3, "d": 0.2}.items():
        assert tokens[name] / total == pytest.approx(wanted, abs=0.02)


def test_batches_depend_on_the_seed(tmp_path: Path):
    source = Source(chat=(str(chats(tmp_path / "c.jsonl", 300)),))
    assert same(stream(source).next(), stream(source).next())
    assert not same(stream(source).next(), stream(source, seed=1).next())


def test_order_is_the_same_with_every_numpy():
    assert order(8, 0, 1, 2).tolist() == ORDER
    assert sorted(order(1000, 3).tolist()) == list(range(1000))


ORDER = [0, 1, 2, 3, 4, 5, 6, 7]


def test_share_takes_rows_with_their_documents(tmp_path: Path):
    made = stream(Source(chat=(str(chats(tmp_path / "c.jsonl", 100)),)), rows=6)
    for _ in range(5):
        batch = made.next()
        parts = [share(batch, slice(0, 1)), share(batch, slice(1, 4)), share(batch, slice(4, None))]
        for part in parts:
            check(part)
        assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
        assert torch.equal(torch.cat([part.weights for part in parts]), batch.weights)
        assert sum((part.examples for part in parts), ()) == batch.examples
        assert sum(part.valid for part in parts) == batch.valid
        assert same(share(batch, slice(None)), batch)
        again = share(parts[1], slice(1, 2))
        assert same(again, share(batch, slice(2, 3)))
    with pytest.raises(ValueError, match="rows 6 to 6 by 1 of a batch of 6: expected one or more"):
        share(batch, slice(6, 9))


def test_share_of_a_batch_made_by_hand():
    batch = Batch(
        tokens=torch.arange(8).reshape(2, 4),
        weights=torch.ones(2, 4),
        starts=torch.tensor([0, 2, 4, 8]),
        position=torch.zeros(2, 4, dtype=torch.int64),
        valid=8,
        examples=(),
    )
    part = share(batch, slice(1, 2))
    assert part.starts.tolist() == [0, 4] and part.valid == 4 and part.examples == ()


def test_answers_longer_than_a_row_are_left_out_and_counted(tmp_path: Path):
    rows = [
        {"id": n, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "dog " * words}]}
        for n, words in enumerate((1, 200, 2, 300))
    ]
    made = stream(Source(chat=(str(write(tmp_path / "c.jsonl", rows)),)))
    assert made.left_out == {"longer than seq_len (64 tokens)": 2}
    assert {label for label, _, _ in documents(made.next())} == {"c.jsonl: 0", "c.jsonl: 2"}
    with pytest.raises(ValueError, match=r"'.*c.jsonl' has no example.*left out: 4 longer than seq_len \(16 tokens\)"):
        stream(Source(chat=(str(tmp_path / "c.jsonl"),)), seq_len=16)
    with pytest.raises(ValueError, match=r"has no example.*4 longer than seq_len"):
        (tmp_path / "hub").mkdir()
        write(tmp_path / "hub" / "train.jsonl", rows)
        stream(Source(hub=str(tmp_path / "hub"), streaming=True), seq_len=16)


def test_held_out_questions_are_left_out_wherever_the_prompt_has_them(tmp_path: Path):
    def turns(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = [
        {"id": "a", "messages": turns("Tell me: which  Animal\nbarks?", "a dog")},
        {"id": "b", "messages": turns("a cat", "which animal barks?")},
        {"id": "c", "messages": turns("yes", "no")},
    ]
    chat = Source(chat=(str(write(tmp_path / "c.jsonl", rows)),))
    text = Source(text=(str(write(tmp_path / "t.jsonl", [{"text": "So: which animal barks? A dog."}, {"text": "a"}])),))
    made = stream(chat, text, exclude=["Which animal barks?"])
    assert made.left_out == {"with a held-out question": 2}
    seen = {label for label, _, _ in documents(made.next())}
    assert seen == {"c.jsonl: b", "c.jsonl: c", "t.jsonl: line 2"}
    with pytest.raises(ValueError, match="held-out question is empty"):
        stream(chat, exclude=[" "])


def test_bad_requests_name_what_was_asked(tmp_path: Path):
    source = Source(chat=(str(chats(tmp_path / "c.jsonl", 3)),))
    with pytest.raises(ValueError, match=r"seq_len is 4096, but the model's window .* is 2048 tokens"):
        stream(source, seq_len=4096)
    with pytest.raises(ValueError, match="mixture is empty"):
        stream()
    with pytest.raises(ValueError, match="0 rows of 64"):
        stream(source, rows=0)


def test_cursor_of_other_data_is_refused_by_name(tmp_path: Path):
    file = chats(tmp_path / "c.jsonl", 30)
    source = Source(chat=(str(file),))
    state = json.loads(json.dumps(stream(source).state_dict()))
    with pytest.raises(ValueError, match="seed changed since"):
        stream(source, seed=1).load_state_dict(state)
    chats(file, 30, seed=1)
    with pytest.raises(ValueError, match="go on where it stopped: data changed since"):
        stream(source).load_state_dict(state)


def test_cache_is_used_rebuilt_when_damaged_and_not_for_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    file = chats(tmp_path / "c.jsonl", 30)
    source, cache = Source(chat=(str(file),)), tmp_path / "cache"
    fresh = stream(source).next()
    assert same(stream(source, cache=cache).next(), fresh)
    [kept] = cache.glob("*.npz")
    with monkeypatch.context() as patch:
        patch.setattr("distill.tokens._tokenise", None)
        assert same(stream(source, cache=cache).next(), fresh)
        assert stream(source, cache=cache, mask="all").next().weights.sum() > fresh.weights.sum()
    whole = kept.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], b""):
        kept.write_bytes(damaged)
        caplog.clear()
        assert same(stream(source, cache=cache).next(), fresh)
        assert f"{kept} is damaged" in caplog.text and "tokenising again" in caplog.text
        assert kept.read_bytes() == whole
    chats(file, 30, seed=1)
    stream(source, cache=cache)
    stream(source, cache=cache, exclude=["dog dog dog"])
    assert len(list(cache.glob("*.npz"))) == 3


@pytest.mark.slow
def test_real_chats_and_texts_fill_rows(shared_data: Path, smollm2: str):
    from transformers import AutoTokenizer

    from models.builtin import smollm2_135m

    mixture = (
        Source(text=("text/us_inaugural.jsonl.gz",)),
        Source(chat=("instruct/openstax_qa.jsonl.gz", "instruct/word_problems*")),
    )
    tokenizer = AutoTokenizer.from_pretrained(smollm2_135m())
    made = Stream(
        mixture,
        tokenizer,
        seq_len=512,
        rows=32,
        mask="completion-eos",
        prompt_weight=0.0,
        seed=0,
        data_dir=shared_data,
        window=8192,
    )
    batches = [made.next() for _ in range(10)]
    for batch in batches:
        check(batch)
    assert sum(batch.valid for batch in batches) > 0.97 * sum(batch.tokens.numel() for batch in batches)
