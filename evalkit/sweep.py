"""Many checkpoints by many tasks: a YAML file -> a run folder for each checkpoint.

Each checkpoint is scored in a process of its own: its memory goes with it, and its crash is its own.
"""

import difflib
import glob
import inspect
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from evalkit import __version__, api
from evalkit.engines.local import GLANCE_S, Process
from evalkit.naming import data_folder, tasks_of
from evalkit.opening import Spec, Spread, own_files
from evalkit.progress import Progress
from evalkit.registry import Task
from evalkit.settings import Settings
from evalkit.store import read_run, write_json
from evalkit.yaml12 import read_mapping

logger = logging.getLogger("evalkit")

ASKED = "sweep.json"
"""In a run's folder: what the sweep that finished it had asked for."""
_SPREAD = ("workers", "ray", "ray_actors", "ray_resources")
"""Options that are the whole sweep's: they change no score, and checkpoints share the cluster."""
_OWN = {"model", "tasks", "tokenizer", "name", "out", "progress", "settings"}
"""Parameters of ``api.run`` that a sweep sets itself."""


class Entry(BaseModel):
    """One line of ``models``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """A name, a folder or GGUF file, or a pattern of those (``checkpoints/step-*``)."""
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
    content = read_mapping(path, str(path), "the keys models, tasks and out")
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
        own = _options(entry.options, f"{path}: models.{at}.options")
        for name in own:
            if name in _SPREAD:
                raise ValueError(f"{path}: models.{at}.options: {name} is the whole sweep's; put it under its options")
        options |= own
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
    """The summary of a run that an equal job finished, after the model folder's last change. None: there is something
    to do, or ``api.run`` has to decide: what was asked differs, or the run is damaged."""
    from reports.summary import run_summary

    try:
        # A torn or foreign file is no equal job; what else is wrong, the job's own process tells.
        if json.loads((job.out / ASKED).read_text(encoding="utf-8")) != _asked(job):
            return None
        if _changed(job.model) > (job.out / ASKED).stat().st_mtime:
            return None
        return run_summary(read_run(job.out))
    except (ValueError, OSError):
        return None


def _asked(job: Job) -> dict[str, Any]:
    """All that a score of ``job`` depends on, as JSON values, as far as it is known before a model is loaded."""
    settings, rest = _settings(job.options)
    own = own_files(job.model)
    asked = {
        "evalkit": __version__,
        "model": job.model if own is None else str(own.resolve()),
        "tasks": sorted([task.name, task.version] for task in _tasks(job)),
        "settings": settings.model_dump(),
        "options": {name: value for name, value in rest.items() if name not in _SPREAD},
        "data_dir": data_folder(rest.get("data_dir")),
    }
    found: dict[str, Any] = json.loads(json.dumps(asked, default=str))
    return found


def _changed(model: str) -> float:
    """When a model's files last changed (seconds since the epoch); 0: there are none here."""
    # A copy may keep the time of its content (mtime), but not that of its entry (ctime).
    own = own_files(model)
    files = [] if own is None else own.glob("*") if own.is_dir() else [own]
    return max((file.stat().st_ctime for file in files), default=0.0)


def run_sweep(jobs: Sequence[Job], report: Progress, told: Callable[[Result], None]) -> list[Result]:
    """Score what is not finished yet; ``told`` hears of each result as it comes. A failure stops nothing else."""
    results: dict[str, Result] = {}

    def end(result: Result) -> None:
        results[result.job.name] = result
        told(result)

    todo = []
    for job in jobs:
        summary = finished(job)
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
            told_now = wait(list(running), GLANCE_S)
            for pipe, (job, process) in list(running.items()):
                if pipe not in told_now and process.process.is_alive():
                    continue
                result = _heard(job, process, report)
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

    def tell(kind: str, value: Any) -> None:
        try:
            pipe.send((kind, value))
        except OSError:
            sys.exit(1)  # the sweep is gone; what is open gets closed on the way out

    def report(task: str, done: int, total: int) -> None:
        tell("progress", (task, done, total))

    try:
        made = api.run(job.model, job.tasks, out=job.out, progress=report, **options)
        write_json(job.out / ASKED, _asked(job))
        tell("done", run_summary(made))
    except (ValueError, OSError, ImportError) as error:
        tell("failed", " ".join(str(error).split()))
    except Exception as error:
        logger.debug("%s", job.name, exc_info=True)
        last = (str(error).strip().splitlines() or [""])[-1]
        tell("failed", f"{type(error).__name__}: {last}")


def _heard(job: Job, process: Process, report: Progress) -> Result | None:
    try:
        kind, value = process.receive()
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
    """The model folders and GGUF files that a pattern stands for, in the order of the numbers in their names."""
    if not glob.has_magic(pattern):
        return [pattern]
    from models.load import DELTA_FILE
    from models.quantised import gguf_in

    def is_model(path: Path) -> bool:
        if not path.is_dir():
            return path.suffix == ".gguf"
        return any((path / file).is_file() for file in ("config.json", DELTA_FILE)) or bool(gguf_in(path))

    found = glob.glob(str(Path(pattern).expanduser()), recursive=True)
    models = [one for one in found if is_model(Path(one))]
    if not models:
        raise ValueError(
            f"{where}: no model folder or GGUF file matches {pattern!r} ({len(found)} matches without a config.json)"
        )
    return sorted(models, key=lambda one: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", one)])


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
