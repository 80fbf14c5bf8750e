"""`evalkit distill smoke`: all four stages on the real SmolLM2, whole and stopped by SIGTERM in every stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distill.runs import lines

STAGES = ["align-qk", "align-block", "distill", "instruct"]
COMMAND = (sys.executable, "-m", "evalkit", "distill", "smoke", "--device", "cpu", "--out")


def command(out: Path, *more: str) -> subprocess.Popen[str]:
    # Another number of threads adds in another order.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COMMAND, str(out), *more], env=env, stderr=subprocess.PIPE, text=True)


def steps_of(out: Path, stage: str) -> int:
    """Steps that metrics.jsonl tells of, its last line perhaps half written."""
    file = out / "metrics.jsonl"
    if not file.is_file():
        return 0
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]
    return sum(row["stage"] == stage and "loss" in row for row in rows)


def last(out: Path) -> Path:
    return max((out / "checkpoints").iterdir(), key=lambda one: int(one.name.rpartition("-")[2]))


@pytest.mark.slow
def test_smoke_lowers_every_loss_and_a_run_stopped_in_every_stage_ends_the_same(smollm2: str, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    running = command(whole)
    errors = running.communicate(timeout=1200)[1]
    assert running.returncode == 0, errors
    ends = [line for line in lines(whole) if line.get("end")]
    assert [line["stage"] for line in ends] == STAGES
    for line in ends:
        assert line["probe"]["after"] < line["probe"]["before"], line
    for stage in STAGES:
        running = command(stopped, *(["--resume"] if stopped.exists() else []))
        # instruct has two steps: a signal after the first one's line would come too late to stop the second.
        done = 0 if stage == "instruct" else 1
        while steps_of(stopped, stage) < done or (done == 0 and not last_is(stopped, "distill")):
            assert running.poll() is None, running.stderr and running.stderr.read()
            time.sleep(0.02)
        running.send_signal(signal.SIGTERM)
        errors = running.communicate(timeout=600)[1]
        assert running.returncode == 143 and "all is saved, and the same command with --resume goes on" in errors, (
            errors
        )
        state = torch.load(stopped / "state" / "state.pt", weights_only=True, mmap=True)
        assert state["position"]["stage"] == STAGES.index(stage) and state["position"]["step"] > 0
    running = command(stopped, "--resume")
    errors = running.communicate(timeout=1200)[1]
    assert running.returncode == 0, errors
    assert last(stopped).name == last(whole).name
    found, wanted = (load_file(last(out) / "model.safetensors") for out in (stopped, whole))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    told = [[(row["step"], row["loss"]) for row in lines(out) if "loss" in row] for out in (stopped, whole)]
    assert told[0] == told[1]


def last_is(out: Path, stage: str) -> bool:
    """Whether ``stage`` has its checkpoint."""
    return any(one.name.startswith(f"{stage}-") for one in (out / "checkpoints").glob("*"))
