"""Replies, a token a pass for all rows: a row that ends leaves, and the next prompt takes its place.

The shapes of a pass are few and fixed: rows a power of two, columns those of the slots. On a CUDA GPU each shape is
one CUDA graph, since a small model's launches take longer than its work; elsewhere rows and columns are cut to what is
in use.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evalkit.encoding import CLOSE, OPEN, Tokenizer
from evalkit.engines.cache import Slots, row_bytes
from evalkit.engines.forward import Forward
from evalkit.engines.prefill import Begun
from evalkit.engines.profile import Profile
from evalkit.engines.replies import cut_reply, decode, first_stop, seed_of
from evalkit.engines.work import Job
from evalkit.records import Generation
from evalkit.scoring import TIE

logger = logging.getLogger("evalkit")

FIRST = 8
"""A thinking block that the model opens itself stands within its first tokens."""
ROUND = 16
"""Slots have a multiple of this many columns."""
FEW = 4
"""Rows that slots have at first, where they may grow."""
CACHE = 2**28
"""Bytes of all slots where memory can't be asked for: a CPU is kept busy by the rows that they hold."""


class Watch:
    """Tells, token by token, when a row has ended by a stop string or its length."""

    def __init__(self, tokenizer: Tokenizer, generation: Generation) -> None:
        self.tokenizer = tokenizer
        self.generation = generation
        self.thinks = False
        """The model opened a thinking block itself; no stop string counts before its end."""

    def ended(self, tokens: Sequence[int]) -> bool:
        """``tokens``: all that the row has said; asked after each token."""
        stops = self.generation.stops
        if len(tokens) >= self.generation.max_tokens:
            return True
        if not stops:
            return False
        if len(tokens) <= FIRST:
            self.thinks = decode(self.tokenizer, tokens, stops).lstrip().startswith(OPEN)
        # A stop string of n characters lies within the last n + 8 tokens: every token but a byte piece has one.
        tail = max(map(len, stops)) + 8
        shown = tokens if self.thinks and CLOSE not in stops else tokens[-tail:]
        return first_stop(decode(self.tokenizer, shown, stops), stops) is not None


class Sampler:
    """The next token of one row: the argmax of scores plus Gumbel noise (Gumbel, 1954) from a generator of its own.

    Its seed is its request's, so a reply depends on no other row, and the global generator is left alone.
    """

    def __init__(self, prompt: tuple[int, ...], generation: Generation) -> None:
        self.temperature = generation.temperature
        self.generator = torch.Generator().manual_seed(seed_of(prompt, generation))

    def __call__(self, logits: Tensor) -> Tensor:
        """Float32 logits [vocabulary] -> scores whose argmax is the token; without a temperature, the logits."""
        if not self.temperature:
            return logits
        noise = -torch.empty(logits.shape).exponential_(generator=self.generator).log()
        return logits / self.temperature + noise.to(logits.device)


@dataclass(slots=True)
class Row:
    """A reply that grows."""

    job: Job
    generation: Generation
    sampler: Sampler
    watch: Watch
    tokens: list[int]


