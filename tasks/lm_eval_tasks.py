"""Tasks of lm-evaluation-harness (EleutherAI, MIT) in both modes: ``lm_eval:NAME``.

lm-eval's TaskManager reads its own YAML, its groups and tags, and a user's own YAML files; data sets come from where
the YAML says. Which modes a task has is told in lm_eval_kinds.py, how its text becomes an item in lm_eval_text.py
(multiple choice) and lm_eval_free.py (all others).
"""

import difflib
import functools
import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit.records import GENERATION, Item, Mode, Normalisation
from evalkit.registry import Task
from tasks.lm_eval_free import NoJudge, free_items, try_judge, word_items
from tasks.lm_eval_kinds import Kind, kind_of, metric_of, mode_word
from tasks.lm_eval_text import choice_items

PREFIX = "lm_eval:"
FEWSHOT_SEED = 1234
"""`lm_eval run`'s own."""
logger = logging.getLogger("evalkit")


def _installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks named lm_eval:... need lm-eval: pip install 'evalkit[lm-eval]'")


@functools.lru_cache
def manager(include_path: str | None = None) -> Any:
    """lm-eval's TaskManager over its own YAML files and those in the folder ``include_path`` (some seconds)."""
    _installed()
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"the folder {include_path} of task files does not exist (--include-path)")
    return TaskManager(include_path=include_path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One task behind a name, not loaded yet."""

    name: str
    entry: Any
    """lm-eval's index entry; None: a group's YAML defines the task itself."""
    changes: Mapping[str, Any]
    """What the groups above it change in its YAML."""

    @property
    def config(self) -> dict[str, Any]:
        from lm_eval.tasks._yaml_loader import load_yaml

        if self.entry is None:
            return dict(self.changes)
        own = self.entry.cfg
        return {**(load_yaml(self.entry.yaml_path, resolve_func=False) if own is None else own), **self.changes}

    def load(self) -> Any:
        """lm-eval's task object, with its data."""
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks._factory import TaskFactory

        changes = {**self.changes, "task": self.name}
        try:
            if self.entry is None:
                return ConfigurableTask(config=changes)
            return TaskFactory().build(self.entry, overrides=changes, registry={})
        except Exception as error:  # lm-eval and datasets raise a dozen types for one cause: data could not be read
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{PREFIX}{self.name} could not be loaded ({reason}); correct its YAML if it is yours; without a "
                f"network its data set must be in the Hugging Face cache, or a YAML of your own must name a local copy "
                f"(dataset_path, dataset_kwargs)"
            ) from error


def lm_eval_tasks(
    name: str, modes: Collection[Mode], shots: int | None = None, include_path: str | None = None
) -> list[Task]:
    """``name`` without its prefix: a task, a group, a tag, or a YAML file. ``shots``: None for the task's own.

    ValueError: a task that can't be scored in all ``modes``, and why; members of a group are left out with a warning.
    """
    found, refused = [], []
    behind = _members(name, include_path)
    for member in behind:
        config = member.config
        kind = kind_of(config)
        if set(modes) <= set(kind.modes) and shots and config.get("num_fewshot") == 0:
            refused.append(
                f"{PREFIX}{member.name} fixes num_fewshot: 0 in its YAML, so lm-eval gives it no examples; leave "
                f"--shots out"
            )
        elif set(modes) <= set(kind.modes):
            found.append(member)
        elif kind.modes:
            word = mode_word(kind.modes)
            refused.append(f"{PREFIX}{member.name} can only be scored by {word} (--mode {word}): {kind.reason}")
        else:
            refused.append(f"{PREFIX}{member.name} can't be scored: {kind.reason}")
    made = []
    for member in found:
        try:
            made.append(_task(member.load(), modes, shots))
        except NoJudge as error:
            refused.append(str(error))
    if not made:
        raise ValueError(refused[0] + (f" (and {len(refused) - 1} more of {name})" if len(refused) > 1 else ""))
    for line in refused:
        logger.warning("%s; it is left out of %s", line, name)
    return made


def members(name: str, include_path: str | None = None) -> list[str]:
    """Names, with the prefix, of the tasks that ``name`` stands for."""
    return [f"{PREFIX}{member.name}" for member in _members(name, include_path)]


def knows(name: str, include_path: str | None = None) -> bool:
    """Whether lm-eval's index has a task, group or tag ``name``, or a group that defines it."""
    index = manager(include_path).task_index
    return name in index or (name.partition("::")[0] in index and bool(_members(name, include_path)))


def groups_of(name: str, include_path: str | None = None) -> list[str]:
    """Groups that change something in the task ``name``."""
    from lm_eval.tasks._index import Kind as Entry

    index = manager(include_path).task_index
    groups = [group for group, entry in index.items() if entry.kind == Entry.GROUP]
    return [
        group
        for group in groups
        if any(member.name == name and member.changes for member in _expanded(index, group, {}))
    ]


def kinds(matching: str = "", include_path: str | None = None) -> Iterator[tuple[str, Kind]]:
    """Every task whose name holds ``matching``, from the YAML files alone; nothing is downloaded."""
    found = manager(include_path)
    for name in found.all_subtasks:
        if matching in name:
            yield name, kind_of(found.task_index[name].cfg)


