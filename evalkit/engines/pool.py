"""One engine over many workers: each holds an engine of its own, elsewhere, and takes from one queue of requests.

A worker that dies loses nothing: its chunk goes to another one, and a new worker takes its place. Where workers run
(local processes, Ray actors) is behind `Worker`.
"""

import contextlib
import itertools
import logging
import queue
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from evalkit.encoding import Tokenizer
from evalkit.engines.base import cost, versions
from evalkit.records import Reply, Request

ATTEMPTS = 3
"""Workers that may die over one chunk, and deaths in a row of one place, before it is given up."""
BATCH = 16
"""Requests of the smallest chunk, where the engine names no batch size."""
PATIENCE_S = 10.0
"""For a worker to end by itself."""
_MEMORY = re.compile("SIGKILL|memory", re.IGNORECASE)
"""A death that may be for want of memory."""

logger = logging.getLogger("evalkit")

Message = tuple[Literal["done", "refused", "broken"], Any]
"""How a worker answers: the value; the text of a ValueError; or the traceback of anything else."""


class WorkerDied(Exception):
    """The worker is lost: killed, out of reach, or broken by an error that is not the request's own."""


class Worker(Protocol):
    """An engine elsewhere. All calls but ``stop`` come from one thread and block."""

    @property
    def name(self) -> str:
        """Which one it is and where it runs, for messages."""
        ...

    def open(self) -> Any:
        """Load the engine -> `Host.open`'s value. ValueError: it can't be; WorkerDied."""
        ...

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply a request, in order; to none at once, to show that it lives. ValueError: the engine refused them;
        WorkerDied."""
        ...

    def stop(self, force: bool) -> None:
        """End it, from any thread; a call that blocks then raises WorkerDied."""
        ...

    def close(self) -> None:
        """End it and wait until it is gone."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the driver needs of a worker's engine, in its place."""

    tokenizer: Tokenizer
    max_length: int

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        raise AssertionError("the engine is in a worker")


class Host:
    """Runs in a worker: opens the engine, answers, and reports errors as values, which every transport can carry."""

    def __init__(self, opener: Callable[[], Any]) -> None:
        self._opener = opener
        self._opened: Any = None

    def open(self) -> Message:
        """The opener's ``evalkit.opening.Opened``, with `Facts` for its engine and the versions that this place has."""
        return self._report(self._open)

    def answer(self, requests: Sequence[Request]) -> Message:
        return self._report(lambda: self._answer(requests))

    def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def _open(self) -> Any:
        self._opened = self._opener()
        engine = self._opened.engine
        facts = Facts(tokenizer=engine.tokenizer, max_length=engine.max_length)
        used = {**versions(), **self._opened.versions}
        return replace(self._opened, engine=facts, versions=used, close=_nothing, profile=dict)

    def _answer(self, requests: Sequence[Request]) -> list[Reply]:
        replies = dict(self._opened.engine.answer(requests)) if requests else {}
        return [replies[i] for i in range(len(requests))]

    def _report(self, call: Callable[[], Any]) -> Message:
        try:
            return "done", call()
        except (ValueError, ImportError) as error:
            return "refused", str(error)
        except Exception:
            return "broken", traceback.format_exc()


def _nothing() -> None:
    """The driver's side of ``Opened.close``: the worker closes its own."""


def unpack(message: Message, name: str) -> Any:
    """The value of a message from worker ``name``; ValueError or WorkerDied for an error."""
    kind, value = message
    if kind == "refused":
        raise ValueError(f"{name}: {value}")
    if kind == "broken":
        logger.debug("%s: %s", name, value)
        raise WorkerDied(f"{name} failed with {value.strip().splitlines()[-1]}")
    return value