class Decoder:
    """Rows in slots; their number and the slots' columns are bounded by memory.

    static: shapes are kept to a few, as a CUDA GPU has it whatever is said here; without a graph on other devices.
    """

    def __init__(
        self,
        forward: Forward,
        tokenizer: Tokenizer,
        eos: frozenset[int],
        profile: Profile,
        *,
        rows: int,
        static: bool = False,
    ) -> None:
        self.forward = forward
        self.tokenizer = tokenizer
        self.eos = eos
        self.profile = profile
        self.limit = rows
        self.static = static or forward.device.type == "cuda"
        self.rows: list[Row] = []
        self.needs: list[int] = []
        """Columns that the rows to come will need: slots are made for the longest of those like the first."""
        self.slots: Slots | None = None
        self._cap = rows
        """Rows that the slots may grow to."""
        self._ids = torch.zeros(0, dtype=torch.long)
        self._step: Callable[[int], Tensor] = self._pass

    @property
    def most(self) -> int:
        """Rows at once, as things are."""
        return self.limit if self.slots is None else min(self.limit, self._cap)

    def room(self, need: int) -> int:
        """How many rows of ``need`` columns may enter now. Where they would need more columns than the slots have, or
        leave more than half of them unused, they wait until the slots are free and make new ones."""
        if self.rows:
            return max(0, self.most - len(self.rows)) if self._fits(need) else 0
        return self.most if self._fits(need) else self.limit

    def _fits(self, need: int) -> bool:
        return self.slots is not None and self.slots.columns <= 2 * _rounded(need) and need <= self.slots.columns

    def enter(self, begun: Sequence[Begun]) -> list[Row]:
        """Choose each reply's first token; rows that go on take slots, the others are returned, finished."""
        rows = [
            Row(one.job, generation, Sampler(one.job.prompt, generation), Watch(self.tokenizer, generation), [])
            for one in begun
            for generation in one.job.generations
        ]
        if not rows:
            return []
        from_ = [one for one in begun for _ in one.job.generations]
        self._choose(rows, torch.stack([one.logits for one in from_]))
        ended = [self._ended(row) for row in rows]
        for one, row, over in zip(from_, rows, ended, strict=True):
            if over:
                continue
            if not self.rows and not self._fits(need := max(one.job.need for one in begun)):
                self._make_slots(one, need, len(rows) - sum(ended))
            assert self.slots is not None
            if len(self.rows) == self.slots.rows:
                self._resize(min(self._cap, 2 * self.slots.rows))
            self.slots.put(len(self.rows), one.cache, one.row, one.columns)
            self.rows.append(row)
        return [row for row, over in zip(rows, ended, strict=True) if over]

    def step(self) -> list[Row]:
        """One more token for every row; those that it finishes leave and are returned."""
        assert self.slots is not None
        number = len(self.rows)
        with self.profile.phase("decode", number):
            self._ids[:number] = torch.tensor([row.tokens[-1] for row in self.rows])
            logits = self._step(_bucket(number, self.slots.rows) if self.static else number)[:number]
            self.slots.at[:number] += 1
            self._choose(self.rows, logits)
            ended = [self._ended(row) for row in self.rows]
        done = []
        for slot in reversed(range(number)):
            if ended[slot]:
                done.append(self.rows[slot])
                last = len(self.rows) - 1
                if slot != last:
                    self.slots.move(last, slot)
                    self.rows[slot] = self.rows[last]
                self.rows.pop()
        return done

    def rest(self) -> None:
        """Nothing is left to do, or the work was broken off. On a CUDA GPU slots stay, with the graphs over them."""
        if self.forward.device.type == "cuda":
            self.rows = []
        else:
            self.clear()

    def clear(self) -> None:
        """Give all memory back."""
        self.rows, self.slots, self._step = [], None, self._pass

    def evict(self) -> list[Job]:
        """Give all memory back; what was not finished is to be done again."""
        rows = self.rows
        self.clear()
        return [replace(row.job, continuations=[], generations=[row.generation]) for row in rows]

    def _make_slots(self, one: Begun, need: int, entering: int) -> None:
        self.clear()
        longest = max((other for other in self.needs if _rounded(other) <= 2 * need), default=need)
        device, columns = self.forward.device, _rounded(max(need, longest))
        self._cap = max(entering, min(self.limit, self._memory() // max(1, row_bytes(one.cache, columns))))
        # Most replies may end at their first token and need no slot; but fixed shapes don't grow.
        rows = self._cap if self.static else min(self._cap, max(entering, FEW))
        self.slots = Slots(one.cache, rows, columns, device)
        self._ids = torch.zeros(rows, dtype=torch.long, device=device)
        if device.type == "cuda":
            self._step = GraphedStep(self._pass, sorted({_bucket(n, rows) for n in range(1, rows + 1)}))

    def _resize(self, rows: int) -> None:
        assert self.slots is not None
        self.slots.grow(rows)
        self._ids = torch.zeros(rows, dtype=torch.long, device=self.forward.device)

    def _memory(self) -> int:
        """Bytes that slots may take: half of what a GPU has left."""
        if self.forward.device.type != "cuda":
            return CACHE
        device = self.forward.device
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused) // 2

    def _pass(self, used: int) -> Tensor:
        """Logits [used, vocabulary] of the first ``used`` slots; reads and writes the same memory each time."""
        slots = self.slots
        assert slots is not None
        width = slots.columns
        if not self.static:
            width = max(len(row.job.prompt) + len(row.tokens) for row in self.rows)
        slots.use(used, width)
        ids, at = self._ids[:used, None], slots.at[:used, None]
        return self.forward(ids, None, mask=slots.mask(), positions=at, cache=slots.cache)

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> None:
        if any(row.sampler.temperature for row in rows):
            logits = torch.stack([row.sampler(one) for row, one in zip(rows, logits, strict=True)])
        best, tokens = logits.max(-1)
        near = logits >= (best - TIE * best.abs().clamp(min=1))[:, None]
        self.profile.ties += int((near.sum(-1) > 1).sum())
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.tokens.append(token)

    def _ended(self, row: Row) -> bool:
        """Whether the row's newest token ends it; its reply is then with its job."""
        if row.tokens[-1] not in self.eos and not row.watch.ended(row.tokens):
            return False
        row.job.said[row.generation] = cut_reply(self.tokenizer, row.tokens, row.generation, self.eos)
        return True


class GraphedStep:
    """A decode pass as CUDA graphs, one for each number of rows, captured before any row has its slot: the passes that
    warm up write states. Where a graph can't be captured the pass runs as it is written, and the log says so."""

    def __init__(self, step: Callable[[int], Tensor], sizes: Sequence[int]) -> None:
        self.step = step
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        try:
            for size in sizes:
                self.graphs[size] = self._capture(size)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.graphs.clear()
            logger.warning("decoding runs without CUDA graphs: %s", str(error).partition("\n")[0])

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):
                self.step(size)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.step(size)
        return graph, logits

    def __call__(self, size: int) -> Tensor:
        if size not in self.graphs:
            return self.step(size)
        graph, logits = self.graphs[size]
        graph.replay()
        return logits


def _bucket(rows: int, most: int) -> int:
    """The next power of two, at most ``most``."""
    return min(most, 1 << (rows - 1).bit_length())


def _rounded(columns: int) -> int:
    return -(-columns // ROUND) * ROUND
