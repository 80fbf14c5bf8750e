"""Workers as processes of this machine: several GPUs, or several copies of a small model."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from evalkit.engines.pool import PATIENCE_S, Host, WorkerDied, unpack
from evalkit.records import Reply, Request

GLANCE_S = 0.2
"""Between two looks at whether a process still lives."""


class Process:
    """A process with a pipe. It is a fresh interpreter (spawn): CUDA can't be forked."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # Not a daemon: engines such as vLLM start processes of their own.
        self.process = context.Process(target=_run, args=(target, theirs, *args))
        self.process.start()
        theirs.close()  # so that its death closes the pipe

    def receive(self) -> Any:
        """What it sends next. EOFError: it is gone. The pipe alone does not tell: a process that the lost one had
        forked (vLLM does) holds it open."""
        while not self.pipe.poll(GLANCE_S):
            if not self.process.is_alive() and not self.pipe.poll():
                raise EOFError
        return self.pipe.recv()

    def stop(self, force: bool) -> None:
        self.process.kill() if force else self.process.terminate()

    def close(self) -> str:
        """Wait for its end, or bring it about -> how it ended."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.is_alive() and time.monotonic() < deadline:
            self.process.join(GLANCE_S)  # in glances, as in `receive`
        self.stop(force=True)
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _run(target: Callable[..., None], pipe: Connection, *args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides
    signal.signal(signal.SIGTERM, _leave)
    target(pipe, *args)


def _leave(*_: object) -> None:
    """So that `finally` closes what the engine opened; a second signal must not disturb that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


class LocalWorker:
    """``environment`` is set before the engine is opened: which GPUs it sees, how many threads it takes."""

    def __init__(self, number: int, opener: Callable[[], Any], environment: dict[str, str]) -> None:
        self._process = Process(_serve, opener, environment)
        self.name = f"worker {number} (process {self._process.process.pid})"

    def open(self) -> Any:
        return self._receive()

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        try:
            self._process.pipe.send(requests)
        except OSError as error:
            raise WorkerDied(f"{self.name} {self._process.close()}") from error
        replies: list[Reply] = self._receive()
        return replies

    def _receive(self) -> Any:
        try:
            message = self._process.receive()
        except (EOFError, OSError) as error:
            raise WorkerDied(f"{self.name} {self._process.close()}") from error
        return unpack(message, self.name)

    def stop(self, force: bool) -> None:
        self._process.stop(force)

    def close(self) -> None:
        self._process.stop(force=False)
        self._process.close()


def _serve(pipe: Connection, opener: Callable[[], Any], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    host = Host(opener)
    try:
        pipe.send(host.open())
        while True:
            pipe.send(host.answer(pipe.recv()))
    except (EOFError, BrokenPipeError):
        return  # the driver is gone
    finally:
        host.close()


def environments(workers: int, device: str) -> list[dict[str, str]]:
    """What each of ``workers`` processes sees: an even part of the GPUs and of the processor's cores."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // workers))
    gpus = _gpus() if device in ("auto", "cuda") else []
    each = max(1, len(gpus) // workers)
    return [
        {"OMP_NUM_THREADS": threads}
        | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus[(n * each + i) % len(gpus)] for i in range(each))} if gpus else {})
        for n in range(workers)
    ]


def _cores() -> int:
    """Those that this process may use; containers and schedulers give fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
