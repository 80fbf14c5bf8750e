"""A recipe run from teacher to student: the student is made, every stage trained, each end kept as a model folder.

Everything is written whole or not at all, so a run that is killed at any moment goes on with `--resume`.
distill/folder.py says what lies where.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill.folder import (
    CHECKPOINTS,
    DELTA,
    METRICS,
    RECIPE,
    SELECTION,
    check_stage,
    last_checkpoint,
    lock_run,
    open_run,
    read_state,
    tensorboard_writer,
    write_state,
    writing,
)
from distill.groups import check_frozen, freeze, frozen_hashes, mixer_layers, trained
from distill.guard import Guardian
from distill.objectives import Objective, place
from distill.optimiser import Masters
from distill.packing import Batch, Stream, share
from distill.parallel import Processes
from distill.plan import peak_flops, stage_plan
from distill.recipe import sha256
from distill.select import keep_layers_of, kl_restore, restore, selection_stage
from distill.speed import compiled, eager
from distill.stage import Recipe, Stage
from distill.student import add_lora, lora_factors, make_student, plain_model, start_folder
from distill.tokens import Library
from distill.train import Hooks, Metrics, Position, Stop, Stopped, train
from evalkit.store import write_json
from models.builtin import cache_dir
from models.delta import save_delta
from models.folders import written_whole
from models.load import NOTE_FILE, Loaded, read_note, resolve
from models.text import batches as text_batches

PROBE_ROWS = 8
"""Rows of the fixed batch on which each stage's loss is measured before and after."""
Report = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class Run:
    """What a run holds while it goes on."""

    recipe: Recipe
    out: Path
    teacher: Loaded
    student: Any
    processes: Processes
    device: torch.device
    library: Library
    stop: Stop
    metrics: Metrics
    guardian: Guardian
    report: Report
    position: Position = field(default_factory=Position)
    kept: tuple[int, ...] | None = None
    """kl-restore's choice."""
    probes: dict[str, dict[str, float]] = field(default_factory=dict)
    """Stage -> its loss on the fixed batch, before and after."""
    frozen: dict[str, str] = field(default_factory=dict)
    """Hashes of what the stage must not change."""

    @property
    def mixers(self) -> tuple[int, ...]:
        return tuple(sorted(mixer_layers(self.student)))


def distill(
    recipe: Recipe,
    out: Path,
    teacher: Loaded,
    *,
    resume: bool = False,
    stage: str | None = None,
    data_dir: Path | None = None,
    stop: Stop | None = None,
    processes: Processes | None = None,
    tensorboard: bool = False,
    save_seconds: float = 300.0,
    report: Report | None = None,
) -> Path:
    """Run ``recipe`` into ``out``; the folder of the last checkpoint.

    stage: this one alone, after those before it. tensorboard: curves in OUT/tensorboard, too. save_seconds: between two
    saves of the state. ValueError: ``out`` holds a run and ``resume`` is off, or another recipe's; a teacher that
    doesn't fit; data that can't be read, of any stage; a loss that isn't finite. OSError: a full disk. `Stopped`: on
    request, everything saved.
    """
    processes = processes or Processes()
    check_teacher(teacher)
    state = open_run(recipe, out, resume, teacher.identity)
    check_stage(recipe, state, stage)
    guardian = Guardian(recipe.guard, teacher.tokenizer, data_dir)
    library = Library(teacher.tokenizer, data_dir, exclude=guardian.questions, cache=cache_dir() / "tokens")
    processes.wait()  # until all have looked, before one writes
    lock = lock_run(out) if processes.first else None
    if processes.first:
        write_json(out / RECIPE, recipe.model_dump(mode="json"))
    processes.wait()
    device = next(teacher.model.parameters()).device
    teacher.model.requires_grad_(False)
    board = tensorboard_writer(out, state) if tensorboard and processes.first else None
    metrics = Metrics(out / METRICS if processes.first else None, board)
    say = report or (lambda row: None)
    try:
        kept = None if state is None else state["kept"]
        select = keep_layers_of(recipe.student.keep) is not None and kept is None
        student = make_student(teacher, recipe, keep=() if select else kept, lora=not select, begin=state is None)
        run = Run(
            *(recipe, out, teacher, student, processes, device, library, stop or Stop(), metrics, guardian, say),
        )
        if state is not None:
            _load(run, state)
        else:
            run.position.total_tokens = started_tokens(recipe)
            metrics.cut(0)
            for one in recipe.stages:  # what can't be read is known before anything is trained
                processes.share(one.batch)
                _stream(run, one, recipe.seed)
            if select:
                _select(run)
            for one in recipe.stages:
                trained(run.student, one.train, run.mixers)
            _save(run, None)
        wanted = [one.name for one in recipe.stages] if stage is None else [stage]
        folder = last_checkpoint(out)
        while run.position.stage < len(recipe.stages) and recipe.stages[run.position.stage].name in wanted:
            folder = _stage(run, recipe.stages[run.position.stage], save_seconds)
        assert folder is not None
        if run.position.stage == len(recipe.stages) and recipe.ship is not None and processes.first:
            ship(run)
        processes.wait()
        return folder
    finally:
        metrics.close()
        if lock is not None:
            lock.release()


