"""The batches of a stage: documents of a mixture packed into rows, with a cursor that resumes exactly.

A row takes documents in the order in which they were drawn; towards its end it takes the one or two of all that wait
which fill it best. (The best fit throughout would leave only the shortest waiting, and so fill worse.) Plain text fills
what is left, and its rest goes on in the next row as a document of its own; answers are never cut.
"""

from bisect import bisect, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.chat import CONTENT, END
from distill.feeds import Feed, Flowing, Kept
from distill.sources import Flow
from distill.stage import MaskName, Source
from distill.tokens import Library

WAITING = 128
"""Documents to choose a row's end from; more fill it no better: chats of some 120 tokens fill 99.8 % of rows of 512."""
SHORTEST = 8
"""Tokens of a gap that a text is cut for: a shorter piece teaches little, for want of context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of packed documents; nothing of one document is seen from another."""

    tokens: Tensor
    """[B, T] int64."""
    weights: Tensor
    """[B, T] float32: of the loss at position t, which predicts tokens[b, t + 1]. 0 at each document's last token, at
    padding, and where the mask leaves it out."""
    starts: Tensor
    """[documents + 1] int64: where each document begins in the long row of B * T tokens, and its end B * T. Every row
    begins anew; padding at a row's end is a document of its own."""
    position: Tensor
    """[B, T] int64: of each token in its document."""
    valid: int
    """Tokens that are not padding."""
    examples: tuple[str, ...]
    """The examples inside (source: id), one for each document that isn't padding; for the message about a bad batch."""
    filled: tuple[int, ...] = ()
    """Of each row the tokens before its padding. Empty: no row has any."""


