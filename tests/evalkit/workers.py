"""Engines and workers without a model, for the tests of the pool; openers are functions of a module, so they pickle."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from evalkit.engines.pool import Host, Message, WorkerDied, unpack
from evalkit.opening import Opened
from evalkit.records import Reply, Request
from evalkit.store import Model

TOKENIZER: Any = None


def request(number: int, length: int = 3) -> Request:
    return Request(prompt=(number, *range(length)), continuations=((1,),))


def expected(one: Request) -> Reply:
    """What the engines here answer: it tells whose reply it is."""
    return Reply(logprobs=((-float(one.prompt[0]),),))


class EchoEngine:
    tokenizer = TOKENIZER
    max_length = 100

    def __init__(self, seconds: float = 0.0, refused: int = -1) -> None:
        self.seconds = seconds
        self.refused = refused

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        time.sleep(self.seconds)
        for at in reversed(range(len(requests))):
            if requests[at].prompt[0] == self.refused:
                raise ValueError(f"request {self.refused} can't be answered")
            yield at, expected(requests[at])


def opened(
    fingerprint: str = "f", batch_size: int = 2, close: Callable[[], None] = lambda: None, **engine: Any
) -> Opened:
    model = Model(name="echo", fingerprint=fingerprint, dtype="float32")
    return Opened(engine=EchoEngine(**engine), model=model, session={"batch_size": batch_size}, close=close)


class FakeWorker:
    """A worker in the driver's own process; ``dies`` says before each answer whether it does."""

    alive: set["FakeWorker"] = set()

    def __init__(self, name: str, host: Host, dies: Callable[[], bool] = lambda: False, unfit: bool = False) -> None:
        self.name = name
        self.host = host
        self.dies = dies
        self.unfit = unfit
        self.stopped = threading.Event()
        self.asked: list[Sequence[Request]] = []
        FakeWorker.alive.add(self)

    def open(self) -> Any:
        if self.unfit:
            raise WorkerDied(f"{self.name} died while it loaded")
        return self._unpacked(self.host.open())

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        self.asked.append(requests)
        if self.dies():
            raise WorkerDied(f"{self.name} died")
        replies: list[Reply] = self._unpacked(self.host.answer(requests))
        if self.dies():  # the work is done, the reply lost
            raise WorkerDied(f"{self.name} died")
        return replies

    def _unpacked(self, message: Message) -> Any:
        if self.stopped.is_set():
            raise WorkerDied(f"{self.name} was stopped")
        return unpack(message, self.name)

    def stop(self, force: bool) -> None:
        self.stopped.set()

    def close(self) -> None:
        FakeWorker.alive.discard(self)


def forking() -> Opened:
    """An engine with a process of its own that outlives its worker and holds all that the worker had open."""
    if os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    return opened(seconds=0.2)


def play(pipe: Any, job: Any, options: Any) -> None:
    """Instead of the scoring of a sweep's job: what becomes of it is in its name."""
    pipe.send(("progress", ("quick", 1, 2)))
    if job.name == "killed":
        os.kill(os.getpid(), 9)
    if job.name == "raised":
        sys.stderr.close()  # its traceback is not this test's
        raise AssertionError
    pipe.send(("failed", "there is no such model") if job.name == "refused" else ("done", {"tasks": []}))


def open_together(kind: type[Any], monkeypatch: Any) -> None:
    """The first two workers of ``kind`` are open at the same time, so that both have a part of the work."""
    together = threading.Barrier(2)
    first: list[Any] = []
    really = kind.open

    def both(worker: Any) -> Any:
        opened = really(worker)
        if len(first) < 2:
            first.append(worker)
            together.wait(120)
        return opened

    monkeypatch.setattr(kind, "open", both)


def kill_amid(kind: type[Any], kill: Callable[[Any], None], monkeypatch: Any) -> None:
    """``kill`` is called once, with the first worker of ``kind`` that is asked a second time. Whoever else is asked
    again waits for it, so that no worker has done the rest of the work before."""
    lock, killed = threading.Lock(), threading.Event()
    asked: list[Any] = []
    really = kind.answer

    def answer(worker: Any, requests: Any) -> Any:
        if requests and worker in asked:
            with lock:
                if not killed.is_set():
                    kill(worker)
                    killed.set()
        if requests:
            asked.append(worker)
        return really(worker, requests)

    monkeypatch.setattr(kind, "answer", answer)
