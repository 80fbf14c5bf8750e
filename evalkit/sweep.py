"""Many checkpoints by many tasks: a YAML file -> a run folder for each checkpoint.

Each checkpoint is scored in a process of its own: its memory goes with it, and its crash is its own.
"""

import difflib
import glob
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from evalkit import api
from evalkit.engines.local import Process
from evalkit.naming import tasks_of
from evalkit.opening import Spec, Spread
from evalkit.progress import Progress
from evalkit.registry import Task
from evalkit.settings import Settings
from evalkit.store import MANIFEST, read_manifest, read_run
from evalkit.yaml12 import Loader

_OWN = {"model", "tasks", "tokenizer", "name", "out", "progress", "settings"}
"""Parameters of ``api.run`` that a sweep sets itself."""


class Entry(BaseModel):
    """One line of ``models``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """A name, a folder, or a pattern of folders (``checkpoints/step-*``)."""
    name: str = ""
    """Of its run folder. Empty: the model's last part, or its whole path where two share that."""
    options: dict[str, Any] = {}
    """Beside those of the sweep."""


def _entry(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class Sweep(BaseModel):
    """sweep.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: Annotated[list[Annotated[Entry, BeforeValidator(_entry)]], Field(min_length=1)]
    tasks: Annotated[list[str], Field(min_length=1)]
    out: Path
    options: dict[str, Any] = {}
    """As of ``evalkit run``, with the API's names: limit, mode, dtype, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One checkpoint to be scored."""

    name: str
    model: str
    tasks: tuple[str, ...]
    out: Path
    options: Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Result:
    """What became of a job."""

    job: Job
    status: Literal["done", "skipped", "failed"]
    why: str = ""
    """It failed."""
    summary: dict[str, Any] = field(default_factory=dict)
    """As of ``reports.summary.run_summary``."""


def read_sweep(path: Path, changes: Mapping[str, Any]) -> list[Job]:
    """The jobs of a YAML file; ``changes`` take the place of its options (or of ``out``).

    ValueError names the file, the field, and what was found there.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}: expected the keys models, tasks and out")
    if changes.get("out") is not None:
        content["out"] = changes["out"]
    try:
        sweep = Sweep.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {_told(error)}") from error
    given = {name: value for name, value in changes.items() if name != "out" and value is not None}
    jobs = []
    for at, entry in enumerate(sweep.models):
        options = {**_options(sweep.options, f"{path}: options"), **given}
        options |= _options(entry.options, f"{path}: models.{at}.options")
        _check(options, f"{path}: models.{at}.options" if entry.options else f"{path}: options")
        found = _models(entry.model, f"{path}: models.{at}")
        if entry.name and len(found) > 1:
            raise ValueError(f"{path}: models.{at}.name: {entry.model!r} is {len(found)} models, which can't share it")
        for model in found:
            job = Job(name=entry.name, model=model, tasks=tuple(sweep.tasks), out=sweep.out, options=options)
            jobs.append(job)
    try:
        _tasks(jobs[0])
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: tasks: {error}") from error
    return _named(jobs, path)


def _tasks(job: Job) -> list[Task]:
    settings, others = _settings(job.options)
    return [one for name in job.tasks for one in tasks_of(name, settings, others.get("include_path"))]


def finished(job: Job) -> dict[str, Any] | None:
    """The summary of a run that is finished: of the same model, asked the same, and made after the model folder's last
    change. None: there is something to do, or to look at more closely than by its name."""
    from reports.summary import run_summary

    if not (job.out / MANIFEST).exists():
        return None
    manifest = read_manifest(job.out)
    settings, _ = _settings(job.options)
    wanted = {(task.name, task.version) for task in _tasks(job)}
    there = {(entry.name, entry.version) for entry in manifest.tasks}
    same = manifest.model.name == job.model and manifest.settings == settings and wanted <= there
    if not same or not manifest.complete or _changed(job.model) > (job.out / MANIFEST).stat().st_mtime:
        return None
    return run_summary(read_run(job.out))


def _changed(model: str) -> float:
    """When a model's folder last changed (seconds since the epoch); 0: it is no folder here."""
    # A copy may keep the time of its content (mtime), but not that of its entry (ctime).
    return max((file.stat().st_ctime for file in Path(model).expanduser().glob("*")), default=0.0)


def run_sweep(jobs: Sequence[Job], report: Progress, told: Callable[[Result], None]) -> list[Result]:
    """Score what is not finished yet; ``told`` hears of each result as it comes. A failure stops nothing else."""
    results: dict[str, Result] = {}

    def end(result: Result) -> None:
        results[result.job.name] = result
        told(result)

    todo = []
    for job in jobs:
        try:
            summary = finished(job)
        except ValueError as error:
            end(Result(job=job, status="failed", why=str(error)))
            continue
        if summary is None:
            todo.append(job)
        else:
            end(Result(job=job, status="skipped", summary=summary))
    together, actors = _share(todo)
    running: dict[Connection, tuple[Job, Process]] = {}
    try:
        while todo or running:
            while todo and len(running) < together:
                job = todo.pop(0)
                process = Process(_score, job, {**job.options, **actors})
                running[process.pipe] = job, process
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                job, process = running[pipe]
                result = _heard(pipe, job, process, report)
                if result is not None:
                    del running[pipe]
                    process.close()
                    end(result)
    finally:
        for _, process in running.values():
            process.stop(force=False)
        for _, process in running.values():
            process.close()
    return [results[job.name] for job in jobs]


def _share(todo: Sequence[Job]) -> tuple[int, dict[str, int]]:
    """(checkpoints at a time, options that give each its actors): one a time, but on a Ray cluster as many as it has
    room for. Few checkpoints get several actors each."""
    options = todo[0].options if todo else {}
    if options.get("ray") is None:
        return 1, {}
    from evalkit.engines.ray import connect, read_resources, room

    leave = connect(options["ray"])
    try:
        _, fits = room(read_resources(options.get("ray_resources", "")))
    finally:
        leave()
    actors = options.get("ray_actors") or max(1, fits // len(todo))
    return max(1, fits // actors), {"ray_actors": actors}


def _score(pipe: Connection, job: Job, options: Mapping[str, Any]) -> None:
    """Runs in the job's process."""
    from evalkit.cli import _quiet
    from reports.summary import run_summary

    _quiet()

    def report(task: str, done: int, total: int) -> None:
        pipe.send(("progress", (task, done, total)))

    try:
        made = api.run(job.model, job.tasks, out=job.out, progress=report, **options)
        pipe.send(("done", run_summary(made)))
    except (ValueError, OSError, ImportError) as error:
        pipe.send(("failed", " ".join(str(error).split())))


def _heard(pipe: Connection, job: Job, process: Process, report: Progress) -> Result | None:
    try:
        kind, value = pipe.recv()
    except (EOFError, OSError):
        why = f"its process {process.close()}; run the sweep again, and it goes on where it stopped"
        return Result(job=job, status="failed", why=why)
    if kind == "progress":
        task, done, total = value
        report(f"{job.name} · {task}", done, total)
        return None
    if kind == "failed":
        return Result(job=job, status="failed", why=value)
    return Result(job=job, status="done", summary=value)


# --- reading the file ---


def _models(pattern: str, where: str) -> list[str]:
    """The model folders that a pattern stands for, in the order of the numbers in their names."""
    if not glob.has_magic(pattern):
        return [pattern]
    from models.load import DELTA_FILE

    found = glob.glob(str(Path(pattern).expanduser()), recursive=True)
    folders = [one for one in found if any((Path(one) / file).is_file() for file in ("config.json", DELTA_FILE))]
    if not folders:
        raise ValueError(f"{where}: no model folder matches {pattern!r} ({len(found)} matches without a config.json)")
    return sorted(folders, key=lambda one: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", one)])


def _named(jobs: Sequence[Job], path: Path) -> list[Job]:
    """Each with a run folder of its own: named after the model's last part, or all of it where two share that."""
    last = [job.name or Path(job.model).name for job in jobs]
    names = [
        name if last.count(name) == 1 or job.name else "-".join(part for part in Path(job.model).parts if part != "/")
        for name, job in zip(last, jobs, strict=True)
    ]
    for name in names:
        if names.count(name) > 1 or name in ("", ".", "..") or "/" in name:
            raise ValueError(f"{path}: models: {name!r} can't be the name of one run folder; give each its own `name`")
    return [replace(job, name=name, out=job.out / name) for name, job in zip(names, jobs, strict=True)]


def _options(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """With the API's names; ValueError for one that it lacks."""
    run_options = set(inspect.signature(api.run).parameters) - _OWN
    known = sorted(run_options | (set(Settings.model_fields) - {"modes"}))
    options = {name.replace("-", "_"): value for name, value in given.items()}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{where}: unknown option {name!r}: {guess}Known here: {', '.join(known)}")
    return options


def _check(options: Mapping[str, Any], where: str) -> None:
    """Values that no run would take are named before anything is loaded."""
    try:
        _, rest = _settings(options)
        rest = {"options" if name == "engine_options" else name: value for name, value in rest.items()}
        given = {"model": "", **rest}
        for kind in (Spec, Spread):
            own = {one.name for one in fields(kind)}
            TypeAdapter(kind).validate_python({name: value for name, value in given.items() if name in own})
    except ValidationError as error:
        raise ValueError(f"{where}: {_told(error)}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _settings(options: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """(what is scored, the other options)."""
    chosen = {name: value for name, value in options.items() if name in Settings.model_fields}
    rest = {name: value for name, value in options.items() if name not in chosen}
    return api.settings_of(rest.pop("mode", "both"), chosen), rest


def _told(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {place}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place} is {first['input']!r}: {message[:1].lower() + message[1:]}" if place else message
