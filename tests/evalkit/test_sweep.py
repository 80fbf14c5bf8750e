"""`evalkit sweep`: many checkpoints from one file."""

import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import evalkit as ek
from evalkit import sweep
from evalkit.commands import app
from evalkit.sweep import Job, finished, read_sweep, run_sweep
from tests.evalkit.test_workers import assert_same_records
from tests.evalkit.workers import play


def written(folder: Path, **content: Any) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(json.dumps({"models": ["some/model"], "tasks": ["quick"], "out": str(folder / "out"), **content}))
    return file


@pytest.fixture
def checkpoints(tiny_folder: Path, other_folder: Path, tmp_path: Path) -> Path:
    """step-2, step-10, and a folder that is none."""
    shutil.copytree(tiny_folder, tmp_path / "step-10")
    shutil.copytree(other_folder, tmp_path / "step-2")
    (tmp_path / "step-logs").mkdir()
    return tmp_path


def test_patterns_become_checkpoints_in_the_order_of_their_numbers(checkpoints: Path) -> None:
    jobs = read_sweep(written(checkpoints, models=[f"{checkpoints}/step-*", "org/model"], options={"limit": 3}), {})
    assert [job.name for job in jobs] == ["step-2", "step-10", "model"]
    assert [job.out.name for job in jobs] == ["step-2", "step-10", "model"]
    assert jobs[0].model == f"{checkpoints}/step-2" and jobs[0].options == {"limit": 3}


def test_models_that_share_their_last_part_are_named_by_their_whole_path(tmp_path: Path) -> None:
    jobs = read_sweep(written(tmp_path, models=["a/step-1", "b/step-1", {"model": "c", "name": "third"}]), {})
    assert [job.name for job in jobs] == ["a-step-1", "b-step-1", "third"]


def test_options_of_a_model_and_of_the_command_line_come_before_those_of_the_file(tmp_path: Path) -> None:
    models = ["a", {"model": "b", "options": {"dtype": "float32", "batch-size": 2}}]
    file = written(tmp_path, models=models, options={"dtype": "bfloat16", "workers": 2})
    one, two = read_sweep(file, {"workers": 4, "out": tmp_path / "other", "ray": None})
    assert one.options == {"dtype": "bfloat16", "workers": 4} and one.out == tmp_path / "other" / "a"
    assert two.options == {"dtype": "float32", "batch_size": 2, "workers": 4}


