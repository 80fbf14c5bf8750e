"""The pool: every request is answered once, whatever happens to the workers."""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalkit.engines.pool import ATTEMPTS, Host, Pool, WorkerDied, shares
from evalkit.records import Reply, Request
from tests.evalkit.workers import FakeWorker, expected, opened, request

REQUESTS = [request(n, length=1 + n * 7 % 11) for n in range(60)]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not FakeWorker.alive, "every worker was closed"
    assert set(threading.enumerate()) <= before, "no thread stays behind"


def pool(size: int, make: Callable[[int], FakeWorker]) -> Pool:
    return Pool(make, size)


def simple(number: int, **how: Any) -> FakeWorker:
    return FakeWorker(f"worker {number}", Host(lambda: opened(**how)))


def answers(made: Pool) -> dict[int, Any]:
    given = list(made.answer(REQUESTS))
    assert sorted(index for index, _ in given) == list(range(len(REQUESTS))), "each once"
    return dict(given)


class Mortal(FakeWorker):
    """Dies at random, but neither ATTEMPTS times over one chunk nor so often in a row in one place."""

    chance = random.Random()
    chunks: Counter[Any] = Counter()
    places: Counter[str] = Counter()

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        chunk = requests[0] if requests else None
        for _ in range(2):  # before the work, or when it is done and the reply is lost
            spared = max(self.chunks[chunk] if chunk else 0, self.places[self.name]) >= ATTEMPTS - 1
            if not spared and self.chance.random() < 0.2:
                self.chunks[chunk] += 1
                self.places[self.name] += 1
                raise WorkerDied(f"{self.name} died")
        replies = super().answer(requests)
        if requests:
            self.places[self.name] = 0
        return replies


@pytest.mark.parametrize("seed", range(20))
def test_workers_that_die_at_random_lose_and_repeat_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mortal, "chance", random.Random(seed))
    monkeypatch.setattr(Mortal, "places", Counter())
    made = pool(1 + seed % 4, lambda number: Mortal(f"worker {number}", Host(opened)))
    try:
        for _ in range(2):
            monkeypatch.setattr(Mortal, "chunks", Counter())
            assert answers(made) == {i: expected(one) for i, one in enumerate(REQUESTS)}
    finally:
        made.close()


def test_deaths_of_idle_workers_are_no_chunks_fault() -> None:
    born: list[FakeWorker] = []
    dead: list[FakeWorker] = []
    together = threading.Barrier(ATTEMPTS)
    lost, all_dead = threading.Event(), threading.Event()

    class OnOneNode(FakeWorker):
        def open(self) -> Any:
            together.wait(10)
            return super().open()

        def answer(self, requests: Sequence[Request]) -> list[Reply]:
            if not lost.is_set():
                return super().answer(requests)
            dead.append(self)
            if len(dead) == ATTEMPTS:
                all_dead.set()
            raise WorkerDied(f"{self.name} died")

    def make(number: int) -> FakeWorker:
        if len(born) >= ATTEMPTS:
            all_dead.wait(10)
            return simple(number)
        born.append(OnOneNode(f"worker {number}", Host(opened)))
        return born[-1]

    made = pool(ATTEMPTS, make)
    try:
        answers(made)
        lost.set()  # between two calls
        one = REQUESTS[:1]  # a single chunk, which passes from one dead worker to the next
        assert dict(made.answer(one)) == {0: expected(one[0])}
        assert len(dead) == ATTEMPTS
    finally:
        made.close()


def test_memory_is_named_only_where_a_worker_was_killed() -> None:
    for said, named in (("died of a bug", False), ("was killed by SIGKILL", True), ("CUDA out of memory", True)):

        class Dying(FakeWorker):
            said = ""

            def answer(self, requests: Sequence[Request]) -> list[Reply]:
                raise WorkerDied(f"{self.name} {self.said}")

        made = pool(2, lambda number, kind=Dying: kind(f"worker {number}", Host(opened)))  # type: ignore[misc]
        Dying.said = said
        with pytest.raises(ValueError, match="died over the same") as told:
            answers(made)
        made.close()
        assert ("--batch-size" in str(told.value)) == named


