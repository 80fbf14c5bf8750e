"""The notebook's words, with the same meaning as the commands'.

Imports of the other folders stand inside the functions, so that ``import evalkit`` stays light and saved runs open
without torch.
"""

from __future__ import annotations

import contextlib
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
    from evalkit.opening import Opened, Spread
    from evalkit.progress import Progress
    from evalkit.registry import Task
    from evalkit.requests import Plan
    from evalkit.selection import Selection
    from evalkit.settings import Settings
    from evalkit.store import Key, Manifest, Run, RunWriter
    from reports.compare import Comparison

DEFAULT_TASKS = ("quick", "arithmetic")
LM_EVAL = "lm_eval:"
"""Begins the name of every task that lm-eval defines."""
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
    include_path: str | os.PathLike[str] | None = None,
    mode: str = "both",
    batch_size: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    engine: str = "hf",
    base_url: str = "",
    engine_options: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    ray: str | None = None,
    ray_actors: int | None = None,
    ray_resources: str = "",
    progress: Progress | bool = False,
    **settings: Any,
) -> Run:
    """Score ``model`` on ``tasks`` in both modes.

    model: a Hugging Face id, a folder, a built-in name, or a live ``nn.Module`` (then with its ``tokenizer``).
    tasks: names of registered tasks, paths of JSONL files, or lm_eval:NAME for a task, group or tag of lm-eval.
    out: the run's folder; a run that was cut off goes on there. None: in memory only.
    data_dir: folder with offline benchmark items (default: EVALKIT_DATA; neither: the Hugging Face hub).
    include_path: folder with lm-eval YAML files of your own.
    mode: "both", "loglikelihood" or "generation".
    engine: what runs the model (``evalkit.opening.ENGINES``), with ``engine_options`` passed through to it; "openai"
        is the server at ``base_url``, and ``model`` its name there.
    cache_dir: folder whose replies are taken, and to which new ones are added (evalkit/responses.py). None: neither.
    workers, ray, ray_actors, ray_resources: spread it over processes of this machine, or a Ray cluster
    (``evalkit.opening.Spread``). Processes import the calling script, so guard it by ``if __name__ == "__main__"``.
    settings: any field of ``evalkit.settings.Settings`` (view, shots, chat, limit, ...).
    ValueError: what was asked can't be done; the message says what to change.
    """
    from evalkit.opening import Spread
    from evalkit.selection import select

    chosen = _settings(mode, settings)
    spread = Spread(workers=workers, ray=ray, ray_actors=ray_actors, ray_resources=ray_resources)
    wanted = [task for one in _each(tasks) for task in tasks_of(one, chosen, include_path)]
    _no_twins(wanted)
    folder = data_folder(data_dir)
    for task in wanted:
        chosen.views_of(task)
    # Data is read before the model: what is missing there shows at once, not after minutes of loading.
    selections = {task.name: select(task, chosen, folder) for task in wanted}
    how: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "device": device, "revision": revision}
    how |= {"trust_remote_code": trust_remote_code, "engine": engine, "base_url": base_url}
    how |= {"options": dict(engine_options or {})}
    opened = _open(model, tokenizer, name, how, spread)
    try:
        with _stored(opened, cache_dir) as storing:
            return _score(storing, wanted, selections, chosen, None if out is None else Path(out), progress)
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
    chosen = None
    if tasks is not None:
        held = runs["teacher"].tasks
        chosen = [name for task in _each(tasks) for name in _names_in_run(task, held, options.get("include_path"))]
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
        for name in _names_in_run(task, run_.tasks, options.get("include_path")):
            if name not in run_.tasks:
                raise ValueError(
                    f"task {name!r} is not in the run of {run_.manifest.model.name}; it has {', '.join(run_.tasks)}"
                )
    return tasks or run_.tasks, {**options, **scored}


def need_files(names: Iterable[str]) -> None:
    """A run's own JSONL tasks can't be scored for another model by name alone; ValueError names the first."""
    import tasks as registered  # noqa: F401
    from evalkit.registry import TASKS

    own = [name for name in names if name not in TASKS and not name.startswith(LM_EVAL)]
    if own:
        raise ValueError(
            f"the run holds {own[0]!r}, which is no registered task; name its file: --tasks PATH/{own[0]}.jsonl"
        )


def _names_in_run(task: str, held: Sequence[str], include_path: str | os.PathLike[str] | None) -> list[str]:
    """The names that a task has in a run: its own, that of its JSONL file, or those of lm-eval's tasks behind it."""
    if _is_file(task):
        from tasks.user import task_name

        return [task_name(Path(task))]
    if task.startswith(LM_EVAL) and task not in held:
        from tasks.lm_eval_tasks import members

        behind = members(task.removeprefix(LM_EVAL), _folder(include_path))
        return [name for name in behind if name in held] or behind  # a group's refused members are in no run
    return [task]


def _folder(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)


def _is_file(task: str) -> bool:
    return task.endswith((".jsonl", ".jsonl.gz"))


def _each(tasks: Sequence[str] | str) -> Sequence[str]:
    """One task may be given as its name alone."""
    return [tasks] if isinstance(tasks, str) else tasks


def load_run(path: Run | str | os.PathLike[str]) -> Run:
    """Open a finished run's folder; a run is returned as it is."""
    from evalkit.store import Run, read_run

    return path if isinstance(path, Run) else read_run(Path(path))


def import_run(
    folder: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    tasks: Sequence[str] | None = None,
) -> Run:
    """What lm-eval wrote with ``--log_samples`` as a run; ``tasks``: only these, by lm-eval's names.

    out: the run's folder. None: in memory only. ValueError: something is missing, damaged or of two models.
    """
    from tasks.lm_eval_import import import_run as read

    if not Path(folder).is_dir():
        raise ValueError(f"the folder {folder} does not exist")
    return read(Path(folder), None if out is None else Path(out), tasks)


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


