"""Small sources of random words, their streams, and what a batch is made of."""

import json
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from distill.chat import CONTENT, END, Chat, Unusable
from distill.packing import Batch, Stream
from distill.stage import Source
from distill.tokens import Library
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
    given = {"seq_len": 64, "rows": 4, "mask": "completion-eos", "prompt_weight": 0.0, "seed": 0, "window": 2048}
    reads = {name: options.pop(name) for name in ("exclude", "cache") if name in options}
    return Stream(mixture, Library(TOKENIZER, **reads), **{**given, **options})


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


def hub(folder: Path, n: int) -> Path:
    if not folder.exists():
        folder.mkdir()
        chats(folder / "train.jsonl", n, seed=5)
    return folder
