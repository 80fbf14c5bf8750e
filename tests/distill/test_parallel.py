"""Two processes (torchrun's way, gloo on the CPU) see the losses that one sees, and end with the same weights."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.parallel import Processes
from tests.distill.runs import lines, run, tiny_recipe, weights, write_data

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import sys
from pathlib import Path
from distill.parallel import processes
from distill.train import Stop, Stopped
from tests.distill.runs import run, tiny_recipe
import torch
torch.set_num_threads(1)
out, what = Path(sys.argv[1]), sys.argv[2]
seen = 0

class SecondsTimeIsUp(Stop):
    def why(self):
        global seen
        seen += 1
        return ("the time given is used up", 0) if what == "stop" and several.rank == 1 and seen == 5 else None

def report(row):
    assert what != "raise" or several.first or row.get("step") != 2, "the second process fails alone"

guard = {"tasks": ["arithmetic"], "items": 2, "every": 150} if what != "plain" else {}
with processes("cpu") as several:
    try:
        run(tiny_recipe(lr=1e-4, guard=guard), out, processes=several, stop=SecondsTimeIsUp(), resume=what == "resume",
            report=report, save_seconds=0.0 if several.rank == 1 else 300.0)
    except Stopped as stopped:
        sys.exit(10 + stopped.exit_code)
"""


def two(folder: Path, out: Path, what: str) -> list[tuple[int, str]]:
    """(exit code, errors) of each of two processes; a deadlock is a timeout."""
    script = folder / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(out), what],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in started]
        return [(process.returncode, text[-2000:]) for process, text in zip(started, errors, strict=True)]
    finally:
        for process in started:
            process.kill()


def test_two_processes_have_the_losses_and_weights_of_one(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    done = two(tmp_path, tmp_path / "two", "plain")
    assert [code for code, _ in done] == [0, 0], done
    # AdamW's first steps follow the gradient's sign, so a rounding error moves a weight by up to the learning rate.
    one = run(tiny_recipe(lr=1e-4), tmp_path / "one")
    losses = [[line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    found, wanted = weights(tmp_path / "two" / "checkpoints" / one.name), weights(one)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # half a minute
def test_one_process_s_time_is_up_and_all_stop_save_and_go_on(tmp_path: Path) -> None:
    """Also: the guard and the saves are the first process's, whose clock is another one than the second's."""
    write_data(tmp_path / "data")
    done = two(tmp_path, tmp_path / "whole", "guard")
    assert [code for code, _ in done] == [0, 0], done
    done = two(tmp_path, tmp_path / "two", "stop")
    assert [code for code, _ in done] == [10, 10], done
    done = two(tmp_path, tmp_path / "two", "resume")
    assert [code for code, _ in done] == [0, 0], done
    found, wanted = (
        [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines(tmp_path / name)]
        for name in ("two", "whole")
    )
    assert found == wanted and sum("guard" in line for line in found) == 8


def test_a_process_that_fails_alone_does_not_leave_the_other_waiting(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    done = two(tmp_path, tmp_path / "two", "raise")
    assert all(code not in (0, 10) for code, _ in done), done
    assert "the second process fails alone" in done[1][1]


def test_rows_that_do_not_divide_are_refused() -> None:
    assert [Processes(rank, 2).share(4) for rank in range(2)] == [slice(0, 2), slice(2, 4)]
    with pytest.raises(ValueError, match="batch is 3 rows: expected a multiple of the 2 processes"):
        Processes(0, 2).share(3)
