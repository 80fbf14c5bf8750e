"""Workers as processes of this machine."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import evalkit as ek
from evalkit.engines.local import LocalWorker, environments
from evalkit.engines.pool import Pool
from evalkit.opening import Spec, Spread, open_spread
from tests.conftest import ROOT
from tests.evalkit.workers import expected, forking, kill_amid, open_together, opened, request
from tests.oracles import assert_same_records


@pytest.mark.slow
def test_a_killed_worker_of_a_run_loses_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed: list[int] = []

    def kill(worker: LocalWorker) -> None:
        killed.append(worker._process.process.pid or 0)
        os.kill(killed[0], signal.SIGKILL)

    open_together(LocalWorker, monkeypatch)
    kill_amid(LocalWorker, kill, monkeypatch)
    how: dict[str, Any] = {"tasks": ["quick"], "limit": 100, "device": "cpu", "batch_size": 8}
    run = ek.run(tiny_folder, **how, workers=2, out=tmp_path)
    assert f"(process {killed[0]}) was killed by SIGKILL; another one takes its place" in caplog.text
    assert_same_records(ek.run(tiny_folder, **how), run)
    assert not multiprocessing.active_children()
    session = run.manifest.sessions[0]
    assert (session["engine"], session["workers"]) == ("hf", 2)
    assert len((tmp_path / "outcomes.jsonl").read_text().splitlines()) == 100


def test_a_model_that_is_not_there_is_told_in_one_line_by_the_worker(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^worker \d \(process \d+\): there is no model folder {tmp_path}/none$"):
        ek.run(f"{tmp_path}/none", tasks=["quick"], workers=1)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"workers": 2, "ray": "auto"}, "give one of them"),
        ({"ray_actors": 2}, "need --ray"),
        ({"workers": 0}, "--workers is 0"),
        ({"workers": 2, "device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_contradictions_are_told_before_anything_starts(options: dict[str, Any], told: str, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=told):
        ek.run(tiny_folder, tasks=["quick"], **options)


def test_workers_take_no_live_model() -> None:
    with pytest.raises(ValueError, match="give its name or folder, not a object"):
        ek.run(object(), tasks=["quick"], workers=2)


@pytest.mark.parametrize(
    ("gpus", "workers", "seen"),
    [
        ("4,5,6,7", 4, ["4", "5", "6", "7"]),
        ("4,5,6,7", 2, ["4,5", "6,7"]),
        ("0,1", 4, ["0", "1", "0", "1"]),
        ("", 2, [None, None]),
    ],
)
def test_gpus_are_dealt_out_evenly(
    gpus: str, workers: int, seen: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert [one.get("CUDA_VISIBLE_DEVICES") for one in environments(workers, "auto")] == seen
    assert not any("CUDA_VISIBLE_DEVICES" in one for one in environments(workers, "cpu"))


def test_a_worker_killed_while_it_answers_and_one_killed_while_idle(caplog: pytest.LogCaptureFixture) -> None:
    made = Pool(lambda number: LocalWorker(number, partial(opened, seconds=0.05), {}), 2)
    try:
        requests = [request(n) for n in range(40)]
        for moment in (0, 20):
            answers = made.answer(requests)
            found = dict(next(answers) for _ in range(moment))
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
            found.update(answers)
            assert found == {i: expected(one) for i, one in enumerate(requests)}
        assert caplog.text.count("was killed by SIGKILL") == 2
    finally:
        made.close()
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_missed_though_its_child_holds_the_pipe(caplog: pytest.LogCaptureFixture) -> None:
    made = Pool(lambda number: LocalWorker(number, forking, {}), 1)
    try:
        requests = [request(n) for n in range(8)]
        answers = made.answer(requests)
        found = dict(next(answers) for _ in range(2))
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        found.update(answers)
        assert found == {i: expected(one) for i, one in enumerate(requests)}
        assert caplog.text.count("was killed by SIGKILL") == 1
    finally:
        made.close()
    assert not multiprocessing.active_children()


def test_a_built_in_name_is_no_folder_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Spec] = []
    monkeypatch.setattr("evalkit.engines.local.LocalWorker", lambda number, opener, _: seen.append(opener.args[0]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "mine").mkdir()
    for name in ("smollm2-135m", "mine"):
        with pytest.raises(AttributeError):  # it is no worker
            open_spread(Spec(model=name, device="cpu"), Spread(workers=1))
    assert [one.model for one in seen] == ["smollm2-135m", str(tmp_path / "mine")]


def test_threads_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert [one["OMP_NUM_THREADS"] for one in environments(2, "cpu")] == ["3", "3"]


BUSY = """
import signal, sys, time
from functools import partial
from evalkit.engines.local import LocalWorker
from evalkit.engines.pool import Pool
from tests.evalkit.workers import opened, request

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts the tests may have switched it off
    made = Pool(lambda number: LocalWorker(number, partial(opened, seconds=0.2), {}), 2)
    try:
        for at, _ in enumerate(made.answer([request(n) for n in range(1000)])):
            if at == 8:
                print(*(worker._process.process.pid for worker in made._workers.values()), flush=True)
    finally:
        made.close()
"""


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_driver(by: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert driver.stdout is not None
    workers = [int(pid) for pid in driver.stdout.readline().split()]
    assert len(workers) == 2
    # Ctrl-C goes to the whole group; kill -9 to the driver alone.
    os.killpg(driver.pid, by) if by is signal.SIGINT else driver.kill()
    _, told = driver.communicate(timeout=60)
    assert by is signal.SIGKILL or told.strip().endswith("KeyboardInterrupt"), "and nothing of the workers"
    for pid in workers:
        _wait_for_end(pid)


def _wait_for_end(pid: int) -> None:
    """A process that nobody waits for may stay as a zombie where pid 1 does not reap; it runs no more."""
    waited = threading.Event()
    for _ in range(600):
        stat = Path(f"/proc/{pid}/stat")
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        waited.wait(0.05)
    pytest.fail(f"process {pid} outlived its driver")
