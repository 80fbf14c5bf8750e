"""The pool: every request is answered once, whatever happens to the workers."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalkit.engines.pool import ATTEMPTS, Host, Pool, shares
from tests.evalkit.workers import FakeWorker, dying, expected, opened, request

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


@pytest.mark.parametrize("seed", range(20))
def test_workers_that_die_at_random_lose_and_repeat_nothing(seed: int) -> None:
    born: list[FakeWorker] = []
    lock = threading.Lock()

    def make(number: int) -> FakeWorker:
        with lock:
            made = FakeWorker(f"worker {number}", Host(opened), dying(1000 * seed + len(born), 0.1))
            born.append(made)
        return made

    made = pool(1 + seed % 4, make)
    try:
        for _ in range(2):
            try:
                found = answers(made)
            except ValueError as error:  # three in a row over one chunk: told, not hung
                assert "died over the same" in str(error) or "no worker is left" in str(error)
                break
            assert found == {i: expected(one) for i, one in enumerate(REQUESTS)}
    finally:
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
