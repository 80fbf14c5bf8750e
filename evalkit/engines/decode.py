"""Replies, a token a pass for all rows: a row that ends leaves, and the next prompt takes its place.

The shapes of a pass are few and fixed: rows a power of two, columns those of the slots. On a CUDA GPU each shape is
one CUDA graph, since a small model's launches take longer than its work; elsewhere rows and columns are cut to what is
in use.
"""

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evalkit.encoding import Tokenizer
from evalkit.engines.cache import Slots, row_bytes
from evalkit.engines.forward import Forward
from evalkit.engines.prefill import Begun
from evalkit.engines.profile import Profile
from evalkit.engines.replies import Watch, cut_reply, seed_of
from evalkit.engines.work import Job
from evalkit.records import Generation
from evalkit.scoring import TIE

logger = logging.getLogger("evalkit")

Chosen = tuple[Tensor, Tensor]
"""(logits [rows, vocabulary], what `_best` makes of them)."""
Step = Callable[[int], Chosen]
"""One pass over so many rows."""

ROUND = 16
"""Slots have a multiple of this many columns."""
FEW = 4
"""Rows that slots have at first, where they may grow."""
CACHE = 2**28
"""Bytes of all slots where memory can't be asked for: a CPU is kept busy by the rows that they hold."""


class Sampler:
    """The next token of one row: the argmax of scores plus Gumbel noise (Gumbel, 1954) from a generator of its own.

    Its seed is its request's, so a reply depends on no other row, and the global generator is left alone.
    """

    def __init__(self, prompt: tuple[int, ...], generation: Generation) -> None:
        self.temperature = generation.temperature
        if self.temperature:
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
        self.needs: list[int] = []
        """Columns that each reply to come will need: slots are made for the longest of those like the first, and not
        for more than come."""
        self.slots: Slots | None = None
        self._places: list[Row | None] = []
        """By slot, up to the last that is in use. What ends leaves its place empty until another takes it."""
        self._cap = rows
        """Rows that the slots may grow to."""
        self._asked = 0
        """Rows that they were made for, had there been memory."""
        self._graphs: Graphs | None = None
        self._watches: dict[tuple[str, ...], Watch] = {}

    @property
    def rows(self) -> list[Row]:
        return [row for row in self._places if row is not None]

    @property
    def most(self) -> int:
        """Rows at once, as things are."""
        return self.limit if self.slots is None else min(self.limit, self._cap)

    def room(self, need: int) -> int:
        """How many rows of ``need`` columns may enter now. Where they would need more columns than the slots have, or
        leave more than half of them unused, they wait until the slots are free and make new ones."""
        if rows := len(self.rows):
            return max(0, self.most - rows) if self._fits(need) else 0
        return self.most if self._fits(need) else self.limit

    def _fits(self, need: int) -> bool:
        if self.slots is None or (not self.rows and self._wanted > self._asked):
            return False
        return need <= self.slots.columns <= 2 * _rounded(need)

    @property
    def _wanted(self) -> int:
        return _bucket(max(1, min(self.limit, len(self.needs))), self.limit) if self.static else self.limit

    def enter(self, begun: Sequence[Begun]) -> list[Row]:
        """Choose the first token of each reply of one prefill pass; rows that go on take slots, the others are
        returned, finished."""
        rows = [
            Row(one.job, generation, Sampler(one.job.prompt, generation), self._watch(generation.stops), [])
            for one in begun
            for generation in one.job.generations
        ]
        if not rows:
            return []
        from_ = [one for one in begun for _ in one.job.generations]
        logits = torch.stack([one.logits for one in from_])
        self._choose(rows, range(len(rows)), logits, _best(logits))
        ended = [self._ended(row) for row in rows]
        going = [(one, row) for one, row, over in zip(from_, rows, ended, strict=True) if not over]
        if going:
            need = max(one.job.need for one in begun)
            if not self.rows and (not self._fits(need) or len(going) > self.most):
                self._make_slots(going[0][0], need, len(going))
            self._seat(going)
        return [row for row, over in zip(rows, ended, strict=True) if over]

    def _seat(self, going: Sequence[tuple[Begun, Row]]) -> None:
        assert self.slots is not None
        places = list(self._places)
        empty = [slot for slot, row in enumerate(places) if row is None][: len(going)]
        slots = [*empty, *range(len(places), len(places) + len(going) - len(empty))]
        places += [None] * (len(going) - len(empty))
        assert len(places) <= self._cap, "more rows than slots were made for"
        while self.slots.rows < len(places):
            self.slots.grow(min(self._cap, 2 * self.slots.rows))
        begun = [one for one, _ in going]
        self.slots.put(slots, begun[0].cache, [one.row for one in begun], [one.columns for one in begun])
        for slot, (_, row) in zip(slots, going, strict=True):
            places[slot] = row
        self.slots.next[slots] = self._newest(row for _, row in going)
        self._places = places

    def step(self) -> list[Row]:
        """One more token for every row; those that it finishes leave and are returned."""
        assert self.slots is not None
        self._close_gaps()  # before anything is chosen: where it finds no memory, nothing is lost
        taken = [slot for slot, row in enumerate(self._places) if row is not None]
        rows = self.rows
        with self.profile.phase("decode", len(rows)):
            size = self._size(len(self._places))
            logits, best = self._pass(size) if self._graphs is None else self._graphs.replay(size)
            if self._choose(rows, taken, logits, best):
                self.slots.next[taken] = self._newest(rows)
            done = {slot: row for slot, row in zip(taken, rows, strict=True) if self._ended(row)}
            if done:
                self.slots.leave(list(done))
        for slot in done:
            self._places[slot] = None
        return list(done.values())

    def _close_gaps(self) -> None:
        """Where the rows that are left fit a smaller pass, they stand side by side again."""
        assert self.slots is not None
        while self._places and self._places[-1] is None:
            self._places.pop()
        taken = [slot for slot, row in enumerate(self._places) if row is not None]
        number = len(taken)
        if number == len(self._places) or self._size(number) == self._size(len(self._places)):
            return
        sources = [slot for slot in taken if slot >= number]
        empty = [slot for slot in range(number) if self._places[slot] is None]
        self.slots.move(sources, empty)
        for source, slot in zip(sources, empty, strict=True):
            self._places[slot] = self._places[source]
        del self._places[number:]

    def rest(self) -> None:
        """Nothing is left to do, or the work was broken off. On a CUDA GPU slots stay, with the graphs over them."""
        if self.forward.device.type == "cuda":
            self._places = []
        else:
            self.clear()

    def clear(self) -> None:
        """Give all memory back."""
        self._places, self.slots, self._graphs = [], None, None

    def evict(self) -> list[Job]:
        """Give all memory back; what was not finished is to be done again."""
        rows = self.rows
        self.clear()
        return [replace(row.job, continuations=[], generations=[row.generation]) for row in rows]

    def _make_slots(self, one: Begun, need: int, entering: int) -> None:
        self.clear()
        longest = max((other for other in self.needs if _rounded(other) <= 2 * need), default=need)
        device, columns = self.forward.device, _rounded(max(need, longest))
        self._asked = max(entering, self._wanted)
        self._cap = max(entering, min(self._asked, self._memory() // max(1, row_bytes(one.cache, columns))))
        # Most replies may end at their first token and need no slot; but fixed shapes don't grow.
        rows = self._cap if self.static else min(self._cap, max(entering, FEW))
        try:
            self.slots = Slots(one.cache, rows, columns, device)
            if device.type == "cuda":
                sizes = {_bucket(n, rows) for n in range(1, rows + 1)}
                self._graphs = captured(self._pass, sizes, {one.device for one in self.forward.model.parameters()})
        except torch.OutOfMemoryError:
            self.clear()
            raise
        self.profile.graphs = self._graphs is not None

    def _memory(self) -> int:
        """Bytes that slots may take: half of what a GPU has left."""
        if self.forward.device.type != "cuda":
            return CACHE
        device = self.forward.device
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused) // 2

    def _size(self, rows: int) -> int:
        """Rows of a pass that has this many to run."""
        assert self.slots is not None
        return _bucket(rows, self.slots.rows) if self.static else rows

    def _pass(self, used: int) -> Chosen:
        """Of the first ``used`` slots, whose next token is then the likeliest. Reads and writes the same memory each
        time, and leaves nothing for the host to do."""
        slots = self.slots
        assert slots is not None
        width = slots.columns
        if not self.static:
            width = max(len(row.job.prompt) + len(row.tokens) for row in self.rows)
        slots.use(used, width)
        ids, at = slots.next[:used, None], slots.at[:used, None]
        logits = self.forward(ids, None, mask=slots.mask(), positions=at, cache=slots.cache)
        best = _best(logits)
        slots.advance(best[0])
        return logits, best

    def _choose(self, rows: Sequence[Row], at: Sequence[int], logits: Tensor, best: Tensor) -> bool:
        """Give each row its next token, by the logits and `_best` in its place ``at``. Whether any is not the
        likeliest, but drawn."""
        tokens, near = best.tolist()
        drawn = [r for r, row in enumerate(rows) if row.sampler.temperature]
        for r in drawn:
            place = at[r]
            [[tokens[place]], [near[place]]] = _best(rows[r].sampler(logits[place])[None]).tolist()
        for row, place in zip(rows, at, strict=True):
            row.tokens.append(tokens[place])
            self.profile.ties += near[place]
        return bool(drawn)

    def _newest(self, rows: Iterable[Row]) -> Tensor:
        return torch.tensor([row.tokens[-1] for row in rows], device=self.forward.device)

    def _watch(self, stops: tuple[str, ...]) -> Watch:
        return self._watches.setdefault(stops, Watch(self.tokenizer, stops))

    def _ended(self, row: Row) -> bool:
        """Whether the row's newest token ends it; its reply is then with its job."""
        tokens = row.tokens
        if not (tokens[-1] in self.eos or len(tokens) >= row.generation.max_tokens or row.watch(tokens)):
            return False
        row.job.said[row.generation] = cut_reply(self.tokenizer, tokens, row.generation, self.eos)
        return True


def _best(logits: Tensor) -> Tensor:
    """[2, rows]: the likeliest token, and 1 where another is as near as rounding may move it."""
    best, tokens = logits.max(-1)
    near = logits >= (best - TIE * best.abs().clamp(min=1))[:, None]
    return torch.stack([tokens, (near.sum(-1) > 1).long()])


class Graphs:
    """A pass as CUDA graphs, one for each number of rows."""

    def __init__(self, step: Step, sizes: Collection[int], device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            # Results are read before the next replay, so all graphs may use the same memory; the largest comes first.
            self._pool = torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a capture that fails would leave its own stream the current one
                _refuse_waits(step, max(sizes))
                self._graphs = {size: self._capture(step, size, stream) for size in sorted(sizes, reverse=True)}
            torch.cuda.current_stream().wait_stream(stream)

    def _capture(self, step: Step, size: int, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Chosen]:
        step(size)  # what is made once, such as kernels, can't be made during the capture
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on, such as one that loads data.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            result = step(size)
        return graph, result

    def replay(self, size: int) -> Chosen:
        graph, result = self._graphs[size]
        with torch.cuda.device(self._device):
            graph.replay()
        return result


def captured(step: Step, sizes: Collection[int], devices: Collection[torch.device]) -> Graphs | None:
    """Before any row has its slot: the passes that warm up write states. None, with a word in the log: it can't be
    captured, and runs as it is written."""
    if len(devices) > 1:
        logger.info("decoding runs without CUDA graphs: the model is spread over %d devices", len(devices))
        return None
    try:
        return Graphs(step, sizes, next(iter(devices)))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        logger.warning("decoding runs without CUDA graphs: %s", str(error).partition("\n")[0])
        return None


def _refuse_waits(step: Step, size: int) -> None:
    """RuntimeError where the host waits for the GPU: found during a capture, it would spoil PyTorch's allocator."""
    step(size)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode does not see everything
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(size)
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _bucket(rows: int, most: int) -> int:
    """The next power of two, at most ``most``."""
    return min(most, 1 << (rows - 1).bit_length())


def _rounded(columns: int) -> int:
    return -(-columns // ROUND) * ROUND
