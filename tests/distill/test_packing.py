"""Packed rows against the documents they are made of: nothing lost, nothing twice, nothing across, exactly resumed."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.feeds import CHAPTER
from distill.packing import Batch, Stream, share
from distill.stage import Source
from distill.tokens import Library
from tests.distill.streams import chats, check, documents, epochs_of, expected, same, stream, texts, write


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
    times: dict[str, int] = defaultdict(int)
    for batch in epochs_of(str(file), made, 5):
        check(batch)
        for label, tokens, weights in documents(batch):
            assert (tokens, weights) == wanted[label]
            times[label] += 1
    assert set(times.values()) <= {3, 4, 5} and len(times) == len(wanted) - sum(made.left_out.values())


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


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), seq_len=st.integers(120, 300), n=st.integers(1, 40))
def test_every_document_that_is_drawn_is_in_a_row_or_waits(tmp_path: Path, seed: int, seq_len: int, n: int):
    mixture = (
        Source(text=(str(texts(tmp_path / f"t{seed}-{n}.jsonl", n, high=900, seed=seed)),)),
        Source(chat=(str(chats(tmp_path / f"c{seed}-{n}.jsonl", n, high=4, seed=seed)),)),
    )
    made = stream(*mixture, seq_len=seq_len, rows=3, seed=seed)
    drawn: dict[str, int] = defaultdict(int)
    for feed in made._feeds:

        def draw(feed: Any = feed, draw: Any = feed.draw) -> tuple[int, int]:
            key, length = draw()
            drawn[feed.document(key)[2]] += length
            return key, length

        feed.draw = draw  # type: ignore[method-assign]
    placed: dict[str, int] = defaultdict(int)
    for _ in range(8):
        for label, tokens, _ in documents(made.next()):
            placed[label] += len(tokens)
    for piece in made._waiting.values():
        placed[made._feeds[piece.feed].document(piece.key)[2]] += piece.length
    assert placed == drawn


def test_realistic_chats_fill_99_percent(tmp_path: Path):
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
        assert fill >= 0.99
        # Nothing waits for ever: the oldest document is among those that begin the next row.
        assert made._serial - min(made._waiting) < 500


def test_text_fills_rows(tmp_path: Path):
    made = stream(Source(text=(str(texts(tmp_path / "t.jsonl", 50, high=300)),)), seq_len=128, rows=16)
    batches = [made.next() for _ in range(10)]
    assert sum(batch.valid for batch in batches) / sum(batch.tokens.numel() for batch in batches) > 0.995


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
    seen = {label for _ in range(4) for label, _, _ in documents(made.next())}
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
        Library(tokenizer, shared_data),
        seq_len=512,
        rows=32,
        mask="completion-eos",
        prompt_weight=0.0,
        seed=0,
        window=8192,
    )
    batches = [made.next() for _ in range(10)]
    for batch in batches:
        check(batch)
    assert sum(batch.valid for batch in batches) > 0.97 * sum(batch.tokens.numel() for batch in batches)