def _members(name: str, include_path: str | None) -> list[Member]:
    """The tasks behind ``name``, each once."""
    if name.endswith((".yaml", ".yml")):
        _installed()
        from lm_eval.tasks._index import Kind as Entry
        from lm_eval.tasks._index import TaskIndex

        entry = TaskIndex.entry_from_path(Path(name))
        if entry is None or entry.kind not in (Entry.TASK, Entry.PY_TASK):
            raise ValueError(
                f"{name} is no file with a task in it; a group's file needs --include-path {Path(name).parent}"
            )
        return [Member(name=entry.name, entry=entry, changes={})]
    index = manager(include_path).task_index
    group, inline, _ = name.partition("::")
    if inline and group in index:  # a task that the group's YAML defines itself
        found = [member for member in _expanded(index, group, {}) if member.name == name]
        if found:
            return found[:1]
    if name not in index:
        near = difflib.get_close_matches(name, index, n=1, cutoff=0.4)
        guess = f"did you mean {PREFIX}{near[0]}? " if near else ""
        raise ValueError(
            f"lm-eval has no task, group or tag {name!r}: {guess}`evalkit tasks --source lm_eval` lists its tasks; "
            f"your own YAML files need --include-path FOLDER, or lm_eval:PATH/TASK.yaml"
        )
    return list({member.name: member for member in _expanded(index, name, {})}.values())


def _expanded(index: Mapping[str, Any], name: str, changes: Mapping[str, Any]) -> Iterator[Member]:
    """As lm-eval's TaskFactory goes through groups and tags, without building tasks."""
    from lm_eval.tasks._index import Kind as Entry
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = index[name]
    if entry.kind == Entry.TAG:
        for member in sorted(entry.tags):
            yield Member(name=member, entry=index[member], changes=changes)
    elif entry.kind == Entry.GROUP:
        yield from _of_group(index, name, load_yaml(entry.yaml_path), changes)
    else:
        yield Member(name=name, entry=entry, changes=changes)


def _of_group(
    index: Mapping[str, Any], group: str, config: Mapping[str, Any], changes: Mapping[str, Any]
) -> Iterator[Member]:
    """A member may be a name, a mapping with changes to what it names, or a definition of its own."""
    from lm_eval.tasks._factory import GROUP_FIELD_NAMES

    changes = {**{key: value for key, value in config.items() if key not in GROUP_FIELD_NAMES}, **changes}
    named = config.get("task")
    for member in named if isinstance(named, list) else []:
        own = {} if isinstance(member, str) else {key: value for key, value in member.items() if key != "task"}
        if "group" in own:
            inner = own.pop("group")
            if inner in index:
                yield from _expanded(index, inner, {**changes, **own})
            else:
                yield from _of_group(index, f"{group}::{inner}", member, changes)
            continue
        called = member if isinstance(member, str) else member["task"]
        if called in index:
            yield from _expanded(index, called, {**changes, **own})
        else:
            yield Member(name=f"{group}::{called}", entry=None, changes={**changes, **own})


def _task(task: Any, modes: Collection[Mode], shots: int | None) -> Task:
    """lm-eval's task object as a task of both modes; ``shots`` overrides its own number of examples, as in lm-eval."""
    name, config = f"{PREFIX}{task.task_name}", task.config
    own = config.num_fewshot or 0
    number = own if shots is None else shots
    task.set_config("num_fewshot", number)
    task.set_fewshot_seed(FEWSHOT_SEED)
    make = {"multiple_choice": choice_items, "loglikelihood": word_items, "generate_until": free_items}
    try:
        items, bad = make[task.OUTPUT_TYPE](task, name, number)
    except Exception as error:  # whatever the YAML's templates and functions and lm-eval's samplers raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{name}: lm-eval can't write its documents with {number} examples ({type(error).__name__}: {reason}); "
            f"correct its YAML or lower --shots"
        ) from error
    if not items:
        raise ValueError(f"{name}: no document makes an item; the first: {bad[0] if bad else 'there is none'}")
    if GENERATION in modes and task.OUTPUT_TYPE == "generate_until":
        try_judge(task, name, items[0])
    if bad:
        logger.warning("%s: %d of %d documents are left out; %s", name, len(bad), len(bad) + len(items), bad[0])
    lettered = task.OUTPUT_TYPE == "multiple_choice"
    natural = all(item.native and item.native.listed for item in items)
    scores = [entry["metric"] for entry in config.metric_list or []]
    normalisation: Normalisation = "character" if lettered and "acc_norm" in scores else "raw"
    return Task(
        name=name,
        summary=_summary(task, items),
        version=_version(task),
        items=lambda _: items,
        views=("native", "letters") if lettered else ("native",),
        loglikelihood="native",
        generation="letters" if lettered and not natural else "native",
        normalisation=normalisation,
        shots=number,
        source=f"lm-eval: {task.DATASET_PATH} {task.DATASET_NAME or ''}".rstrip(),
    )


def _summary(task: Any, items: list[Item]) -> str:
    told = f"{len(items)} documents of lm-eval's {task.task_name}"
    if task.OUTPUT_TYPE == "generate_until":
        metric = metric_of(task.config.to_dict(keep_callable=True))
        judged = f"replies judged by {metric} after filter {task._filters[0].name}" if metric else "replies not judged"
        ranked = "its own choices" if task.config.doc_to_choice else "near numbers, or other documents' answers"
        return f"{told}: {judged}; log-likelihood ranks the gold answer against {ranked}"
    if task.OUTPUT_TYPE == "loglikelihood":
        return f"{told}: a reply must begin with the word; log-likelihood ranks it against other documents' words"
    return told


def _version(task: Any) -> str:
    """lm-eval's version of the task, and a hash of how it is asked and judged."""
    from importlib.metadata import version

    apart = ("metadata", "dataset_path", "dataset_kwargs", "custom_dataset", "task", "num_fewshot")
    config = {key: value for key, value in task.dump_config().items() if key not in apart}
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(config, sort_keys=True, default=str))
    return f"{task.VERSION}+{hashlib.sha256(text.encode()).hexdigest()[:8]} (lm-eval {version('lm_eval')})"
