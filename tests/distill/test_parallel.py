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
from tests.distill.runs import run, tiny_recipe
import torch
torch.set_num_threads(1)
with processes("cpu") as several:
    run(tiny_recipe(), Path(sys.argv[1]), processes=several)
"""


def two(script: Path, out: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(out)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-2000:]


def test_two_processes_have_the_losses_and_weights_of_one(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    two(script, tmp_path / "two")
    one = run(tiny_recipe(), tmp_path / "one")
    losses = [[line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    found, wanted = weights(tmp_path / "two" / "checkpoints" / one.name), weights(one)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_rows_that_do_not_divide_are_refused() -> None:
    assert [Processes(rank, 2).share(4) for rank in range(2)] == [slice(0, 2), slice(2, 4)]
    with pytest.raises(ValueError, match="batch is 3 rows: expected a multiple of the 2 processes"):
        Processes(0, 2).share(3)