def shares(costs: Sequence[int], workers: int, batch: int) -> Iterator[slice]:
    """Chunks of ``costs`` in order. Each costs half of an even share of what is left, so that the last ones are small
    and workers end together (guided self-scheduling, Polychronopoulos and Kuck, 1987); whole batches each."""
    batch = max(1, min(batch, -(-len(costs) // workers)))
    left, start = sum(costs), 0
    while start < len(costs):
        end, taken = start, 0
        while end < len(costs) and (end == start or taken + sum(costs[end : end + batch]) <= left / (2 * workers)):
            taken += sum(costs[end : end + batch])
            end = min(len(costs), end + batch)
        yield slice(start, end)
        start, left = end, left - taken


@dataclass(slots=True)
class _Chunk:
    call: object
    """The call of ``answer`` that it belongs to."""
    indices: Sequence[int]
    requests: Sequence[Request]
    deaths: int = 0


class Pool:
    """``answer`` over ``size`` workers; work begins when the first one is open, the others join as they come."""

    def __init__(self, start: Callable[[int], Worker], size: int) -> None:
        self._start = start
        self.size = size
        self._todo: queue.PriorityQueue[tuple[int, _Chunk | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._events: queue.Queue[Exception | tuple[_Chunk, list[Reply]] | None] = queue.Queue()
        """What the driver waits for: an error, a chunk's replies, or (None) the first worker is open."""
        self._call: object = None
        self._lock = threading.Lock()
        self._closed = False
        self._workers: dict[int, Worker] = {}
        self._places = size
        """Those where a worker runs, or may still start."""
        self._opened: Any = None
        self._threads = [threading.Thread(target=self._serve, args=(n,), daemon=True) for n in range(size)]
        try:
            for thread in self._threads:
                thread.start()
            event = self._events.get()
            if isinstance(event, Exception):
                raise event
        except BaseException:
            self.close()
            raise

    @property
    def opened(self) -> Any:
        """The ``evalkit.opening.Opened`` of the first worker, with `Facts` for its engine."""
        return self._opened

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer: Tokenizer = self._opened.engine.tokenizer
        return tokenizer

    @property
    def max_length(self) -> int:
        return int(self._opened.engine.max_length)

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Long requests first, as one engine alone would take them, so its batches are the same."""
        order = sorted(range(len(requests)), key=lambda i: -cost(requests[i]))
        batch = self._opened.session.get("batch_size") or BATCH
        call = self._call = object()
        for part in shares([cost(requests[i]) for i in order], self.size, batch):
            chunk = _Chunk(call, order[part], [requests[i] for i in order[part]])
            self._todo.put((next(self._numbers), chunk))
        missing = len(requests)
        try:
            while missing:
                event = self._events.get()
                if isinstance(event, Exception):
                    raise event
                if event is None or event[0].call is not call:
                    continue
                missing -= len(event[1])
                yield from zip(event[0].indices, event[1], strict=True)
        finally:
            self._call = None  # workers pass over what is left of it

    def close(self) -> None:
        """End every worker, busy or not, and wait until all are gone."""
        self._closed = True
        for _ in self._threads:
            self._todo.put((-next(self._numbers) - 1, None))
        for force in (False, True):
            with self._lock:
                for worker in self._workers.values():
                    worker.stop(force)
            deadline = time.monotonic() + PATIENCE_S
            for thread in self._threads:
                if thread.ident is not None:  # started
                    thread.join(max(0, deadline - time.monotonic()))

    # --- in the threads, one a worker ---

    def _serve(self, number: int) -> None:
        deaths = 0
        while not self._closed:
            try:
                with self._worker(number) as worker:
                    self._welcome(worker, worker.open())
                    while (taken := self._take(worker))[1] is not None:
                        if self._answer(worker, *taken):
                            deaths = 0
                    return
            except WorkerDied as death:
                deaths += 1
                if not self._closed:
                    self._mourn(death, deaths)
                if deaths >= ATTEMPTS:
                    return
            except Exception as error:  # the request's, or a worker that does not fit: the driver raises it
                self._events.put(error)
                return

    @contextlib.contextmanager
    def _worker(self, number: int) -> Iterator[Worker]:
        worker = self._start(number)
        with self._lock:
            self._workers[number] = worker
        try:
            if self._closed:  # `close` may not have seen it
                raise WorkerDied(f"{worker.name} is no longer needed")
            yield worker
        finally:
            worker.close()
            with self._lock:
                del self._workers[number]

    def _welcome(self, worker: Worker, opened: Any) -> None:
        """The first worker speaks for all; ValueError for one whose model is another."""
        with self._lock:
            first = self._opened
            if first is None:
                self._opened = opened
                self._events.put(None)
                return
        differences = [
            f"{what} {getattr(opened.model, what)!r}, others {getattr(first.model, what)!r}"
            for what in ("fingerprint", "dtype")
            if getattr(opened.model, what) != getattr(first.model, what)
        ]
        if opened.versions != first.versions:
            names = sorted(dict(opened.versions.items() ^ first.versions.items()))
            there = ", ".join(f"{n} {opened.versions.get(n)}, others {first.versions.get(n)}" for n in names)
            raise ValueError(
                f"{worker.name} computes with other versions than the other workers ({there}); install the same ones "
                f"in every place"
            )
        if differences:
            raise ValueError(
                f"{worker.name} loaded another model than the other workers ({'; '.join(differences)}); give every "
                f"place the same files, and name the --dtype"
            )

    def _take(self, worker: Worker) -> "tuple[int, _Chunk | None]":
        """What is to be done next. A worker that had to wait for it may have died meanwhile, for which no chunk is to
        blame: it first shows that it lives."""
        with contextlib.suppress(queue.Empty):
            return self._todo.get_nowait()
        number, chunk = self._todo.get()
        if chunk is not None:
            try:
                worker.answer(())
            except WorkerDied:
                self._todo.put((number, chunk))
                raise
        return number, chunk

    def _answer(self, worker: Worker, number: int, chunk: "_Chunk | None") -> bool:
        """Whether ``worker`` answered; the chunk goes back into the queue if it dies."""
        assert chunk is not None
        if chunk.call is not self._call:
            return False
        try:
            self._events.put((chunk, worker.answer(chunk.requests)))
            return True
        except WorkerDied as death:
            chunk.deaths += 1
            if chunk.deaths >= ATTEMPTS:
                advice = "if memory ran out, use a smaller --batch-size; " if _MEMORY.search(str(death)) else ""
                raise ValueError(
                    f"{chunk.deaths} workers died over the same {len(chunk.requests)} requests, the last: {death}; "
                    f"{advice}what is scored so far is kept"
                ) from death
            self._todo.put((number, chunk))
            raise

    def _mourn(self, death: WorkerDied, deaths: int) -> None:
        gone = deaths >= ATTEMPTS
        logger.warning("%s; %s", death, "its place is given up" if gone else "another one takes its place")
        if gone:
            with self._lock:
                self._places -= 1
                if not self._places:
                    self._events.put(ValueError(f"no worker is left, the last: {death}"))
