"""Names as users give them -> tasks: registered ones, JSONL files, and lm-eval's tasks, groups and tags."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evalkit.records import TaskEntry
    from evalkit.registry import Task
    from evalkit.settings import Settings

LM_EVAL = "lm_eval:"
"""Begins the name of every task that lm-eval defines."""


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


def need_files(names: Iterable[str]) -> None:
    """A run's own JSONL tasks can't be scored for another model by name alone; ValueError names the first."""
    import tasks as registered  # noqa: F401
    from evalkit.registry import TASKS

    own = [name for name in names if name not in TASKS and not name.startswith(LM_EVAL)]
    if own:
        raise ValueError(
            f"the run holds {own[0]!r}, which is no registered task; name its file: --tasks PATH/{own[0]}.jsonl"
        )


def asked_as(
    entries: Iterable[TaskEntry],
    names: Iterable[str],
    settings: Settings,
    include_path: str | os.PathLike[str] | None = None,
) -> list[Task]:
    """The tasks of lm-eval behind ``names``; ValueError where one would be asked otherwise than ``entries`` of a run
    were. A run knows a task's name, not the group that changed it or the file that it came from."""
    named = [name for name in names if name.startswith(LM_EVAL)]
    if not named:
        return []
    from tasks.lm_eval_tasks import groups_of, knows

    was = {entry.name: entry for entry in entries}
    for name in named:
        if name in was and not knows(name.removeprefix(LM_EVAL), _folder(include_path)):
            raise ValueError(
                f"the run holds {name!r}, which is none of lm-eval's own tasks; name its file: --tasks "
                f"{LM_EVAL}PATH/{name.removeprefix(LM_EVAL)}.yaml, or give its folder: --include-path FOLDER"
            )
    found = [task for name in named for task in tasks_of(name, settings, include_path)]
    for task in found:
        shots = task.shots if settings.shots is None else settings.shots
        entry = was.get(task.name)
        if entry is not None and (entry.version, entry.shots) != (task.version, shots):
            groups = groups_of(task.name.removeprefix(LM_EVAL), _folder(include_path))
            raise ValueError(
                f"{task.name} was scored in version {entry.version} with {entry.shots} examples, and would be asked in "
                f"version {task.version} with {shots} now; if a group or a file of your own changed it, name that: "
                f"--tasks {' or '.join(LM_EVAL + group for group in groups) or LM_EVAL + 'GROUP'}"
            )
    return found


def refuse_imported(name: str, fingerprint: str, what: str) -> None:
    """ValueError if the run of model ``name`` was imported: it has neither evalkit's prompts nor the model's hash."""
    from tasks.lm_eval_import import IMPORTED

    if fingerprint.startswith(IMPORTED):
        raise ValueError(
            f"the run of {name} was imported from lm-eval, so it can't be used {what}; it can be shown, reported, "
            f"rescored with --normalisation, and compared with another imported run"
        )


def names_in_run(task: str, held: Sequence[str], include_path: str | os.PathLike[str] | None) -> list[str]:
    """The names that a task has in a run: its own, that of its JSONL file, or those of lm-eval's tasks behind it."""
    if _is_file(task):
        from tasks.user import task_name

        return [task_name(Path(task))]
    if task.startswith(LM_EVAL) and task not in held:
        from tasks.lm_eval_tasks import members

        behind = members(task.removeprefix(LM_EVAL), _folder(include_path))
        return [name for name in behind if name in held] or behind  # a group's refused members are in no run
    return [task]


def data_folder(given: str | os.PathLike[str] | None) -> Path | None:
    """``given``, or EVALKIT_DATA, or none; ValueError for a folder that is not there."""
    named = given or os.environ.get("EVALKIT_DATA")
    if not named:
        return None
    folder = Path(named)
    if not folder.is_dir():
        raise ValueError(f"the data folder {folder} does not exist (--data-dir, EVALKIT_DATA)")
    return folder


def _folder(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)


def _is_file(task: str) -> bool:
    return task.endswith((".jsonl", ".jsonl.gz"))


def each(tasks: Sequence[str] | str) -> Sequence[str]:
    """One task may be given as its name alone."""
    return [tasks] if isinstance(tasks, str) else tasks


def no_twins(wanted: Iterable[Task]) -> None:
    names = [task.name for task in wanted]
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise ValueError(f"two tasks are named {twins[0]!r}; give each once, and each JSONL file a name of its own")
    if not names:
        raise ValueError("no task was named; `evalkit tasks` shows all")
