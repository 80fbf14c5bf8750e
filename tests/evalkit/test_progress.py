"""Progress as people and as scripts read it."""

import json
from typing import Any

import pytest

from evalkit import progress
from evalkit.progress import bars


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_lines_say_rates_and_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = [100, 0]
    with bars("json", "m", mode="LL+GEN", figures=lambda: (tokens[0], tokens[1])) as report:
        report("quick", 10, 50)  # 10 were there already
        clock.now, tokens[:] = 4.0, [500, 1000]
        report("quick", 20, 50)
    first, second = lines(capsys)
    assert first["done"] == 10 and first["eta_s"] is None
    assert second == {
        "event": "progress", "model": "m", "task": "quick", "mode": "LL+GEN", "done": 20, "total": 50, "seconds": 4.0,
        "items_per_s": 2.5, "tokens_per_s": 100.0, "tokens_cached": 1000, "eta_s": 12.0,
    }  # fmt: skip


def test_json_lines_come_once_a_second_and_at_a_tasks_ends(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with bars("json", "m") as report:
        for done in range(101):
            clock.now = done / 40
            report("a", done, 100)
        report("b", 0, 3)
    found = [(line["task"], line["done"]) for line in lines(capsys)]
    assert found == [("a", 0), ("a", 40), ("a", 80), ("a", 100), ("b", 0)]


def test_a_line_has_task_mode_rates_and_cache_hits(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = [0, 0]
    with bars(True, "m", mode="LL", figures=lambda: (tokens[0], tokens[1])) as report:
        report("quick", 0, 4)
        tokens[:] = [100, 300]
        report("quick", 4, 4)
    shown = capsys.readouterr().err
    for words in ("m · quick · LL", "4/4", "items/s", "tokens/s", "75% cached"):
        assert words in shown


def test_nothing_is_shown_where_nothing_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    with bars(False, "m") as report:
        report("quick", 1, 2)
    with bars(lambda *what: seen.append(what), "m") as report:
        report("quick", 1, 2)
    assert (capsys.readouterr().err, seen) == ("", [("quick", 1, 2)])
