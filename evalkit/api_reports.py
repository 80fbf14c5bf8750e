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
