"""A source as an endless feed of documents: every pass in another order, with a cursor that can be saved."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from distill.chat import Chat
from distill.sources import Flow, Held
from distill.tokens import Documents, encode

CHAPTER = 8
"""Rows of text that stay together: of a longer document every such part is shuffled on its own, so that a whole book
isn't all that a step sees."""
BLOCK = 1024
"""Examples of a streamed source that are shuffled with each other."""

Document = tuple[NDArray[Any], NDArray[np.uint8], str]
"""(tokens, marks, label)"""


class Feed(Protocol):
    """Documents are named by keys, so that a cursor needs no tokens."""

    label: str
    splits: bool
    """Its documents may be cut where a row ends."""
    epoch: int
    """Passes that are over."""
    identity: Any
    """As JSON: what must be the same for a cursor to make sense."""
    left_out: Counter[str]

    def draw(self) -> tuple[int, int]:
        """(key, tokens) of the next document."""

    def document(self, key: int) -> Document: ...

    def release(self, key: int) -> None:
        """The document is done with."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def order(n: int, *seed: int) -> NDArray[np.int64]:
    """A permutation. numpy promises the raw stream of a bit generator for good, but not its ``permutation``."""
    drawn = np.random.PCG64(np.random.SeedSequence([abs(part) for part in seed])).random_raw(n)
    return np.argsort(np.asarray(drawn, np.uint64), kind="stable").astype(np.int64)


def _unusable(length: int, splits: bool, seq_len: int) -> str:
    """Why a document of so many tokens is left out; empty: it isn't."""
    if length < 2:
        return "of fewer than 2 tokens, so that nothing is predicted"
    return f"longer than seq_len ({seq_len} tokens)" if length > seq_len and not splits else ""


def _nothing(label: str, left_out: Counter[str]) -> ValueError:
    reasons = "; ".join(f"{number} {reason}" for reason, number in left_out.items()) or "it has none"
    return ValueError(
        f"the source {label!r} has no example to train on (left out: {reasons}): correct it, or take it out of the "
        f"recipe"
    )


