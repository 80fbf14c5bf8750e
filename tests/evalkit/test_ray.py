"""Workers as actors of a real Ray cluster: two nodes on this machine."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

import evalkit as ek
from evalkit.engines.pool import Pool
from evalkit.engines.ray import RayWorker, connect, read_resources, room
from tests.conftest import ROOT
from tests.evalkit.workers import expected, kill_amid, open_together, opened, request
from tests.oracles import assert_same_records


@pytest.fixture(scope="module")
def cluster(ray_package: None) -> Iterator[Any]:
    """A head and a second node, one processor each."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # of the nodes' workers: as if installed there
        made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        made.second = made.add_node(**node)
        made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def test_resources_are_read() -> None:
    assert read_resources("num_gpus=1,num_cpus=2.5,big=1") == {"num_gpus": 1, "num_cpus": 2.5, "big": 1}
    assert read_resources("") == {}
    for wrong in ("num_gpus", "num_gpus=one", "=1", "num_cpus=-1", "num_cpus=nan", "num_cpus=inf"):
        with pytest.raises(ValueError, match="is not NAME=AMOUNT"):
            read_resources(wrong)
    with pytest.raises(ValueError, match="'GPU=1' is called num_gpus=1 here"):
        read_resources("GPU=1")


def test_a_worker_without_room_says_so_once_a_minute_and_ends_when_no_node_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [[{"Alive": True, "Resources": {"CPU": 1.0}}]] * 12 + [[{"Alive": False, "Resources": {"CPU": 1.0}}]]
    fake: Any = ModuleType("ray")
    fake.wait = lambda references, timeout: ([], references)
    fake.nodes = lambda: nodes.pop(0)
    monkeypatch.setitem(sys.modules, "ray", fake)
    worker = object.__new__(RayWorker)
    worker.name, worker._resources, worker._actor = "worker 3", {"num_cpus": 1.0}, MagicMock()
    with pytest.raises(ValueError, match="no node of the Ray cluster has num_cpus=1"):
        worker.open()
    assert caplog.messages == [f"worker 3 has waited {s} s for room on the Ray cluster" for s in (60, 120)]


def test_an_address_without_a_cluster_is_told(ray_package: None, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no Ray cluster at '127.0.0.1:1' .*refused.*ray start --head"):
        ek.run(tiny_folder, tasks=["quick"], ray="127.0.0.1:1")
    assert sys.stdout is not sys.stderr


def test_the_room_of_the_cluster_is_counted(cluster: Any) -> None:
    leave = connect(cluster.address)
    try:
        assert room({}) == ({"num_cpus": 1.0}, 2), "one a node"
        assert room({"num_cpus": 0.1}) == ({"num_cpus": 0.1}, 20)
        with pytest.raises(ValueError, match=r"no node of the Ray cluster has num_gpus=1: there are \{.*CPU 1"):
            room({"num_gpus": 1})
    finally:
        leave()


def test_standard_output_stays_the_commands_own(cluster: Any) -> None:
    before = sys.stdout
    leave = connect(cluster.address)
    assert sys.stdout is sys.stderr
    leave()
    assert sys.stdout is before


def test_another_version_on_a_node_is_told_with_the_node(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ek, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"^worker \d on node [\d.]+: evalkit is .* there and 9.9 here; install"):
        ek.run("any", tasks=["quick"], ray=cluster.address)


def test_a_folder_that_a_node_lacks_is_told_with_the_node(cluster: Any, tmp_path: Path) -> None:
    told = (
        rf"^worker \d on node [\d.]+: there is no model folder {tmp_path}/none \(with --ray, models and packages must"
    )
    with pytest.raises(ValueError, match=told):
        ek.run(f"{tmp_path}/none", tasks=["quick"], ray=cluster.address, ray_actors=1)


def test_more_actors_than_the_cluster_has_room_for_wait_without_harm(cluster: Any) -> None:
    leave = connect(cluster.address)
    try:
        made = Pool(lambda number: RayWorker(number, partial(opened, close=print), {"num_cpus": 1}), 4)
        requests = [request(n) for n in range(50)]
        assert dict(made.answer(requests)) == {i: expected(one) for i, one in enumerate(requests)}
        made.close()
    finally:
        leave()


@pytest.mark.slow
def test_a_node_killed_in_the_middle_of_a_run_loses_nothing(
    cluster: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed: list[Any] = []

    def kill_node(worker: RayWorker) -> None:
        killed.append(cluster.second)
        raylet = cluster.second.all_processes["raylet"][0].process.pid
        its = [pid for file in Path(f"/proc/{raylet}/task").glob("*/children") for pid in file.read_text().split()]
        assert its
        cluster.remove_node(cluster.second, allow_graceful=False)
        for pid in its:  # they would answer for a while without their node
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    open_together(RayWorker, monkeypatch)
    kill_amid(RayWorker, kill_node, monkeypatch)
    how: dict[str, Any] = {"tasks": ["quick"], "limit": 100, "device": "cpu", "batch_size": 8}
    run = ek.run(tiny_folder, **how, ray=cluster.address, out=tmp_path)
    assert killed and "was lost: " in caplog.text and "another one takes its place" in caplog.text
    assert_same_records(ek.run(tiny_folder, **how), run)
    assert len((tmp_path / "outcomes.jsonl").read_text().splitlines()) == 100
    assert run.manifest.sessions[0]["ray"] == {"num_cpus": 1.0}
