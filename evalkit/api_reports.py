"""The notebook's words for several finished runs: rank and check."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalkit.api import is_run, load_run, need_files, run

if TYPE_CHECKING:
    from evalkit.settings import Settings
    from evalkit.store import Run
    from reports.gate import Margins, Verdict
    from reports.rank import Ranks


def rank(runs: Sequence[Any], tasks: Sequence[str] | None = None) -> Ranks:
    """Does log-likelihood rank checkpoints as generation does? ``runs``: runs or their folders, one a checkpoint."""
    from reports.rank import Ranks

    return Ranks([load_run(one) for one in runs], tasks)


def check(
    new: Any,
    baselines: Sequence[str | os.PathLike[str]],
    margins: Margins | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    prepare: Callable[[], None] = lambda: None,
    **engine: Any,
) -> tuple[Run, list[Verdict]]:
    """Is ``new`` no worse than each baseline on the same items? Returns its run and a verdict for each.

    new: a run, its folder, or a model, which is then scored as the first baseline was, into ``out``/new.
    baselines: run folders or baseline files. ``prepare`` is called before a model is loaded; engine: options of ``run``
    that change no score (data_dir, batch_size, dtype, device, ...).
    """
    from reports.baseline import read_baseline
    from reports.gate import Margins, gate

    read = [read_baseline(Path(one)) for one in baselines]
    if not is_run(new):
        prepare()
        new = _score_as(read[0].settings, [task.entry.name for task in read[0].tasks], new, out, "new", engine)
    made = load_run(new)
    return made, [gate(made, one, margins or Margins()) for one in read]


def score_again(
    baselines: Sequence[str | os.PathLike[str]],
    new: Any = None,
    *,
    out: str | os.PathLike[str] | None = None,
    prepare: Callable[[], None] = lambda: None,
    **engine: Any,
) -> tuple[Run, Run]:
    """(the baseline's run, the same model's second run): ``new`` if it is a run, else scored now into ``out``/again,
    with another batch size unless one is given."""
    if len(baselines) != 1 or not is_run(baselines[0]):
        raise ValueError("--calibrate needs one --baseline, the folder of a finished run")
    first = load_run(baselines[0])
    if new is not None and is_run(new):
        return first, load_run(new)
    prepare()
    before = (first.manifest.sessions[-1] if first.manifest.sessions else {}).get("batch_size") or 2
    engine["batch_size"] = engine.get("batch_size") or max(1, before // 2)
    model = new if new is not None else first.manifest.model.name
    return first, _score_as(first.manifest.settings, first.tasks, model, out, "again", engine)


def _score_as(
    settings: Settings,
    names: Sequence[str],
    model: Any,
    out: str | os.PathLike[str] | None,
    folder: str,
    engine: Mapping[str, Any],
) -> Run:
    """Score ``model`` with a run's settings on its tasks."""
    need_files(names)
    options = settings.model_dump()
    modes = options.pop("modes")
    mode = "both" if len(modes) == 2 else modes[0]
    where = None if out is None else Path(out) / folder
    return run(model, names, mode=mode, out=where, progress=where is not None, **options, **engine)


def bridge(
    teacher: Any,
    student: Any,
    tasks: Sequence[str] | None = None,
    *,
    models: tuple[Any, Any] | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """Bridge cells of two finished runs in view ``cot``: what is lost in reading out, in rolling out, and in saying.

    models: the teacher's and the student's model where the runs' own names do not find them; engine: batch_size, dtype,
    device, trust_remote_code. Both are loaded one after the other. ValueError: other models than the runs scored, or
    runs that were not asked for a chain of thought.
    """
    from evalkit.bridge import VIEW, reasoning, rights_after
    from evalkit.encoding import Encoder
    from evalkit.engines.hf import HFEngine
    from evalkit.records import GENERATION
    from models.load import load
    from reports.bridge import SCHEMA, bridge_cells
    from reports.pairing import check_settings, pair

    runs = (load_run(teacher), load_run(student))
    check_settings(*runs)
    settings = runs[0].manifest.settings
    if settings.thinking != "off":
        raise ValueError(
            "bridge cells need the reasoning in the reply, not in a thinking block; score with thinking off"
        )
    common = [name for name in runs[0].tasks if name in runs[1].tasks and (tasks is None or name in tasks)]
    names = [name for name in common if runs[0].manifest.entry(name).generation == VIEW]
    if not names:
        raise ValueError(f"no common task was generated in view {VIEW!r}; score both runs with --view {VIEW}")
    paired = {name: pair(*runs, name) for name in names}
    batch_size = engine.pop("batch_size", None)
    rights: list[dict[str, dict[str, list[bool]]]] = []
    for side, run_ in enumerate(runs):
        model = run_.manifest.model
        loaded = load(str(models[side] if models else model.name), **engine)
        if loaded.identity != model.fingerprint:
            raise ValueError(
                f"{loaded.name} ({loaded.identity}) is not the model that was scored ({model.fingerprint})"
            )
        hf = HFEngine(loaded.model, loaded.tokenizer, batch_size=batch_size)
        encoder = Encoder(hf.tokenizer, chat=settings.chat, system=settings.system)
        found: dict[str, dict[str, list[bool]]] = {}
        for name, both in paired.items():
            entry, own = run_.manifest.entry(name), [pair_[side] for pair_ in both.pairs]
            thoughts = {"own": [reasoning(record) for record in own]}
            if side:
                thoughts["given"] = [reasoning(t) for t, _ in both.pairs]
            found[name] = {kind: rights_after(own, told, entry, encoder, hf) for kind, told in thoughts.items()}
            outcomes = [record.outcome(GENERATION, VIEW) for record in own]
            found[name]["said"] = [outcome is not None and outcome.outcome == "correct" for outcome in outcomes]
        rights.append(found)
        del loaded, hf  # the second model may need the room
    return {
        "schema": SCHEMA,
        "teacher": runs[0].manifest.model.name,
        "student": runs[1].manifest.model.name,
        "tasks": [
            {
                "name": name,
                **bridge_cells(
                    teacher_own=rights[0][name]["own"],
                    teacher_said=rights[0][name]["said"],
                    student_given=rights[1][name]["given"],
                    student_own=rights[1][name]["own"],
                    student_said=rights[1][name]["said"],
                    clusters=both.clusters,
                ),
            }
            for name, both in paired.items()
        ],
    }


def report(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    formats: Sequence[str] = ("md", "html"),
    *,
    text: bool = True,
) -> list[Path]:
    """Write report.md with its charts and report.html into ``out``; the files made.

    folders: one comparison, one run, or the runs of several checkpoints. ``text`` False: no benchmark text is written.
    """
    from reports.report import read_report, save_report

    return save_report(read_report([Path(one) for one in folders], text), Path(out), formats)