def test_on_and_off_are_words(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("models: [m]\ntasks: [quick]\nout: o\noptions: {thinking: on, chat: true}\n")
    assert read_sweep(file, {})[0].options == {"thinking": "on", "chat": True}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"models": []}, "models is []"),
        ({"models": [{"name": "x"}]}, "models.0.model is missing"),
        ({"models": [{"model": "m", "colour": "red"}]}, "unknown key models.0.colour"),
        ({"models": ["nothing/here-*"]}, "models.0: no model folder or GGUF file matches 'nothing/here-*'"),
        ({"models": ["m", "m"]}, "models: 'm' can't be the name of one run folder"),
        ({"models": [{"model": "m", "options": {"limit": 0}}]}, "models.0.options: setting 'limit' is 0"),
        ({"tasks": "quick"}, "tasks is 'quick'"),
        ({"tasks": ["quik"]}, "tasks: unknown task 'quik': did you mean 'quick'?"),
        ({"options": {"limt": 3}}, "options: unknown option 'limt': did you mean 'limit'?"),
        ({"options": {"out": "x"}}, "options: unknown option 'out'"),
        ({"options": {"mode": "all"}}, "options: unknown mode 'all'"),
        ({"options": {"batch_size": "many"}}, "options: batch_size is 'many'"),
        ({"options": {"workers": 2, "ray": "auto"}}, "options: --workers are processes"),
        ({"models": [{"model": "m", "options": {"ray": "auto"}}]}, "models.0.options: ray is the whole sweep's"),
        ({"model": "m"}, "unknown key model"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_field(content: dict[str, Any], told: str, tmp_path: Path) -> None:
    file = written(tmp_path, **content)
    with pytest.raises(ValueError) as error:
        read_sweep(file, {})
    assert str(error.value).startswith(f"{file}: ") and told in str(error.value)


def scored(job: Job) -> None:
    """As in the job's process."""
    mine, theirs = multiprocessing.Pipe()
    sweep._score(theirs, job, job.options)
    while (told := mine.recv())[0] == "progress":
        pass
    assert told[0] == "done"


def test_a_finished_run_is_known_by_all_that_was_asked_and_time(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints / "step-2"
    job = Job(name="s", model=str(folder), tasks=("quick",), out=checkpoints / "out", options={"limit": 3})
    assert finished(job) is None, "there is no run"
    scored(job)
    assert finished(job) is not None
    assert finished(replace(job, options={"limit": 3, "workers": 2, "normalisation": None})) is not None, "the same"
    others: list[dict[str, Any]] = [{"limit": 4}, {"mode": "generation"}, {"dtype": "float32"}, {"revision": "main"}]
    others += [{"engine": "openai"}, {"base_url": "http://h/v1"}, {"engine_options": {"dequantise": True}}]
    others += [{"device": "cpu"}, {"data_dir": str(checkpoints)}, {"trust_remote_code": True}]
    assert all(finished(replace(job, options={"limit": 3, **other})) is None for other in others)
    assert finished(replace(job, model=str(checkpoints / "step-10"))) is None
    assert finished(replace(job, tasks=("recall",))) is None
    monkeypatch.setattr(sweep, "__version__", "0.0")
    assert finished(job) is None, "scored by another evalkit"
    monkeypatch.undo()
    assert finished(job) is not None
    os.utime(folder / "config.json", (1e9, 1e9))  # as by a copy that keeps times
    assert finished(job) is None, "the checkpoint was written anew"


def test_a_damaged_run_is_scored_again(checkpoints: Path) -> None:
    file = written(checkpoints, models=[f"{checkpoints}/step-2"], options={"limit": 3})
    [job] = read_sweep(file, {})
    scored(job)
    outcomes = job.out / "outcomes.jsonl"
    whole = outcomes.read_bytes()
    outcomes.write_bytes(whole.replace(b"{", b"#", 1))
    listed = CliRunner().invoke(app, ["sweep", str(file), "--dry-run", "--json"])
    assert [run["finished"] for run in json.loads(listed.stdout)["runs"]] == [False]
    scored(job)
    assert finished(job) is not None and len(outcomes.read_bytes().splitlines()) == 3


def test_any_error_of_a_job_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a long story\n\nits end")

    monkeypatch.setattr("evalkit.api.run", fails)
    mine, theirs = multiprocessing.Pipe()
    [job] = read_sweep(written(tmp_path), {})
    sweep._score(theirs, job, {})
    assert mine.recv() == ("failed", "RuntimeError: its end")


def test_a_job_whose_sweep_is_gone_ends_quietly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("evalkit.api.run", lambda *_, progress, **__: progress("quick", 1, 2))
    mine, theirs = multiprocessing.Pipe()
    mine.close()
    [job] = read_sweep(written(tmp_path), {})
    with pytest.raises(SystemExit):
        sweep._score(theirs, job, {})


def test_patterns_see_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "m-q8.gguf").touch()
    (tmp_path / "m-q4").mkdir()
    (tmp_path / "m-q4" / "model.gguf").touch()
    jobs = read_sweep(written(tmp_path, models=[f"{tmp_path}/m-*"]), {})
    assert [job.name for job in jobs] == ["m-q4", "m-q8.gguf"]


@pytest.mark.slow
def test_a_checkpoint_that_fails_stops_no_other_and_the_rest_is_as_scored_alone(checkpoints: Path) -> None:
    broken = checkpoints / "step-5"
    shutil.copytree(checkpoints / "step-2", broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    file = written(checkpoints, models=[f"{checkpoints}/step-*"], options={"limit": 4, "device": "cpu"})
    done = CliRunner().invoke(app, ["sweep", str(file), "--json"])
    assert done.exit_code == 1, done.output
    told = json.loads(done.stdout)
    states = [(run["name"], run["status"]) for run in told["runs"]]
    assert states == [("step-2", "done"), ("step-5", "failed"), ("step-10", "done")]
    assert "could not be loaded" in told["runs"][1]["why"]
    out = checkpoints / "out"
    assert told["next"] == [f"evalkit rank {out}/step-2 {out}/step-10", f"evalkit sweep {file}"]
    alone = ek.run(checkpoints / "step-10", ["quick"], limit=4, device="cpu")
    assert_same_records(alone, ek.load_run(out / "step-10"))


def test_each_job_is_a_process_whose_end_is_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sweep, "_score", play)
    told: list[str] = []
    seen: list[tuple[str, int, int]] = []
    results = run_sweep(_jobs(tmp_path), lambda *step: seen.append(step), lambda one: told.append(one.job.name))
    assert told == ["good", "refused", "killed", "raised", "last"], "one after the other"
    assert [one.status for one in results] == ["done", "failed", "failed", "failed", "done"]
    assert results[1].why == "there is no such model"
    assert results[2].why.startswith("its process was killed by SIGKILL; run the sweep again")
    assert results[3].why.startswith("its process ended with exit code 1")
    assert ("good · quick", 1, 2) in seen and results[4].summary == {"tasks": []}
    assert not multiprocessing.active_children()


def test_an_interrupted_sweep_ends_its_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sweep, "_score", play)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(_jobs(tmp_path), interrupt, lambda _: None)
    assert not multiprocessing.active_children()


def _jobs(out: Path) -> list[Job]:
    names = ("good", "refused", "killed", "raised", "last")
    return [Job(name=name, model=name, tasks=("quick",), out=out / name, options={}) for name in names]


def test_a_dry_run_scores_nothing(tmp_path: Path) -> None:
    file = written(tmp_path, models=["a", "b"])
    done = CliRunner().invoke(app, ["sweep", str(file), "--dry-run", "--json"])
    assert [run["name"] for run in json.loads(done.stdout)["runs"]] == ["a", "b"] and done.exit_code == 0
    assert not (tmp_path / "out").exists()


def test_on_a_cluster_checkpoints_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from evalkit.engines import ray

    monkeypatch.setattr(ray, "connect", lambda address: lambda: None)
    monkeypatch.setattr(ray, "room", lambda resources: (resources, 8))

    def jobs(n: int, **options: Any) -> list[Job]:
        return [Job(name=str(i), model="m", tasks=("quick",), out=Path(), options=options) for i in range(n)]

    assert sweep._share(jobs(3)) == (1, {}), "without a cluster one after the other"
    assert sweep._share(jobs(3, ray="auto")) == (4, {"ray_actors": 2})
    assert sweep._share(jobs(20, ray="auto")) == (8, {"ray_actors": 1})
    assert sweep._share(jobs(20, ray="auto", ray_actors=4)) == (2, {"ray_actors": 4})
    assert sweep._share([]) == (1, {})
