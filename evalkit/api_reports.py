"""The notebook's words for finished runs: rank, check, rescore, bridge, divergence, report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalkit.api import is_run, load_run, run
from evalkit.naming import asked_as, need_files, refuse_imported

if TYPE_CHECKING:
    from evalkit.engines.hf import HFEngine
    from evalkit.progress import Progress
    from evalkit.records import TaskEntry
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
    tasks: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    prepare: Callable[[], None] = lambda: None,
    **engine: Any,
) -> tuple[Run, list[Verdict]]:
    """Is ``new`` no worse than each baseline on the same items? Returns its run and a verdict for each.

    new: a run, its folder, or a model, which is then scored as the first baseline was, into ``out``/new.
    baselines: run folders or baseline files. tasks: what the model is scored on, where the baseline's own names don't
    find it: files, and groups of lm-eval that change their tasks. ``prepare`` is called before a model is loaded;
    engine: options of ``run`` that change no score (data_dir, include_path, batch_size, dtype, device, ...).
    """
    from reports.baseline import read_baseline
    from reports.gate import Margins, gate

    read = [read_baseline(Path(one)) for one in baselines]
    if not is_run(new):
        refuse_imported(read[0].name, read[0].fingerprint, "to score a model alike")
        prepare()
        new = _score_as(read[0].settings, [task.entry for task in read[0].tasks], tasks, new, out, "new", engine)
    made = load_run(new)
    return made, [gate(made, one, margins or Margins()) for one in read]


def rescore(
    run: Any,
    *,
    rules: str | None = None,
    normalisation: str | None = None,
    files: Sequence[str | os.PathLike[str]] = (),
    data_dir: str | os.PathLike[str] | None = None,
    include_path: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Run:
    """A finished run under other extraction rules, another normalisation, or both; no model is needed.

    Other rules read the items again, as ``run`` does: from ``data_dir``, from the files of your own tasks (``files``),
    from YAML files in ``include_path``.
    out: the new run's folder; the old one is left as it is. ValueError: items that changed since they were scored.
    """
    from typing import get_args

    from evalkit.naming import data_folder, tasks_of
    from evalkit.records import Normalisation, Rules
    from evalkit.rescore import renormalise, reread
    from evalkit.selection import select
    from evalkit.store import write_run

    made = load_run(run)
    if rules is None and normalisation is None:
        raise ValueError("rescore needs --rules, --normalisation, or both")
    for value, known, what in ((rules, Rules, "rules"), (normalisation, Normalisation, "normalisation")):
        if value is not None and value not in get_args(known):
            raise ValueError(f"unknown {what} {value!r}: expected {', '.join(get_args(known))}")
    was = {"run": str(made.path or ""), **made.manifest.settings.model_dump(include={"rules", "normalisation"})}
    if normalisation is not None:
        made = renormalise(made, normalisation)  # type: ignore[arg-type]  # checked above
    if rules is not None:
        refuse_imported(made.manifest.model.name, made.manifest.model.fingerprint, "with other --rules")
    if rules is not None and made.manifest.settings.rules != rules:
        settings, folder = made.manifest.settings, data_folder(data_dir)
        own = [task for file in files for task in tasks_of(os.fspath(file), settings, include_path)]
        named = {task.name: task for task in own}
        others = [name for name in made.tasks if name not in named]
        need_files(others)
        asked = {task.name: task for task in asked_as(made.manifest.tasks, others, settings, include_path)}
        rest = [task for name in others if name not in asked for task in tasks_of(name, settings, include_path)]
        tasks = [*(task for task in own if task.name in made.tasks), *asked.values(), *rest]
        items = {task.name: select(task, settings, folder).items for task in tasks}
        read = {task.name: (task, {item.id: item for item in items[task.name]}) for task in tasks}
        made = reread(made, rules, read)  # type: ignore[arg-type]
    if out is None:
        return made
    sessions = (*made.manifest.sessions, {"rescored": was})
    records = [record for name in made.tasks for record in made.records(name).values()]
    return write_run(
        Path(out), made.manifest.model_copy(update={"sessions": sessions}), records, what="the rescored run"
    )


def score_again(
    baselines: Sequence[str | os.PathLike[str]],
    new: Any = None,
    *,
    tasks: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    prepare: Callable[[], None] = lambda: None,
    **engine: Any,
) -> tuple[Run, Run]:
    """(the baseline's run, the same model's second run): ``new`` if it is a run, else scored now into ``out``/again,
    with another batch size unless one is given; ``tasks`` as in ``check``."""
    if len(baselines) != 1 or not is_run(baselines[0]):
        raise ValueError("--calibrate needs one --baseline, the folder of a finished run")
    first = load_run(baselines[0])
    if new is not None and is_run(new):
        return first, load_run(new)
    refuse_imported(first.manifest.model.name, first.manifest.model.fingerprint, "to score its model again")
    prepare()
    before = (first.manifest.sessions[-1] if first.manifest.sessions else {}).get("batch_size") or 2
    engine["batch_size"] = engine.get("batch_size") or max(1, before // 2)
    model = new if new is not None else first.manifest.model.name
    return first, _score_as(first.manifest.settings, first.manifest.tasks, tasks, model, out, "again", engine)


def _score_as(
    settings: Settings,
    entries: Sequence[TaskEntry],
    tasks: Sequence[str] | None,
    model: Any,
    out: str | os.PathLike[str] | None,
    folder: str,
    engine: Mapping[str, Any],
) -> Run:
    """Score ``model`` with a run's settings on its tasks; ``tasks``: other names for them."""
    names = tasks or [entry.name for entry in entries]
    if tasks is None:
        need_files(names)
    asked_as(entries, names, settings, engine.get("include_path"))
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
    from evalkit.records import GENERATION
    from reports.bridge import SCHEMA, bridge_cells
    from reports.pairing import check_settings, pair

    runs = (load_run(teacher), load_run(student))
    for one in runs:
        refuse_imported(one.manifest.model.name, one.manifest.model.fingerprint, "for bridge cells")
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
        hf = _engine(models[side] if models else run_.manifest.model.name, run_, batch_size, engine)
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
        del hf  # the second model may need the room
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


