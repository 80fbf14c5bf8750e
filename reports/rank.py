"""Do log-likelihood and generation rank checkpoints alike? Per task and overall, and along training."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from evalkit.records import GENERATION, LOGLIKELIHOOD
from evalkit.stats.clustered import mean_error, sums
from evalkit.stats.floors import accuracy, deciding_clusters
from evalkit.stats.intervals import Interval, macro
from evalkit.stats.paired_tests import holm, mcnemar, sign_flip
from evalkit.stats.ranks import macro_measure, measure, noise_ceiling, ranking, tau_within
from evalkit.stats.seeds import pooled, recipe_interval
from evalkit.store import Run, write_json, write_text
from reports.checkpoints import PRIMARY, Checkpoint, Scores, checkpoints, part, scores
from reports.why import plain

SCHEMA = "evalkit.rank/1"
RESOLVED = 0.05
"""A pair of checkpoints is resolved in a mode where Holm's p, over all pairs and both modes, is below this."""


class Ranks:
    """``result`` is rank.json."""

    def __init__(self, runs: Sequence[Run], tasks: Sequence[str] | None = None) -> None:
        """``tasks``: only these of what all runs hold. ValueError: the runs can't be ranked together, and why."""
        points = checkpoints(runs)
        labels = [point.label for point in points]
        common = [name for name in runs[0].tasks if all(name in run.tasks for run in runs)]
        unknown = [name for name in tasks or () if name not in common]
        if unknown:
            raise ValueError(f"task {unknown[0]!r} is not in all runs; these are: {', '.join(common) or 'none'}")
        names = [name for name in common if tasks is None or name in tasks]
        if not names:
            raise ValueError(f"the runs have no task in common: {'; '.join(', '.join(run.tasks) for run in runs)}")
        found = {name: scores(runs, labels, name) for name in names}
        used = [task for task in found.values() if task.signal]
        only = sorted({name for run in runs for name in run.tasks} - set(common)) if tasks is None else []
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "checkpoints": [
                {
                    "label": point.label,
                    "model": run.manifest.model.name,
                    "fingerprint": run.manifest.model.fingerprint,
                    "recipe": point.recipe,
                    "stage": point.stage,
                    "tokens": point.tokens,
                    "seed": point.seed,
                }
                for point, run in zip(points, runs, strict=True)
            ],
            "independent": _independent(points),
            "intervals": "95 %, of this checkpoint (over items)",
            "tasks": [
                {"name": name, "n": len(task.items), "signal": task.signal, **_ranked([task], points)}
                for name, task in found.items()
            ],
            "overall": {"tasks": [task.entry.name for task in used], **_ranked(used, points)} if used else None,
            "held_out": _held_out(used),
            "notes": _notes(found, only, runs),
        }

    def to_markdown(self) -> str:
        from reports.rank_markdown import rank_markdown

        return rank_markdown(self.result)

    def save(self, folder: Path) -> None:
        """Write rank.json and rank.md, each whole or not at all."""
        write_json(folder / "rank.json", self.result)
        write_text(folder / "rank.md", self.to_markdown())


def _held_out(tasks: Sequence[Scores]) -> dict[str, Any] | None:
    """How far the rankings agree on the items that did not decide which tasks carry signal; None where there are none
    in one of the tasks, or no task."""
    keeps = [~np.array(deciding_clusters(task.entry.name, task.clusters)) for task in tasks]
    if not tasks or not all(keep.any() for keep in keeps):
        return None
    rest = [part(task, keep) for task, keep in zip(tasks, keeps, strict=True)]
    found = ranking(_means([task.primary for task in rest]), _means([task.generation for task in rest]))
    return {"items": sum(len(task.items) for task in rest), "tau": found.tau, "spearman": found.spearman}


def _independent(points: Sequence[Checkpoint]) -> bool:
    return len({point.trajectory for point in points}) == len(points)


def _notes(found: dict[str, Scores], only: Sequence[str], runs: Sequence[Run]) -> list[str]:
    notes = [f"Not all runs hold the task {name!r}; it is left out." for name in only]
    for name, task in found.items():
        if not task.signal:
            notes.append(f"{name}: no checkpoint is above the floor in both modes; it is left out overall.")
        most = max(len(run.records(name)) for run in runs)
        if most > len(task.items):
            notes.append(f"{name}: {most - len(task.items)} items are not in all runs and are left out.")
    return notes


def _ranked(tasks: Sequence[Scores], points: Sequence[Checkpoint]) -> dict[str, Any]:
    """Everything about one ranking: of a task, or of the equal-weight average of several."""
    kinds = [kind for kind in tasks[0].loglikelihood if all(kind in task.loglikelihood for task in tasks)]
    if len(tasks) > 1:
        kinds.insert(0, PRIMARY)
    generation = _means([task.generation for task in tasks])
    independent = _independent(points)
    budgets = [point.tokens if point.tokens is not None else point.label for point in points]
    rankings = {}
    for kind in kinds:
        values = _means([task.by(kind) for task in tasks])
        ceiling = noise_ceiling(
            macro_measure([measure(task.by(kind), task.generation, task.clusters) for task in tasks])
        )
        found = ranking(values, generation, independent)
        within, pairs = tau_within(values, generation, budgets)
        rankings[kind] = {
            "tau": found.tau,
            "spearman": found.spearman,
            "p": found.p,
            "ceiling": None if ceiling is None else {"mean": ceiling.mean, "low": ceiling.low},
            "within_budget": {"tau": within, "pairs": pairs},
            "loglikelihood": values,
        }
    return {
        "normalisation": PRIMARY if len(tasks) > 1 else tasks[0].entry.normalisation,
        "accuracy": [
            {
                LOGLIKELIHOOD: plain(_accuracy([(task.primary[at], task.clusters) for task in tasks])),
                GENERATION: plain(_accuracy([(task.generation[at], task.clusters) for task in tasks])),
            }
            for at in range(len(points))
        ],
        "rankings": rankings,
        "chosen": _chosen(tasks, kinds),
        "pairs": _pairs(tasks, points),
        "recipes": _recipes(tasks, points),
    }