def data_folder(given: str | os.PathLike[str] | None) -> Path | None:
    """``given``, or EVALKIT_DATA, or none; ValueError for a folder that is not there."""
    named = given or os.environ.get("EVALKIT_DATA")
    if not named:
        return None
    folder = Path(named)
    if not folder.is_dir():
        raise ValueError(f"the data folder {folder} does not exist (--data-dir, EVALKIT_DATA)")
    return folder


def tasks_of(name: str, settings: Settings, include_path: str | os.PathLike[str] | None = None) -> list[Task]:
    """What ``name`` stands for: a registered task, the user's own by its file, or those of a group of lm-eval's."""
    import tasks as registered  # noqa: F401
    from evalkit.registry import get_task

    if _is_file(name):
        from tasks.user import user_task

        return [user_task(Path(name))]
    if name.startswith(LM_EVAL):
        from tasks.lm_eval_tasks import lm_eval_tasks

        return lm_eval_tasks(name.removeprefix(LM_EVAL), settings.modes, settings.shots, _folder(include_path))
    return [get_task(name)]


def _no_twins(wanted: Iterable[Task]) -> None:
    names = [task.name for task in wanted]
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise ValueError(f"two tasks are named {twins[0]!r}; give each once, and each JSONL file a name of its own")
    if not names:
        raise ValueError("no task was named; `evalkit tasks` shows all")


def _open(model: Any, tokenizer: Any, name: str, how: Mapping[str, Any], spread: Spread) -> Opened:
    """The engine over ``model``; ``how``: the other fields of ``evalkit.opening.Spec``."""
    from evalkit.opening import Spec, open_engine, open_loaded, open_spread

    if isinstance(model, (str, os.PathLike)):
        spec = Spec(model=os.fspath(model), name=name, **how)
        return open_spread(spec, spread) if spread else open_engine(spec)
    if spread:
        raise ValueError(f"workers load the model themselves: give its name or folder, not a {type(model).__name__}")
    if tokenizer is None:
        raise ValueError(f"a live model ({type(model).__name__}) needs its tokenizer: run(model, tokenizer=...)")
    if how["engine"] != "hf":
        raise ValueError(f"engine {how['engine']!r} takes a model's name or folder, not a live {type(model).__name__}")
    from models.load import describe

    return open_loaded(describe(model, tokenizer, name or type(model).__name__), how["batch_size"])


@contextlib.contextmanager
def _stored(opened: Opened, cache_dir: str | os.PathLike[str] | None) -> Iterator[Opened]:
    """``opened`` with the response store of ``cache_dir`` before its engine."""
    if cache_dir is None:
        yield opened
        return
    from dataclasses import replace

    from evalkit.responses import Responses, StoredEngine, code

    if opened.model.parts.get("weights", "").startswith("unknown"):
        raise ValueError(
            f"--cache-dir keeps replies by the model's weights, and those of {opened.model.name} are unknown: a server "
            f"may put others under the same name. Leave it out; the run's own folder still goes on where it stopped"
        )
    spread = ("batch_size", "workers", "ray")  # these change no reply
    session = {name: value for name, value in opened.session.items() if name not in spread}
    how = {"fingerprint": opened.model.fingerprint, "dtype": opened.model.dtype, **session}
    responses = Responses(Path(cache_dir), {**how, "versions": _versions(opened), "code": code()}, opened.model.name)
    try:
        yield replace(opened, engine=StoredEngine(opened.engine, responses))
    finally:
        responses.close()
    logger.info("%d replies taken from %s, %d added", responses.hits, responses.path, responses.misses)


def _versions(opened: Opened) -> dict[str, str]:
    from evalkit import __version__

    # Ours by its constant: a checkout that is not installed has no metadata.
    libraries = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    return {"evalkit": __version__, **libraries, **opened.versions}


def _score(
    opened: Opened,
    wanted: Sequence[Task],
    selections: Mapping[str, Selection],
    settings: Settings,
    out: Path | None,
    progress: Progress | bool,
) -> Run:
    """Score what ``out`` does not hold yet."""
    from evalkit.encoding import Encoder
    from evalkit.progress import bars
    from evalkit.store import RunWriter

    opened.check(settings)
    thinking = settings.thought_budget() is not None
    encoder = Encoder(opened.engine.tokenizer, chat=settings.chat, system=settings.system, thinking=thinking)
    writer = RunWriter(out, _manifest(opened, settings, wanted, selections))
    for line in writer.damaged:
        logger.warning("%s; it is scored again", line)
    keys: list[Key] = []
    try:
        with bars(progress, opened.model.name) as report:
            for task in wanted:
                keys += _score_task(task, selections[task.name], opened, encoder, settings, writer, report)
        return writer.finish(keys)
    finally:
        writer.close()


def _manifest(
    opened: Opened, settings: Settings, wanted: Sequence[Task], selections: Mapping[str, Selection]
) -> Manifest:
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
    versions = _versions(opened)
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
    opened: Opened,
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
            planned = plan(task, item, selection.examples(item), encoder, settings, opened.engine.max_length)
            keys.append((task.name, task.version, item.id, planned.prompt_sha256))
            kept = writer.kept.get(keys[-1])
            if kept is None or kept.gold != item.gold:  # the gold answer was corrected since
                yield planned

    total = len(selection.items)
    report(task.name, 0, total)
    before = sum(key[0] == task.name for key in writer.kept)
    records = evaluate(task, missing(), opened.engine, settings, opened.workers)
    for scored, record in enumerate(records, 1):
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
