"""The notebook's words, with the same meaning as the commands'.

Imports of the other folders stand inside the functions, so that ``import evalkit`` stays light and saved runs open
without torch.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evalkit.encoding import Encoder
    from evalkit.engines.base import Engine
    from evalkit.opening import Opened
    from evalkit.progress import Progress, Wanted
    from evalkit.registry import Task
    from evalkit.requests import Plan
    from evalkit.selection import Selection
    from evalkit.settings import Settings
    from evalkit.store import Key, Manifest, Run, RunWriter
    from reports.compare import Comparison

DEFAULT_TASKS = ("quick", "arithmetic")
logger = logging.getLogger("evalkit")


def tasks() -> list[Task]:
    """Every registered task."""
    import tasks as registered  # noqa: F401  (registers them)
    from evalkit.registry import TASKS, get_task

    return [get_task(name) for name in sorted(TASKS)]


def run(
    model: Any,
    tasks: Sequence[str] | str = DEFAULT_TASKS,
    *,
    tokenizer: Any = None,
    name: str = "",
    out: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    mode: str = "both",
    batch_size: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    engine: str = "hf",
    engine_options: Mapping[str, Any] | None = None,
    progress: Wanted = False,
    **settings: Any,
) -> Run:
    """Score ``model`` on ``tasks`` in both modes.

    model: a Hugging Face id, a folder, a built-in name, or a live ``nn.Module`` (then with its ``tokenizer``).
    tasks: names of registered tasks, or paths of JSONL files.
    out: the run's folder; a run that was cut off goes on there. None: in memory only.
    data_dir: folder with offline benchmark items (default: EVALKIT_DATA; neither: the Hugging Face hub).
    mode: "both", "loglikelihood" or "generation".
    progress: lines on standard error (True), JSON lines there ("json"), or your own (task, done, total) function.
    engine: what runs the model (``evalkit.opening.ENGINES``), with ``engine_options`` passed through to it.
    settings: any field of ``evalkit.settings.Settings`` (view, shots, chat, limit, ...).
    ValueError: what was asked can't be done; the message says what to change.
    """
    from evalkit.selection import select

    chosen = _settings(mode, settings)
    wanted = [_task(one) for one in _each(tasks)]
    _no_twins(wanted)
    folder = Path(data_dir or os.environ["EVALKIT_DATA"]) if data_dir or os.environ.get("EVALKIT_DATA") else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"the data folder {folder} does not exist (--data-dir, EVALKIT_DATA)")
    for task in wanted:
        chosen.views_of(task)
    # Data is read before the model: what is missing there shows at once, not after minutes of loading.
    selections = {task.name: select(task, chosen, folder) for task in wanted}
    how: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "device": device, "revision": revision}
    how |= {"trust_remote_code": trust_remote_code, "engine": engine, "options": dict(engine_options or {})}
    opened = _open(model, tokenizer, name, how)
    try:
        return _score(opened, wanted, selections, chosen, None if out is None else Path(out), progress)
    finally:
        opened.close()


def compare(
    teacher: Any,
    student: Any,
    tasks: Sequence[str] | str | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Comparison:
    """Teacher against student on the same items.

    Each side is a run, a run's folder, or whatever ``run`` takes, which is then scored with ``options``. Beside a run
    the other side is scored as the run was; ``tasks`` and ``normalisation`` may choose from what it holds.
    out: folder for the report (compare.json, compare.md, items.jsonl) and for the runs made on the way (teacher/,
    student/). None: in memory only.
    """
    from evalkit.rescore import renormalise
    from reports.compare import Comparison

    folder = None if out is None else Path(out)
    sides = {"teacher": teacher, "student": student}
    runs = {who: load_run(side) for who, side in sides.items() if is_run(side)}
    names: Sequence[str] | str = tasks or DEFAULT_TASKS
    normalisation = options.get("normalisation")
    given = options
    for run_ in runs.values():
        names, options = _as_scored(run_, tasks, given)
    if tasks is None and len(runs) == 1:
        need_files(names)
    for who, side in sides.items():
        if who not in runs:
            runs[who] = run(side, names, out=None if folder is None else folder / who, **options)
    if normalisation is not None:
        runs = {who: renormalise(one, normalisation) for who, one in runs.items()}
    chosen = None if tasks is None else [_name_in_run(name) for name in _each(tasks)]
    comparison = Comparison(runs["teacher"], runs["student"], tasks=chosen)
    if folder is not None:
        comparison.save(folder)
    return comparison


def _as_scored(
    run_: Run, tasks: Sequence[str] | str | None, options: Mapping[str, Any]
) -> tuple[Sequence[str] | str, dict[str, Any]]:
    """(tasks, options) that score another model as ``run_`` was; ValueError for an option that says otherwise."""
    scored = run_.manifest.settings.model_dump()
    modes = scored.pop("modes")
    mode = "both" if len(modes) == 2 else modes[0]
    scored["mode"] = mode
    for name in scored:
        if name in options and name != "normalisation" and options[name] != scored[name]:
            raise ValueError(
                f"{name} {options[name]!r} was asked for, but the run of {run_.manifest.model.name} was scored with "
                f"{scored[name]!r}; leave it out, or score that model again"
            )
    for task in _each(tasks or ()):
        if _name_in_run(task) not in run_.tasks:
            raise ValueError(
                f"task {task!r} is not in the run of {run_.manifest.model.name}; it has {', '.join(run_.tasks)}"
            )
    return tasks or run_.tasks, {**options, **scored}


def need_files(names: Iterable[str]) -> None:
    """A run's own JSONL tasks can't be scored for another model by name alone; ValueError names the first."""
    import tasks as registered  # noqa: F401
    from evalkit.registry import TASKS

    own = [name for name in names if name not in TASKS]
    if own:
        raise ValueError(
            f"the run holds {own[0]!r}, which is no registered task; name its file: --tasks PATH/{own[0]}.jsonl"
        )


def _name_in_run(task: str) -> str:
    """The name that a task has in a run: its own, or that of its JSONL file."""
    from tasks.user import task_name

    return task_name(Path(task)) if _is_file(task) else task


def _is_file(task: str) -> bool:
    return task.endswith((".jsonl", ".jsonl.gz"))


def _each(tasks: Sequence[str] | str) -> Sequence[str]:
    """One task may be given as its name alone."""
    return [tasks] if isinstance(tasks, str) else tasks


def load_run(path: Run | str | os.PathLike[str]) -> Run:
    """Open a finished run's folder; a run is returned as it is."""
    from evalkit.store import Run, read_run

    return path if isinstance(path, Run) else read_run(Path(path))