def check_teacher(teacher: Loaded) -> None:
    """ValueError where the tokenizer speaks of tokens that the model hasn't got."""
    rows, known = teacher.model.get_input_embeddings().weight.shape[0], len(teacher.tokenizer)
    if known > rows:
        raise ValueError(
            f"the tokenizer of {teacher.name} knows {known} tokens, its model has embeddings for {rows}: "
            f"they don't belong together; save the model's own tokenizer in its folder"
        )
    if teacher.tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {teacher.name} has no eos_token, which ends documents: set one")


def started_tokens(recipe: Recipe) -> int:
    """Tokens behind the checkpoint that the student starts from."""
    note = read_note(resolve(str(start_folder(recipe.student.start)))) if recipe.student.start else None
    return int((note or {}).get("tokens", 0))


def _stage(run: Run, stage: Stage, save_seconds: float) -> Path:
    """Train one stage to its end, prove that nothing frozen moved, keep the student."""
    recipe, position = run.recipe, run.position
    chosen = freeze(run.student, stage.train, run.mixers)
    objective = Objective(stage, None if stage.loss == "ce" else run.teacher.model, run.student, run.mixers)
    stream = _stream(run, stage, recipe.seed + 1000 * position.stage)
    probe = _stream(run, stage, recipe.seed + 999_983).next()  # drawn by another seed than the training's batches
    masters = Masters(chosen, stage, run.mixers)
    state = read_state(run.out) if position.step else None
    if state is not None:
        masters.load_state_dict(state["masters"])
    else:
        run.frozen = frozen_hashes(run.student, chosen)
        run.probes[stage.name] = {"before": _probe(run, probe, objective)}
    run.metrics.plan = stage_plan(stage, run.teacher.model, run.student, recipe, run.processes.world)
    peak = peak_flops(run.device)
    run.metrics.peak = None if peak is None else peak * run.processes.world
    run.report({"stage": stage.name, "step": position.step, "steps": stage.steps, "begin": True})
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    hooks = Hooks(
        save=lambda _, masters: _save(run, masters),
        guard=lambda where: _guard(run, stage, where),
        report=run.report,
    )
    with compiled(run.teacher.model, run.student, wanted=run.device.type == "cuda"):
        run.position = train(
            *(stage, objective, masters, stream, position),
            device=run.device,
            processes=run.processes,
            stop=run.stop,
            metrics=run.metrics,
            hooks=hooks,
            guard_every=recipe.guard.every if run.guardian.wanted else 0,
            save_seconds=save_seconds,
        )
    del masters, state
    check_frozen(run.frozen, frozen_hashes(run.student, chosen))
    run.probes[stage.name]["after"] = _probe(run, probe, objective)
    where = {"stage": stage.name, "tokens": run.position.stage_tokens, "total_tokens": run.position.total_tokens}
    told = {**where, "end": True, "probe": run.probes[stage.name], "left_out": dict(stream.left_out)}
    if run.device.type == "cuda":
        told["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(run.device) / 2**30, 2)
    run.metrics.write(told)
    run.report(told)
    if run.guardian.wanted:
        _guard(run, stage, run.position)
    folder = _checkpoint(run, stage)
    run.position = Position(stage=run.position.stage + 1, total_tokens=run.position.total_tokens)
    _save(run, None)
    return folder


def _stream(run: Run, stage: Stage, seed: int) -> Stream:
    config = run.teacher.model.config
    return Stream(
        run.recipe.data[stage.data],
        run.library,
        seq_len=stage.seq_len,
        rows=stage.batch,
        mask=stage.mask,
        prompt_weight=stage.prompt_weight,
        seed=seed,
        window=getattr(config, "max_position_embeddings", 2**31),
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def _probe(run: Run, batch: Batch, objective: Objective) -> float:
    """The stage's loss a target token on the first rows of ``batch``."""
    rows = min(len(batch.tokens), PROBE_ROWS)
    total = weights = 0.0
    for row in range(rows):
        one = share(batch, slice(row, row + 1))
        total += float(objective(place(one, run.device)))
        weights += float(one.weights.sum())
    return total / max(weights, 1e-9)


def _guard(run: Run, stage: Stage, position: Position) -> None:
    """Accuracy by generation on train items that nothing is trained on; a sign of life, never a reported figure."""
    if run.processes.first:
        with eager():
            found = run.guardian.evaluate(run.student)
        row = {"stage": stage.name, "tokens": position.stage_tokens, "total_tokens": position.total_tokens}
        run.metrics.write({**row, "guard": found})
        run.report({**row, "guard": found})
    run.processes.wait()


def _select(run: Run) -> None:
    """kl-restore: align mixers in all layers, see which layer's attention is missed most, keep those."""
    recipe = run.recipe
    number = keep_layers_of(recipe.student.keep)
    assert number is not None
    stage = selection_stage(recipe)
    if stage is not None:
        stream = _stream(run, stage, recipe.seed + 500)
        objective = Objective(stage, run.teacher.model, run.student, run.mixers)
        masters = Masters(freeze(run.student, stage.train, run.mixers), stage, run.mixers)
        try:
            ended = train(
                *(stage, objective, masters, stream, Position(total_tokens=run.position.total_tokens)),
                device=run.device,
                processes=run.processes,
                stop=run.stop,
                metrics=run.metrics,
                hooks=Hooks(report=run.report),
                save_seconds=float("inf"),
            )
        except Stopped as stopped:  # too short to be resumed in the middle
            raise Stopped(f"{stopped}; the selection begins anew with --resume", stopped.exit_code) from None
        run.position.total_tokens = ended.total_tokens
    text = text_batches(run.teacher.tokenizer).probe
    found, table = kl_restore(run.teacher, run.student, text, number)
    run.kept = tuple(run.processes.first_says(found))  # a near tie may fall another way on another device
    if run.processes.first:
        write_json(run.out / SELECTION, {"kept": list(run.kept), "layers": table})
    run.student = restore(run.student, run.teacher, run.kept)
    if recipe.student.lora is not None:
        add_lora(run.student, recipe.student.lora, recipe.seed)


# --- on disk -----------------------------------------------------------------------------------------------------


def _load(run: Run, state: Mapping[str, Any]) -> None:
    run.kept = None if state["kept"] is None else tuple(state["kept"])
    run.student.load_state_dict(state["student"])
    run.position = Position(**state["position"])
    run.probes, run.frozen = state["probes"], state["frozen"]
    run.metrics.cut(state["metrics"])


def _save(run: Run, masters: Masters | None) -> None:
    """``masters``: None between two stages."""
    if not run.processes.first:
        return
    state = {
        "kept": None if run.kept is None else list(run.kept),
        "student": run.student.state_dict(),
        "teacher": run.teacher.identity,
        "position": asdict(run.position),
        "probes": run.probes,
        "frozen": run.frozen,
        "metrics": run.metrics.size(),
        "masters": None if masters is None else masters.state_dict(),
    }
    write_state(run.out, state)


def _checkpoint(run: Run, stage: Stage) -> Path:
    folder = run.out / CHECKPOINTS / f"{stage.name}-{run.position.total_tokens}"
    if run.processes.first:
        model = plain_model(run.student)
        with writing(folder), written_whole(folder) as new:
            model.save_pretrained(new)
            run.teacher.tokenizer.save_pretrained(new)
            note = json.dumps(note_of(run, stage.name), indent=2)
            (new / NOTE_FILE).write_text(note + "\n", encoding="utf-8")
    return folder


def note_of(run: Run, stage: str) -> dict[str, Any]:
    """evalkit.json of a checkpoint: how it was made. Ranking and ablation read nothing else."""
    recipe = run.recipe
    new = {"kda": "KDA", "softmax": "fresh softmax attention", "same": ""}[recipe.student.mixer]
    how = f"with {new} in layers {', '.join(map(str, run.mixers))}, distilled by" if new else "fine-tuned by"
    return {
        "note": f"{run.teacher.name} {how} the recipe {recipe.name} up to {stage}, "
        f"{run.position.total_tokens:,} tokens",
        "recipe": recipe.name,
        "recipe_sha256": sha256(recipe),
        "stage": stage,
        "tokens": run.position.total_tokens,
        "seed": recipe.seed,
        "axes": dict(recipe.axes),
        "teacher": run.teacher.name,
        "teacher_fingerprint": run.teacher.identity,
        "losses": run.probes,
        **({"start": recipe.student.start} if recipe.student.start else {}),
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def ship(run: Run) -> Path:
    """The student as a delta of its teacher, in OUT/delta."""
    assert run.recipe.ship is not None
    folder = run.out / DELTA
    with writing(folder):
        save_delta(
            plain_model(run.student),
            run.teacher,
            folder,
            encoding=run.recipe.ship.encoding,
            factors=lora_factors(run.student, run.teacher.model),
            note=note_of(run, run.recipe.stages[-1].name),
            file_bytes=int(run.recipe.ship.file_mib * 2**20),
        )
    return folder