def _engine(source: Any, run: Run | None, batch_size: int | None, options: Mapping[str, Any]) -> HFEngine:
    """The model ``source``, which must be the one that ``run`` scored."""
    from evalkit.engines.hf import HFEngine
    from models.load import load

    loaded = load(str(source), **options)
    wanted = loaded.identity if run is None else run.manifest.model.fingerprint
    if loaded.identity != wanted:
        raise ValueError(f"{loaded.name} ({loaded.identity}) is not the model that was scored ({wanted})")
    return HFEngine(loaded.model, loaded.tokenizer, batch_size=batch_size)


def divergence(
    run: Any,
    student: str | os.PathLike[str],
    tasks: Sequence[str] | None = None,
    *,
    teacher: str | os.PathLike[str] | None = None,
    student_run: Any = None,
    limit: int | None = None,
    progress: Progress | bool = False,
    **engine: Any,
) -> dict[str, Any]:
    """KL(teacher || student) on the replies of the teacher's run, and the first token at which the student would part.

    teacher: its model, where the run's own name does not find it. student_run: the student's run on the same items, to
    split the figures by what became of each. limit: items a task, by stable hash; engine: batch_size, dtype, device,
    trust_remote_code. Both models are held at once. ValueError: another model than the run scored, tokenizers that
    differ, or a run without replies that can be rebuilt.
    """
    from functools import partial

    from evalkit.encoding import Encoder
    from evalkit.forced import Said, forced, said_by, tokenizer_difference
    from evalkit.progress import bars
    from evalkit.records import GENERATION
    from evalkit.selection import first_of
    from reports.divergence import SCHEMA, divergence_cells

    scored = load_run(run)
    settings, model = scored.manifest.settings, scored.manifest.model
    refuse_imported(model.name, model.fingerprint, "for divergence")
    for name in tasks or ():
        if name not in scored.tasks:
            raise ValueError(f"task {name!r} is not in the run of {model.name}; it has {', '.join(scored.tasks)}")
    if GENERATION not in settings.modes:
        raise ValueError(f"the run of {model.name} has no replies; score it with --mode both or --mode generation")
    if settings.thinking != "off":
        raise ValueError(
            "a run keeps no tokens of thinking blocks, so they can't be read again; score with thinking off"
        )
    names = [name for name in scored.tasks if tasks is None or name in tasks]
    other = None if student_run is None else load_run(student_run)
    if other is not None:
        refuse_imported(other.manifest.model.name, other.manifest.model.fingerprint, "for divergence")
    became = {} if other is None else {name: _became(scored, other, name) for name in names}
    batch_size = engine.pop("batch_size", None)
    engines = (
        _engine(teacher or model.name, scored, batch_size, engine),
        _engine(student, other, batch_size, engine),
    )
    difference = tokenizer_difference(*(one.tokenizer for one in engines))
    if difference:
        raise ValueError(f"teacher and student have different tokenizers: {difference}; KL needs the same tokens")
    encoder = Encoder(engines[0].tokenizer, chat=settings.chat, system=settings.system)
    result = []
    with bars(progress, str(student)) as report_:
        for name in names:
            entry, records = scored.manifest.entry(name), scored.records(name)
            chosen = first_of(list(records), limit, name, settings.permutations)
            said = {item: said_by(records[item], entry.generation, encoder) for item in chosen}
            kept = [one for one in said.values() if isinstance(one, Said)]
            found = forced(kept, *engines, report=partial(report_, name))
            result.append(
                {
                    "name": name,
                    "view": entry.generation,
                    "left_out": {why: list(said.values()).count(why) for why in ("cut", "thought", "empty")},
                    "respelled": sum(one.respelled for one in kept),
                    **divergence_cells(found, [records[one.item].cluster for one in found], became.get(name)),
                }
            )
    return {"schema": SCHEMA, "teacher": model.name, "student": str(student), "tasks": result}


def _became(teacher: Run, student: Run, name: str) -> dict[str, str]:
    """Item -> what became of it, of those that both runs hold."""
    from evalkit.records import GENERATION
    from reports.divergence import BECAME
    from reports.pairing import check_settings, pair, rights_of

    check_settings(teacher, student)
    if name not in student.tasks:
        raise ValueError(f"the student's run lacks task {name!r}; it has {', '.join(student.tasks)}")
    paired = pair(teacher, student, name)
    rights = rights_of(paired, GENERATION)
    return {record.item: BECAME[both] for (record, _), both in zip(paired.pairs, rights, strict=True)}


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
