"""The notebook's words, with the same meaning as the commands'.

Imports of the other folders stand inside the functions, so that ``import evalkit`` stays light and saved runs open
without torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalkit.naming import (
    asked_as,
    data_folder,
    each,
    names_in_run,
    need_files,
    no_twins,
    refuse_imported,
    tasks_of,
)

if TYPE_CHECKING:
    from evalkit.opening import Opened, Spread
    from evalkit.progress import Wanted
    from evalkit.registry import Task
    from evalkit.settings import Settings
    from evalkit.store import Run
    from reports.compare import Comparison

DEFAULT_TASKS = ("quick", "arithmetic")


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
    progress: Wanted = False,
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
    progress: lines on standard error (True), JSON lines there ("json"), or your own (task, done, total) function.
    settings: any field of ``evalkit.settings.Settings`` (view, shots, chat, limit, ...).
    ValueError: what was asked can't be done; the message says what to change.
    """
    from evalkit.opening import Spread
    from evalkit.running import score, stored
    from evalkit.selection import select

    chosen = settings_of(mode, settings)
    spread = Spread(workers=workers, ray=ray, ray_actors=ray_actors, ray_resources=ray_resources)
    wanted = [task for one in each(tasks) for task in tasks_of(one, chosen, include_path)]
    no_twins(wanted)
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
        with stored(opened, cache_dir) as storing:
            return score(storing, wanted, selections, chosen, None if out is None else Path(out), progress)
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
        if len(runs) == 1:
            refuse_imported(run_.manifest.model.name, run_.manifest.model.fingerprint, "to score another model alike")
            asked_as(run_.manifest.tasks, each(names), run_.manifest.settings, given.get("include_path"))
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
        chosen = [name for task in each(tasks) for name in names_in_run(task, held, options.get("include_path"))]
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
    for task in each(tasks or ()):
        for name in names_in_run(task, run_.tasks, options.get("include_path")):
            if name not in run_.tasks:
                raise ValueError(
                    f"task {name!r} is not in the run of {run_.manifest.model.name}; it has {', '.join(run_.tasks)}"
                )
    return tasks or run_.tasks, {**options, **scored}


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


def settings_of(mode: str, settings: Mapping[str, Any]) -> Settings:
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
    from dataclasses import replace

    from models.load import describe

    opened = open_loaded(describe(model, tokenizer, name or type(model).__name__), how["batch_size"])
    return replace(opened, live=True)