def is_run(value: Any) -> bool:
    """A run in memory, or a folder with a run.json (a model folder has a config.json instead)."""
    from evalkit.store import MANIFEST, Run

    return isinstance(value, Run) or (isinstance(value, (str, os.PathLike)) and (Path(value) / MANIFEST).is_file())


# --- parts of a run ---------------------------------------------------------------------------------------------


def _settings(mode: str, settings: Mapping[str, Any]) -> Settings:
    from pydantic import ValidationError

    from evalkit.records import MODES
    from evalkit.settings import Settings

    modes = MODES if mode == "both" else tuple(m for m in MODES if m == mode)
    if not modes:
        raise ValueError(f"unknown mode {mode!r}: expected both, {' or '.join(MODES)}")
    try:
        chosen = Settings(modes=modes, **settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"setting {field!r} is {first['input']!r}: {first['msg'].lower()}") from error
    chosen.thought_budget()
    return chosen


def _task(name: str) -> Task:
    import tasks as registered  # noqa: F401
    from evalkit.registry import get_task

    if _is_file(name):
        from tasks.user import user_task

        return user_task(Path(name))
    return get_task(name)


def _no_twins(wanted: Iterable[Task]) -> None:
    names = [task.name for task in wanted]
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise ValueError(f"two tasks are named {twins[0]!r}; give each once, and each JSONL file a name of its own")
    if not names:
        raise ValueError("no task was named; `evalkit tasks` shows all")


def _open(model: Any, tokenizer: Any, name: str, how: Mapping[str, Any]) -> Opened:
    """The engine over ``model``; ``how``: the other fields of ``evalkit.opening.Spec``."""
    from evalkit.opening import Spec, open_engine, open_loaded

    if isinstance(model, (str, os.PathLike)):
        return open_engine(Spec(model=os.fspath(model), name=name, **how))
    if tokenizer is None:
        raise ValueError(f"a live model ({type(model).__name__}) needs its tokenizer: run(model, tokenizer=...)")
    if how["engine"] != "hf":
        raise ValueError(f"engine {how['engine']!r} takes a model's name or folder, not a live {type(model).__name__}")
    from models.load import describe

    return open_loaded(describe(model, tokenizer, name or type(model).__name__), how["batch_size"])


