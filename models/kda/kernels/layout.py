"""How tokens fall into chunks, and chunks into segments: small integer tables that every kernel reads.

Sequences of any length lie one behind the other in one flat list of tokens, a batch [B, T] as B sequences of T. A
sequence is cut into chunks of C tokens (its last one shorter), and its chunks into segments: runs of chunks that are
scanned at the same time, because a segment is an affine map of the state (see forward.py).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Tables are int32 and lie on the inputs' device."""

    sequences: int
    chunks: Tensor
    """[chunks, 2]: first token, number of tokens."""
    segments: Tensor
    """[segments, 7]: sequence, first chunk, number of chunks, 1 if it begins its sequence, 1 if it ends it, its first
    token, its sequence's end."""
    jobs: Tensor
    """[jobs, 2]: segment and part of a map to compute; part 0 is the state that it makes of its first (zero unless it
    begins the sequence), part 1 the matrix it multiplies a state by. None for a sequence's last segment."""
    jobs_back: Tensor
    """The same for the backward, where a sequence begins at its last segment."""
    spans: Tensor
    """[sequences, 2]: first segment, number of segments."""

    @property
    def segmented(self) -> bool:
        return len(self.segments) > self.sequences


def dense(batch: int, tokens: int) -> tuple[int, ...]:
    """Where ``batch`` sequences of ``tokens`` tokens begin, and the end of the last."""
    return tuple(range(0, batch * tokens + 1, tokens)) if tokens else (0,) * (batch + 1)


@lru_cache(maxsize=64)
def cut(starts: tuple[int, ...], segments: int, device: torch.device) -> Layout:
    """Cut the sequences that begin at ``starts`` (the end behind them) into chunks and at most ``segments`` segments
    each."""
    chunks: list[tuple[int, int]] = []
    pieces: list[tuple[int, ...]] = []
    jobs: list[tuple[int, int]] = []
    jobs_back: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    for n, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        first = len(chunks)
        chunks += [(at, min(CHUNK, end - at)) for at in range(start, end, CHUNK)]
        count = len(chunks) - first
        span = max(1, -(-count // segments))
        cuts = list(range(first, first + count, span)) or [first]  # an empty sequence has one empty segment
        spans.append((len(pieces), len(cuts)))
        for at in cuts:
            length = min(span, first + count - at)
            last = at == cuts[-1]
            for begins, ends, found in ((at == first, last, jobs), (last, at == first, jobs_back)):
                if not ends:
                    found += [(len(pieces), part) for part in ((0,) if begins else (0, 1))]
            pieces.append((n, at, length, int(at == first), int(last), start + (at - first) * CHUNK, end))
    none = [(0, 0)]
    tables = {
        "chunks": chunks or none,
        "segments": pieces,
        "jobs": jobs or none,
        "jobs_back": jobs_back or none,
        "spans": spans,
    }
    on_device = {name: torch.tensor(table, dtype=torch.int32, device=device) for name, table in tables.items()}
    return Layout(sequences=len(starts) - 1, **on_device)


@lru_cache(maxsize=16)
def sum_matrices(dtype: torch.dtype, device: torch.device, transposed: bool = False) -> Tensor:
    """0, 1 and -1 matrices [13, CHUNK, CHUNK]; times log-decays [CHUNK, K] they give a chunk's exponents.

    0: row i sums the tokens up to i. 1: those behind i. 2 + n: from behind i to just before the n-th block of 16 for
    rows before the block; minus the block's tokens up to i for rows in it; nothing for rows after it. 6 + n: where
    half-blocks of 2^n tokens meet, in pairs: a row of the later half sums from the half's start to itself, a row of
    the earlier one from behind itself to its end. 12: row i sums its block of 16 up to i.
    """
    i, s = torch.arange(CHUNK)[:, None], torch.arange(CHUNK)[None, :]
    found = [(s <= i).float(), (s > i).float()]
    for n in range(4):
        start = 16 * n
        before = (i < start) & (s > i) & (s < start)
        inside = (i // 16 == n) & (s >= start) & (s <= i)
        found.append(before.float() - inside.float())
    for n in range(6):
        half = 2**n
        meet = torch.where(i // half % 2 == 1, s <= i, s > i)
        found.append((meet & (s // half == i // half)).float())
    found.append(((i // 16 == s // 16) & (s <= i)).float())
    matrices = torch.stack(found)
    return (matrices.mT.contiguous() if transposed else matrices).to(device, dtype)
