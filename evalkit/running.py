"""A run from end to end: an open engine, chosen items -> records in a run folder."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evalkit.encoding import Encoder
    from evalkit.opening import Opened
    from evalkit.progress import Progress, Wanted
    from evalkit.registry import Task
    from evalkit.requests import Plan
    from evalkit.selection import Selection
    from evalkit.settings import Settings
    from evalkit.store import Key, Manifest, Run, RunWriter

logger = logging.getLogger("evalkit")


@contextlib.contextmanager
def stored(opened: Opened, cache_dir: str | os.PathLike[str] | None) -> Iterator[Opened]:
    """``opened`` with the response store of ``cache_dir`` before its engine."""
    if cache_dir is None:
        yield opened
        return
    from dataclasses import replace

    from evalkit.responses import Responses, StoredEngine, code

    if opened.live:
        raise ValueError(
            f"--cache-dir keeps replies by the model's files, and {opened.model.name} is a live module, which hooks or "
            f"code may have changed; leave it out, or give the model's folder"
        )
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
    logger.info("%d replies taken from %s, %d added", responses.hits, responses.path, responses.added)


def score(
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

    opened.check(settings)
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
                keys += _score_task(task, selections[task.name], opened, encoder, settings, writer, report)
        return writer.finish(keys, opened.profile())
    finally:
        writer.close()


def _tokens(profile: Mapping[str, Any]) -> tuple[int, int]:
    """(run, found in caches)"""
    return sum(phase["tokens"] for phase in profile.get("phases", {}).values()), profile.get("tokens_cached", 0)


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
            if kept is None or (kept.gold, kept.also, kept.choices) != (item.gold, item.also, item.choices):
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
                listed=any(ask(gen_view, task, item).listed for item in selections[task.name].items),
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


def _versions(opened: Opened) -> dict[str, str]:
    from evalkit.engines.base import versions

    return {**versions(), **opened.versions}


def _git_revision() -> str:
    """Of the folder the command runs in; empty where that is no checkout or git is missing."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