def _means(arrays: Sequence[np.ndarray]) -> list[float]:
    return [float(x) for x in np.mean([values.mean(axis=1) for values in arrays], axis=0)]


def _accuracy(parts: Sequence[tuple[np.ndarray, Sequence[str]]]) -> Interval:
    return macro([accuracy([bool(x) for x in row], clusters) for row, clusters in parts])


def _chosen(tasks: Sequence[Scores], kinds: Sequence[str]) -> dict[str, Any] | None:
    """The normalisation whose ranking agrees best with generation's on half of the items, and its tau on the others.
    None: no half ranks anything."""
    halves = []
    for first in (True, False):
        keeps = [(task, task.half(first)) for task in tasks]
        if not all(keep.any() for _, keep in keeps):
            return None
        halves.append([part(task, keep) for task, keep in keeps])

    def tau(side: Sequence[Scores], kind: str) -> float | None:
        values = _means([task.by(kind) for task in side])
        return ranking(values, _means([task.generation for task in side])).tau

    known = {kind: found for kind in kinds if (found := tau(halves[0], kind)) is not None}
    if not known:
        return None
    best = max(known, key=lambda kind: known[kind])
    return {
        "normalisation": best,
        "tau_chosen_on": known[best],
        "tau_reported": tau(halves[1], best),
        "items": sum(len(task.items) for task in halves[1]),
    }


def _pairs(tasks: Sequence[Scores], points: Sequence[Checkpoint]) -> dict[str, Any]:
    """Every pair of checkpoints in both modes, under Holm: how many are resolved in both, how many of those agree, and
    which are reversed."""
    cells: list[dict[str, Any]] = []
    for i, j in combinations(range(len(points)), 2):
        modes = ((LOGLIKELIHOOD, [task.primary for task in tasks]), (GENERATION, [task.generation for task in tasks]))
        for mode, arrays in modes:
            steps = [values[i] - values[j] for values in arrays]
            mean = float(np.mean([step.mean() for step in steps]))
            p = _difference_p(steps, [task.clusters for task in tasks])
            cells.append({"pair": (i, j), "mode": mode, "difference": mean, "p": p})
    for cell, p in zip(cells, holm([float(cell["p"]) for cell in cells]), strict=True):
        cell["holm_p"] = p
    resolved = agree = 0
    reversals = []
    for one, other in zip(cells[::2], cells[1::2], strict=True):
        if max(one["holm_p"], other["holm_p"]) >= RESOLVED:
            continue
        resolved += 1
        if one["difference"] * other["difference"] > 0:
            agree += 1
            continue
        i, j = one["pair"]
        told = {cell["mode"]: {key: cell[key] for key in ("difference", "p", "holm_p")} for cell in (one, other)}
        better = points[i if one["difference"] > 0 else j].label
        reversals.append({"first": points[i].label, "second": points[j].label, "by_loglikelihood": better, **told})
    return {"all": len(cells) // 2, "resolved": resolved, "agree": agree, "reversals": reversals}


def _difference_p(steps: Sequence[np.ndarray], clusters: Sequence[Sequence[str]]) -> float:
    """One task: McNemar's exact test, or the cluster sign-flip test. Several: t of their equal-weight average, with
    Satterthwaite's degrees of freedom."""
    if len(steps) == 1:
        if len(set(clusters[0])) == len(steps[0]):
            return mcnemar(int((steps[0] > 0).sum()), int((steps[0] < 0).sum()))[0]
        return sign_flip([round(total) for total in sums(steps[0], clusters[0])[0]])
    errors = [mean_error(step, names) for step, names in zip(steps, clusters, strict=True)]
    known = [error for error in errors if error.se > 0]
    if not known:
        return 1.0
    variance = sum(error.se**2 for error in known)
    df = variance**2 / sum(error.se**4 / error.df for error in known)
    t = sum(error.mean for error in errors) / variance**0.5
    return float(2 * stats.t.sf(abs(t), df))


def _recipes(tasks: Sequence[Scores], points: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """Accuracy of each recipe at each budget over items and seeds; empty where no recipe was trained with two seeds."""
    groups: dict[tuple[str, str, int | None], list[int]] = {}
    for at, point in enumerate(points):
        if point.recipe and point.seed is not None:
            groups.setdefault((point.recipe, point.stage, point.tokens), []).append(at)
    rows: list[dict[str, Any]] = [
        {"recipe": recipe, "stage": stage, "tokens": tokens, "seeds": len(members), "of": "this recipe (items x seeds)"}
        for (recipe, stage, tokens), members in groups.items()
    ]
    for mode in (LOGLIKELIHOOD, GENERATION):
        parts: list[list[Interval]] = [[] for _ in rows]
        for task in tasks:
            values = task.primary if mode == LOGLIKELIHOOD else task.generation
            cells = [values[members] for members in groups.values()]
            variance = pooled(cells)
            if variance is None:
                return []
            for own, cell in zip(parts, cells, strict=True):
                own.append(recipe_interval(cell, variance))
            df = variance.df
        for row, own in zip(rows, parts, strict=True):
            row[mode] = {**plain(macro(own)), "seed_df": df}
    return rows
