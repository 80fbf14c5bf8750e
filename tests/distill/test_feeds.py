"""Passes over a source, cursors that resume exactly, and the cache of tokens."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.feeds import order
from distill.stage import Source
from tests.distill.streams import chats, hub, same, stream, texts


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_order_is_the_same_with_every_numpy():
    assert order(8, 0, 1, 2).tolist() == [3, 4, 7, 6, 1, 5, 2, 0]
    assert sorted(order(1000, 3).tolist()) == list(range(1000))


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


def test_each_pass_draws_every_document_once_and_each_in_another_order(tmp_path: Path):
    file = chats(tmp_path / "c.jsonl", 40)
    made = stream(Source(chat=(str(file),)), seq_len=256)
    feed = made._feeds[0]
    drawn = [[feed.draw()[0] for _ in range(40)] for _ in range(3)]
    assert [sorted(keys) for keys in drawn] == [list(range(40))] * 3
    assert drawn[0] != drawn[1] != drawn[2]
    assert feed.epoch == 3