class Kept:
    """A source whose tokens are all in memory."""

    def __init__(self, documents: Documents, label: str, splits: bool, seq_len: int, seed: tuple[int, int]) -> None:
        self.label, self.splits, self.epoch = label, splits, 0
        self.left_out: Counter[str] = Counter(documents.left_out)
        self._documents, self._seed = documents, seed
        lengths = np.diff(documents.offsets)
        keep = lengths >= 2 if splits else (lengths >= 2) & (lengths <= seq_len)
        for length in lengths[~keep].tolist():
            self.left_out[_unusable(length, splits, seq_len)] += 1
        which = np.flatnonzero(keep)
        if not len(which):
            raise _nothing(label, self.left_out)
        part = CHAPTER * seq_len
        parts = -(-lengths[which] // part)
        number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        self._owner = np.repeat(which, parts)
        self._begin = documents.offsets[self._owner] + number * part
        self._length = np.minimum(lengths[self._owner] - number * part, part)
        self._at = 0
        self._order = self._shuffled()
        self.identity = [label, len(lengths), crc32(documents.ids.data), crc32(documents.offsets.data)]

    def _shuffled(self) -> NDArray[np.int64]:
        return order(len(self._owner), self._seed[0], self.epoch, self._seed[1])

    def draw(self) -> tuple[int, int]:
        if self._at == len(self._order):
            self._at = 0
            self._order = self._shuffled()
        key = int(self._order[self._at])
        self._at += 1
        if self._at == len(self._order):
            self.epoch += 1
        return key, int(self._length[key])

    def document(self, key: int) -> Document:
        begin = self._begin[key]
        end = begin + self._length[key]
        found = self._documents
        return found.ids[begin:end], found.marks[begin:end], found.labels[self._owner[key]]

    def release(self, key: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "at": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self._at = state["epoch"], state["at"]
        # At the pass' very end the order is still that of the pass that is over; the next draw makes another.
        over = self._at == len(self._order)
        self._order = order(len(self._owner), self._seed[0], self.epoch - over, self._seed[1])


@dataclass(slots=True)
class _Block:
    """Examples that were read together."""

    cursor: Any
    """Of the data set, before the first of them."""
    documents: list[Document]
    left: int
    """Of ``documents``, those not yet released."""


class Flowing:
    """A source that is read on the way: in blocks, each shuffled. A cursor names the blocks that are still in use;
    they are read again when it is loaded."""

    def __init__(self, flow: Flow, chat: Chat, held: Held, seq_len: int, seed: tuple[int, int]) -> None:
        self.label, self.splits, self.epoch = flow.label, flow.splits, 0
        self.left_out: Counter[str] = Counter()
        self.identity = [flow.label]
        self._flow, self._chat, self._held, self._seq_len, self._seed = flow, chat, held, seq_len, seed
        self._blocks: dict[int, _Block] = {}
        self._number = -1
        """Of the block that is drawn from: the last one read."""
        self._at = 0
        self._order: NDArray[np.int64] = order(0)
        self._rows: Iterator[Any] = iter(())
        self._cursor: Any = None
        self._next_block()

    def _read(self, rows: Iterator[Any], cursor: Any, left_out: Counter[str]) -> tuple[_Block, Any, int]:
        """(the next block of ``rows``, the cursor behind it, examples read)"""
        read = list(islice(rows, BLOCK))
        documents: list[Document] = []
        examples = [example for example, _ in read]
        for example, found in zip(examples, encode(examples, self._chat, self._held), strict=True):
            reason = found if isinstance(found, str) else _unusable(len(found[0]), self.splits, self._seq_len)
            if isinstance(found, str) or reason:
                left_out[reason] += 1
                continue
            part = CHAPTER * self._seq_len
            documents += [
                (found[0][i : i + part], found[1][i : i + part], example.label) for i in range(0, len(found[0]), part)
            ]
        behind = read[-1][1]() if read else cursor
        return _Block(cursor, documents, len(documents)), behind, len(read)

    def _next_block(self) -> None:
        """Read on; behind the last example, from the first one again."""
        empty_passes = 0
        while True:
            if self._number >= 0 and not self._blocks[self._number].left:
                del self._blocks[self._number]
            block, behind, number = self._read(self._rows, self._cursor, self.left_out)
            self._number += 1
            self._blocks[self._number] = block
            self._cursor = behind
            if block.documents:
                break
            if number == 0:
                self.epoch += self._number > 0
                empty_passes += 1
                if empty_passes > 1:
                    raise _nothing(self.label, self.left_out)
                self._rows, self._cursor = self._flow.start(None), None
        self._at = 0
        self._order = order(len(block.documents), self._seed[0], self._number, self._seed[1])

    def draw(self) -> tuple[int, int]:
        if self._at == len(self._order):
            self._next_block()
        entry = int(self._order[self._at])
        self._at += 1
        return self._number << 32 | entry, len(self._blocks[self._number].documents[entry][0])

    def document(self, key: int) -> Document:
        return self._blocks[key >> 32].documents[key & 0xFFFFFFFF]

    def release(self, key: int) -> None:
        block = self._blocks[key >> 32]
        block.left -= 1
        if not block.left and key >> 32 != self._number:
            del self._blocks[key >> 32]

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "number": self._number,
            "at": self._at,
            "blocks": [[number, block.cursor, block.left] for number, block in self._blocks.items()],
            "left_out": dict(self.left_out),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self._number, self._at = state["epoch"], state["number"], state["at"]
        self.left_out = Counter(state["left_out"])
        self._blocks = {}
        for number, cursor, left in state["blocks"]:  # the last one is drawn from, and read on from
            self._rows = self._flow.start(cursor)
            self._blocks[number], self._cursor, _ = self._read(self._rows, cursor, Counter())
            self._blocks[number].left = left
        self._order = order(len(self._blocks[self._number].documents), self._seed[0], self._number, self._seed[1])
