"""Oracles: what the right answer is, written down in another way than the code under test."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytest

from evalkit.records import Generated, Reply, Request
from evalkit.store import Run

TIE = 1e-5
"""What batching and padding may change of a float32 log-probability a, relative to max(1, |a|)."""


class CharTokenizer:
    """One token a character; <s> is 0, </s> is 1. ``bos``: text gets <s> in front, as Llama's tokenizer does."""

    bos_token_id: int | None = 0
    eos_token_id: int | None = 1

    def __init__(self, *, bos: bool = False, chat_template: Any = None) -> None:
        self.bos = bos
        self.chat_template = chat_template

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = [ord(c) + 10 for c in text]
        return [0, *ids] if self.bos and add_special_tokens else ids

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        return "".join(chr(i - 10) for i in token_ids if i >= 10)

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> str:
        text = "".join(f"<{m['role']}>{m['content']}" for m in conversation)
        return text + "<assistant>"


class TableEngine:
    """Answers from a table: the log-probability of each continuation's text, and a reply for each prompt.

    ``table``: continuation text -> its log-probability (nats), given to its first token, the others being certain.
    ``says``: prompt text -> (reply text, why it ended).
    """

    def __init__(
        self,
        table: Mapping[str, float],
        says: Callable[[str], tuple[str, str]] = lambda prompt: ("", "eos"),
        *,
        tokenizer: Any = None,
        max_length: int = 100_000,
    ) -> None:
        self.table = table
        self.says = says
        self._tokenizer = tokenizer or CharTokenizer()
        self._max_length = max_length
        self.seen: list[Request] = []

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def max_length(self) -> int:
        return self._max_length

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        self.seen.extend(requests)
        for index in reversed(range(len(requests))):  # an engine may answer in any order
            yield index, self._reply(requests[index])

    def _reply(self, request: Request) -> Reply:
        decode = self._tokenizer.decode
        rows = tuple((self.table[decode(tail)],) + (0.0,) * (len(tail) - 1) for tail in request.continuations)
        generated = None
        if request.generation is not None:
            text, finish = self.says(decode(request.prompt))
            ends = [(text.index(stop), stop) for stop in request.generation.stops if stop in text]
            said = text
            if ends:
                at, stop = min(ends)
                text, said, finish = text[:at], text[:at] + stop, "stop"
            tokens = tuple(self._tokenizer.encode(said, add_special_tokens=False))
            if len(tokens) > request.generation.max_tokens:
                tokens, finish = tokens[: request.generation.max_tokens], "length"
                text = decode(tokens)
            generated = Generated(text=text, tokens=tokens, finish=finish)  # type: ignore[arg-type]
        return Reply(logprobs=rows, generated=generated)


def assert_same_replies(
    requests: Sequence[Request], one: Mapping[int, Reply], other: Mapping[int, Reply]
) -> tuple[float, int]:
    """Two runs of the same requests gave the same: log-probabilities a and b with |a - b| <= 1e-5 * max(1, |a|),
    the same generated replies, the same best continuation.

    Returns the largest |a - b| / max(1, |a|), and how many near-ties (best and second best closer than the
    tolerance) were excused from the last.
    """
    largest, near_ties = 0.0, 0
    assert set(one) == set(other) == set(range(len(requests)))
    for i in range(len(requests)):
        assert one[i].generated == other[i].generated, f"request {i}"
        for row, twin in zip(one[i].logprobs, other[i].logprobs, strict=True):
            for a, b in zip((*row, sum(row)), (*twin, sum(twin)), strict=True):
                largest = max(largest, abs(a - b) / max(1.0, abs(a)))
        sums, twins = ([sum(row) for row in reply.logprobs] for reply in (one[i], other[i]))
        if len(sums) > 1:
            second, first = sorted(sums)[-2:]
            if first - second <= TIE * max(1.0, abs(first)):
                near_ties += 1
            else:
                assert sums.index(max(sums)) == twins.index(max(twins)), f"request {i}"
    assert largest <= TIE, f"log-probabilities differ by up to {largest:.2e}"
    return largest, near_ties


def assert_same_records(one: Run, two: Run) -> None:
    """Identical in every field but the log-probabilities, which differ in the last float32 digits with the batch."""
    assert one.tasks == two.tasks
    for task in one.tasks:
        records, others = one.records(task), two.records(task)
        assert records.keys() == others.keys()
        for item, record in records.items():
            mine, its = asdict(record), asdict(others[item])
            for own, other in zip(mine["outcomes"], its["outcomes"], strict=True):
                for name in ("logprobs", "blind"):
                    assert other.pop(name) == pytest.approx(own.pop(name), rel=1e-5), (item, name)
            assert mine == its