def test_workers_with_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    versions = iter(["2.13.0", "5.17.0", "2.14.0", "5.17.0"])
    lock = threading.Lock()

    def version(_: str) -> str:
        with lock:
            return next(versions)

    class InTurn(FakeWorker):
        def open(self) -> Any:
            if self.name == "worker 1":
                first.wait(10)
            found = super().open()
            first.set()
            return found

    first = threading.Event()
    monkeypatch.setattr(importlib.metadata, "version", version)
    made = pool(2, lambda number: InTurn(f"worker {number}", Host(lambda: opened(seconds=0.05))))
    with pytest.raises(ValueError, match=r"worker \d computes with other versions .*torch 2.1\d.0, others 2.1\d.0"):
        answers(made)
    made.close()


@given(st.lists(st.integers(1, 500), min_size=1, max_size=300), st.integers(1, 9), st.integers(1, 64))
def test_shares_are_whole_batches_that_cover_all_in_order_and_end_small(
    costs: list[int], workers: int, batch: int
) -> None:
    costs = sorted(costs, reverse=True)
    parts = list(shares(costs, workers, batch))
    assert [at for part in parts for at in range(part.start, part.stop)] == list(range(len(costs)))
    unit = max(1, min(batch, -(-len(costs) // workers)))
    assert all(part.start % unit == 0 for part in parts)
    assert len(parts) >= min(workers, -(-len(costs) // unit)), "nobody idles while there is a batch for each"
    for part in parts:
        left = sum(costs[part.start :])
        assert part.stop - part.start <= unit or sum(costs[part]) <= left / (2 * workers)


def test_a_refused_request_is_told_at_once_with_the_worker_and_not_tried_again() -> None:
    born: list[FakeWorker] = []

    def make(number: int) -> FakeWorker:
        born.append(simple(number, refused=7))
        return born[-1]

    made = pool(1, make)
    with pytest.raises(ValueError, match="^worker 0: request 7 can't be answered$"):
        answers(made)
    made.close()
    asked = [one.prompt[0] for chunk in born[0].asked for one in chunk]
    assert len(born) == 1 and asked.count(7) == 1


def test_a_chunk_that_kills_every_worker_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    born: list[int] = []

    def make(number: int) -> FakeWorker:
        born.append(number)
        return FakeWorker(f"worker {number}", Host(opened), lambda: True)

    made = pool(2, make)
    with pytest.raises(ValueError, match=r"3 workers died over the same \d+ requests, the last: worker \d died"):
        answers(made)
    made.close()
    assert len(born) <= 2 * ATTEMPTS


def test_an_unknown_error_of_an_engine_is_tried_on_another_worker_and_then_named() -> None:
    class Broken(FakeWorker):
        def answer(self, requests: Any) -> Any:
            return self._unpacked(Host(lambda: 1 / 0).open())

    made = pool(1, lambda number: Broken(f"worker {number}", Host(opened)))
    with pytest.raises(ValueError, match="worker 0 failed with ZeroDivisionError: division by zero"):
        answers(made)
    made.close()


def test_workers_that_never_open_end_in_an_error() -> None:
    with pytest.raises(ValueError, match="no worker is left, the last: worker . died while it loaded"):
        pool(2, lambda number: FakeWorker(f"worker {number}", Host(opened), unfit=True))


def test_one_good_place_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    made = pool(3, lambda number: FakeWorker(f"worker {number}", Host(opened), unfit=number > 0))
    assert answers(made) == {i: expected(one) for i, one in enumerate(REQUESTS)}
    made.close()


def test_workers_with_another_model_are_refused() -> None:
    # Slow, so that the second worker is there before the first has done everything.
    made = pool(2, lambda number: simple(number, fingerprint=f"model {number}", seconds=0.05))
    with pytest.raises(ValueError, match="loaded another model than the other workers .fingerprint 'model .', others"):
        answers(made)
    made.close()


def test_what_is_left_of_an_abandoned_call_is_not_answered_in_the_next() -> None:
    made = pool(2, lambda number: simple(number, seconds=0.01))
    begun = made.answer(REQUESTS)
    next(begun)
    begun.close()  # type: ignore[attr-defined]
    later = [request(900 + n) for n in range(9)]
    assert dict(made.answer(later)) == {i: expected(one) for i, one in enumerate(later)}
    made.close()


def test_close_in_the_middle_of_work_waits_for_nobody() -> None:
    made = pool(2, lambda number: simple(number, seconds=0.02))
    begun = made.answer(REQUESTS)
    next(begun)
    made.close()


def test_an_engine_closes_what_it_opened_in_its_worker() -> None:
    closed: list[str] = []
    host = Host(lambda: opened(close=lambda: closed.append("closed")))
    kind, facts = host.open()
    assert kind == "done" and facts.engine.max_length == 100
    facts.close()
    assert closed == []
    host.close()
    assert closed == ["closed"]
