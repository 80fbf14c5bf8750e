"""A run's folder: whether a run may begin or go on in it, and its state, whole at any moment.

OUT/recipe.json      the recipe, whole           OUT/metrics.jsonl   a line a step
OUT/state/           where a run goes on         OUT/checkpoints/STAGE-TOKENS/   ordinary model folders
OUT/selection.json   layers chosen by kl-restore OUT/delta/          the student that ships, where the recipe asks
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from distill.recipe import differences
from distill.stage import Recipe
from distill.student import start_folder
from evalkit.store import LOCK, atomic

RECIPE, METRICS, SELECTION, CHECKPOINTS, DELTA = (
    *("recipe.json", "metrics.jsonl", "selection.json", "checkpoints", "delta"),
)
STATE = "state/state.pt"


def open_run(recipe: Recipe, out: Path, resume: bool, teacher: str) -> dict[str, Any] | None:
    """The state to go on from, None for a new run; ``teacher``: its fingerprint.

    ValueError where ``out`` and the request don't agree. A run that failed before it kept anything is none.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give another --out, which becomes the run's folder")
    told = out / RECIPE
    if not told.is_file():
        if resume:
            raise ValueError(f"{out} holds no run that could go on (it has no {RECIPE}): leave --resume out")
        if out.is_dir() and any(one.name != LOCK for one in out.iterdir()):
            raise ValueError(f"{out} holds something else than a run: give another --out")
        return None
    if not (out / STATE).is_file():
        return None
    before = json.loads(told.read_text(encoding="utf-8"))
    if not resume:
        raise ValueError(f"{out} holds a run of the recipe {before.get('name')!r}: add --resume, or give another --out")
    if found := differences(before, recipe.model_dump(mode="json")):
        raise ValueError(
            f"{out} holds a run of another recipe; it differs in {'; '.join(found)}. Repeat its recipe, or give "
            f"another --out"
        )
    state = read_state(out)
    if state.get("teacher", teacher) != teacher:
        raise ValueError(
            f"{out} holds a run of another teacher: {recipe.teacher} has other weights or another tokenizer than when "
            f"it began; restore them, or give another --out"
        )
    return state


def lock_run(out: Path) -> FileLock:
    """Make the folder and hold it; ValueError where another process does."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another process is training into {out}; wait for it, or give another --out") from error
    return lock


def check_stage(recipe: Recipe, state: Mapping[str, Any] | None, stage: str | None) -> None:
    """ValueError unless ``stage`` is the one that follows on ``state``, or None."""
    if stage is None:
        return
    names = [one.name for one in recipe.stages]
    if stage not in names:
        raise ValueError(f"stage {stage!r} is not in the recipe: expected one of {', '.join(names)}")
    done = 0 if state is None else state["position"]["stage"]
    if names.index(stage) < done:
        raise ValueError(f"stage {stage!r} is done already; the next one is {(*names, 'none')[done]}")
    if names.index(stage) > done:
        raise ValueError(f"stage {stage!r} needs {names[done]} first: leave --stage out, or name that one")


def read_state(out: Path) -> dict[str, Any]:
    """What `write_state` wrote last, on the CPU; ValueError where it is damaged."""
    try:
        state = torch.load(out / STATE, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and torch each raise types of their own
        raise ValueError(
            f"{out / STATE} can't be read ({' '.join(str(error).split())[:200]}): the run can't go on; "
            f"its checkpoints are whole, so begin a new one from them (student.start)"
        ) from error
    assert isinstance(state, dict)
    return state


def write_state(out: Path, state: Mapping[str, Any]) -> None:
    """In one step: a run that is killed meanwhile has the state before."""
    with writing(out / STATE), atomic(out / STATE) as file:
        torch.save(state, file)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """OSError that names ``path`` for whatever goes wrong within the block, such as a full disk."""
    try:
        yield
    except Exception as error:  # on a full disk torch raises a RuntimeError, safetensors a type of its own
        reason = " ".join(str(error.__context__ if isinstance(error.__context__, OSError) else error).split())[:200]
        raise OSError(
            f"{path} could not be written ({reason}); what was saved before is whole: make room, then go on with "
            f"--resume"
        ) from error


def last_checkpoint(out: Path) -> Path | None:
    """The newest of ``out``'s checkpoints, by tokens."""
    folder = start_folder(str(out))
    return None if folder == out else folder


def tensorboard_writer(out: Path, state: Mapping[str, Any] | None) -> Any:
    """A writer of curves in OUT/tensorboard, on from ``state``; ValueError where TensorBoard isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs a package that is not installed: pip install tensorboard") from error
    return SummaryWriter(
        str(out / "tensorboard"), purge_step=None if state is None else state["position"]["total_tokens"] + 1
    )