def _score(
    opened: Opened,
    wanted: Sequence[Task],
    selections: Mapping[str, Selection],
    settings: Settings,
    out: Path | None,
    progress: Wanted,
) -> Run:
    """Score what ``out`` does not hold yet."""
    from evalkit.encoding import Encoder
    from evalkit.progress import bars
    from evalkit.records import GENERATION, LOGLIKELIHOOD
    from evalkit.store import RunWriter

    thinking = settings.thought_budget() is not None
    encoder = Encoder(opened.engine.tokenizer, chat=settings.chat, system=settings.system, thinking=thinking)
    writer = RunWriter(out, _manifest(opened, settings, wanted, selections))
    for line in writer.damaged:
        logger.warning("%s; it is scored again", line)
    keys: list[Key] = []
    try:
        mode = "+".join({LOGLIKELIHOOD: "LL", GENERATION: "GEN"}[one] for one in settings.modes)
        with bars(progress, opened.model.name, mode=mode, figures=lambda: _tokens(opened.profile())) as report:
            for task in wanted:
                keys += _score_task(task, selections[task.name], opened.engine, encoder, settings, writer, report)
        return writer.finish(keys, opened.profile())
    finally:
        writer.close()


def _tokens(profile: Mapping[str, Any]) -> tuple[int, int]:
    """(run, found in caches)"""
    return sum(phase["tokens"] for phase in profile.get("phases", {}).values()), profile.get("tokens_cached", 0)


def _manifest(
    opened: Opened, settings: Settings, wanted: Sequence[Task], selections: Mapping[str, Selection]
) -> Manifest:
    from evalkit import __version__
    from evalkit.records import TaskEntry
    from evalkit.store import Manifest
    from evalkit.views import ask

    entries = []
    for task in wanted:
        ll_view, gen_view = settings.views_of(task)
        entries.append(
            TaskEntry(
                name=task.name,
                version=task.version,
                loglikelihood=ll_view,
                generation=gen_view,
                normalisation=settings.normalisation or task.normalisation,
                shots=task.shots if settings.shots is None else settings.shots,
                n=len(selections[task.name].items),
                strata=task.strata,
                listed=ask(gen_view, task, selections[task.name].items[0]).listed,
            )
        )
    libraries = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    versions = {
        "evalkit": __version__,
        **libraries,
        **opened.versions,
    }  # a checkout that is not installed has no metadata
    return Manifest(
        model=opened.model,
        settings=settings,
        tasks=tuple(entries),
        versions=versions,
        sessions=(
            {
                "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                **opened.session,
                "versions": versions,
                "git_revision": _git_revision(),
            },
        ),
        checkpoint=opened.checkpoint,
    )


def _score_task(
    task: Task,
    selection: Selection,
    engine: Engine,
    encoder: Encoder,
    settings: Settings,
    writer: RunWriter,
    report: Progress,
) -> list[Key]:
    """Score what the writer does not hold yet; the keys of all records of ``task`` that belong to the run."""
    from evalkit.evaluate import evaluate
    from evalkit.requests import plan

    keys: list[Key] = []

    def missing() -> Iterator[Plan]:
        for item in selection.items:
            planned = plan(task, item, selection.examples(item), encoder, settings, engine.max_length)
            keys.append((task.name, task.version, item.id, planned.prompt_sha256))
            kept = writer.kept.get(keys[-1])
            if kept is None or kept.gold != item.gold:  # the gold answer was corrected since
                yield planned

    total = len(selection.items)
    report(task.name, 0, total)
    before = sum(key[0] == task.name for key in writer.kept)
    for scored, record in enumerate(evaluate(task, missing(), engine, settings), 1):
        writer.append(record)
        report(task.name, min(total, before + scored), total)
    report(task.name, total, total)
    return keys


def _git_revision() -> str:
    """Of the folder the command runs in; empty where that is no checkout or git is missing."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