def share(batch: Batch, rows: slice) -> Batch:
    """Some of the rows as a batch of their own: a process's, or a micro-batch."""
    B, T = batch.tokens.shape
    first, last, step = rows.indices(B)
    if step != 1 or last <= first:
        raise ValueError(f"rows {first} to {last} by {step} of a batch of {B}: expected one or more in a run")
    starts = batch.starts.tolist()
    low, high = starts.index(first * T), starts.index(last * T)
    filled = batch.filled or (T,) * B
    # Of the documents that begin before, those that aren't padding have a name.
    named = [start for start in starts[:-1] if start % T < filled[start // T]]
    return Batch(
        tokens=batch.tokens[rows],
        weights=batch.weights[rows],
        starts=batch.starts[low : high + 1] - first * T,
        position=batch.position[rows],
        valid=sum(filled[rows]),
        examples=tuple(
            label for start, label in zip(named, batch.examples, strict=False) if first * T <= start < last * T
        ),
        filled=filled[rows],
    )


@dataclass(slots=True)
class _Piece:
    """A document, or what is left of one, that waits for its place."""

    feed: int
    key: int
    start: int
    """In the document: what came before is in earlier rows."""
    length: int
    charged: int
    """Tokens of it that its source's share has been charged with: a row's worth at most."""


class Stream:
    """The batches of one stage, in an order that depends on seed and recipe alone."""

    def __init__(
        self,
        mixture: Sequence[Source],
        library: Library,
        *,
        seq_len: int,
        rows: int,
        mask: MaskName,
        prompt_weight: float,
        seed: int,
        window: int,
    ) -> None:
        if seq_len > window:
            raise ValueError(
                f"seq_len is {seq_len}, but the model's window (max_position_embeddings) is {window} tokens: "
                f"lower the stage's seq_len to {window} or less"
            )
        if not mixture:
            raise ValueError("the mixture is empty: expected one source or more")
        if seq_len < 2 or rows < 1:
            raise ValueError(f"a batch of {rows} rows of {seq_len} tokens: expected 1 row or more of 2 tokens or more")
        self.seq_len, self.rows = seq_len, rows
        chat, held, tokenizer = library.chat, library.held, library.chat.tokenizer
        self._feeds: list[Feed] = []
        for index, source in enumerate(mixture):
            opened = library.open(source)
            if isinstance(opened, Flow):
                self._feeds.append(Flowing(opened, chat, held, seq_len, (seed, index)))
            else:
                label, splits, documents = opened
                self._feeds.append(Kept(documents, label, splits, seq_len, (seed, index)))
        self._weights = [source.weight for source in mixture]
        self._pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        targets = {"all": (1.0, 1.0, 1.0), "completion": (0.0, 1.0, 0.0), "completion-eos": (0.0, 1.0, 1.0)}
        self._weight_of = np.zeros(3, np.float32)
        for mark, weight in zip((0, CONTENT, END), targets[mask], strict=True):
            self._weight_of[mark] = weight or prompt_weight
        # No more wait than there are, or one document would stand in a row twice.
        self._enough = min(WAITING, sum(feed.size for feed in self._feeds))
        self._charged = [0] * len(mixture)
        self._waiting: dict[int, _Piece] = {}
        """In the order in which they were drawn."""
        self._by_length: list[tuple[int, int]] = []
        """(length, -serial) of all that wait: the last of a length has waited longest."""
        self._rest: int | None = None
        """The text that was cut at the last row's end."""
        self._serial = 0
        self._identity = {
            "seq_len": seq_len,
            "rows": rows,
            "mask": mask,
            "prompt_weight": prompt_weight,
            "seed": seed,
            "mixture": [source.model_dump_json() for source in mixture],
            "tokenizer": chat.identity,
            "exclude": list(held.questions),
            "data": [feed.identity for feed in self._feeds],
        }

    # --- what a caller may ask ---

    def next(self) -> Batch:
        """The following batch: of all processes together."""
        B, T = self.rows, self.seq_len
        tokens = np.full((B, T), self._pad, np.int64)
        weights = np.zeros((B, T), np.float32)
        position = np.zeros((B, T), np.int64)
        counting = np.arange(T)
        starts: list[int] = []
        filled: list[int] = []
        labels: list[str] = []
        for b in range(B):
            at = 0
            for piece, n in self._row():
                ids, marks, label = self._feeds[piece.feed].document(piece.key)
                begin, end = piece.start, piece.start + n
                tokens[b, at : at + n] = ids[begin:end]
                weights[b, at : at + n - 1] = self._weight_of[marks[begin + 1 : end]]
                position[b, at : at + n] = counting[:n]
                starts.append(b * T + at)
                labels.append(label)
                at += n
                self._advance(piece, n)
            if at < T:
                starts.append(b * T + at)
                position[b, at:] = counting[: T - at]
            filled.append(at)
        return Batch(
            tokens=torch.from_numpy(tokens),
            weights=torch.from_numpy(weights),
            starts=torch.tensor([*starts, B * T]),
            position=torch.from_numpy(position),
            valid=sum(filled),
            examples=tuple(labels),
            filled=tuple(filled),
        )

    @property
    def left_out(self) -> dict[str, int]:
        """Reason -> examples of any source that are never in a batch."""
        total: dict[str, int] = {}
        for feed in self._feeds:
            for reason, number in feed.left_out.items():
                total[reason] = total.get(reason, 0) + number
        return total

    @property
    def epochs(self) -> dict[str, int]:
        """Source -> times that all its documents were drawn; the last of them may still wait for their place."""
        total: dict[str, int] = {}
        for index, feed in enumerate(self._feeds):
            name = feed.label if feed.label not in total else f"{feed.label} (source {index + 1})"
            total[name] = feed.epoch
        return total

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON: not tokens, but which documents wait."""
        return {
            "identity": self._identity,
            "feeds": [feed.state_dict() for feed in self._feeds],
            "charged": list(self._charged),
            "serial": self._serial,
            "rest": self._rest,
            "waiting": [[s, p.feed, p.key, p.start, p.length, p.charged] for s, p in self._waiting.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken: bit for bit the batches that would have come."""
        known = state["identity"]
        changed = [name for name, value in self._identity.items() if known.get(name) != value]
        if changed:
            raise ValueError(
                f"the data can't go on where it stopped: {', '.join(changed)} changed since the checkpoint was saved; "
                f"restore what was there, or start the run anew in another folder"
            )
        for feed, saved in zip(self._feeds, state["feeds"], strict=True):
            feed.load_state_dict(saved)
        self._charged = list(state["charged"])
        self._serial, self._rest = state["serial"], state["rest"]
        self._waiting = {serial: _Piece(*fields) for serial, *fields in state["waiting"]}
        self._by_length = sorted((piece.length, -serial) for serial, piece in self._waiting.items())

    # --- which document comes where ---

    def _row(self) -> Iterator[tuple[_Piece, int]]:
        """(piece, tokens of it) from the row's begin to its end."""
        while len(self._waiting) < self._enough:
            self._draw()
        free = self.seq_len
        serial: int | None = next(iter(self._waiting)) if self._rest is None else self._rest
        self._rest = None
        second: int | None = None
        while serial is not None:
            piece = self._waiting[serial]
            n = min(piece.length, free)
            free -= n
            del self._by_length[bisect(self._by_length, (piece.length, -serial)) - 1]
            if n == piece.length:
                del self._waiting[serial]
            else:
                insort(self._by_length, (piece.length - n, -serial))
                self._rest = serial
            yield piece, n
            if second is not None:
                serial, second = second, None
            else:
                serial, second = self._following(free)

    def _advance(self, piece: _Piece, n: int) -> None:
        """Take ``n`` tokens off ``piece``; what is left of it is charged to its source up to another row's worth."""
        piece.start += n
        piece.length -= n
        left = min(piece.length, self.seq_len)
        self._charged[piece.feed] += left - (piece.charged - n)
        piece.charged = left
        if piece.length == 0:
            self._feeds[piece.feed].release(piece.key)

    def _following(self, free: int) -> tuple[int | None, int | None]:
        """The next one or two documents for a row with ``free`` tokens left; none if nothing more goes into it."""
        lengths = self._by_length
        if not lengths or not free:
            return None, None
        oldest = next(iter(self._waiting))
        if self._waiting[oldest].length + 2 * lengths[len(lengths) // 2][0] <= free:
            return oldest, None
        low, high = 0, bisect(lengths, (free, 1)) - 1
        if high < 0:
            if free < min(SHORTEST, self.seq_len // 4):
                return None, None
            texts = (serial for serial, piece in self._waiting.items() if self._feeds[piece.feed].splits)
            return next(texts, None), None
        best, chosen = lengths[high][0], (high, high)
        while low < high and best < free:
            both = lengths[low][0] + lengths[high][0]
            if both > free:
                high -= 1
                continue
            if both > best:
                best, chosen = both, (low, high)
            low += 1
        first, second = (-lengths[at][1] for at in chosen)
        return first, None if second == first else second

    def _draw(self) -> None:
        """One more document, from the source that is furthest behind its share of tokens."""
        behind = [charged / weight for charged, weight in zip(self._charged, self._weights, strict=True)]
        index = behind.index(min(behind))
        key, length = self._feeds[index].draw()
        charged = min(length, self.seq_len)
        self._waiting[self._serial] = _Piece(index, key, 0, length, charged)
        insort(self._by_length, (length, -self._serial))
        self._charged[index] += charged
        self._serial += 1
