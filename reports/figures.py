"""The figures of compare.json, each computed once and read by every report."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from evalkit.encoding import CLOSE
from evalkit.records import (
    GENERATION,
    LOGLIKELIHOOD,
    MODES,
    NORMALISATIONS,
    VERDICTS,
    ItemRecord,
    Mode,
    Outcome,
    TaskEntry,
)
from evalkit.scoring import can_normalise, decide
from evalkit.stats.floors import accuracy, deciding, generation_floors, has_signal, loglikelihood_floors
from evalkit.stats.intervals import Interval, macro, mean_t, wilson
from evalkit.stats.units import log_odds, penalty, verdict
from evalkit.store import Run
from reports.pairing import Gaps, Paired, formulas_of, gaps_of, hidden_steps, outcomes_of, rights_of, view_of
from reports.why import answers, divergence, flows, loss_test, modes_agree, plain, recovered, step_test

CLOSED_BLOCK = "a closed empty thinking block"


def _maybe(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else plain(interval)


def task_result(name: str, paired: Paired, gaps: Gaps, formula: Gaps, rules: str) -> dict[str, Any]:
    entry = paired.teacher_entry
    teachers = [teacher for teacher, _ in paired.pairs]
    modes: dict[str, Any] = {}
    for mode in gaps.gaps:
        floors = _floors(paired, mode)
        outcomes = outcomes_of(paired, mode)
        teacher, student = (_accuracy([pair[side] for pair in outcomes], paired.clusters) for side in (0, 1))
        own = _loglikelihood_only(paired) if mode == LOGLIKELIHOOD else {"rules": rules}
        modes[mode] = {
            "view": view_of(paired, mode),
            **own,
            "floor": max(floors["teacher"].values()),
            "floors": floors,
            "teacher": teacher,
            "student": student,
            "gap": plain(gaps.gaps[mode]),
            "log_odds": plain(log_odds(teacher["accuracy"], student["accuracy"], gaps.gaps[mode])),
            "formula": {**_formula_means(paired, mode), "gap": plain(formula.gaps[mode])},
            **loss_test(paired, mode),
            **answers(paired, mode),
        }
    decide_on = deciding(teachers)
    return {
        "name": name,
        "version": entry.version,
        "n": len(paired.pairs),
        "clusters": len(set(paired.clusters)),
        "shots": entry.shots,
        "signal": {mode: has_signal(teachers, entry, mode) for mode in gaps.gaps},
        "signal_items": sum(decide_on),
        "modes": modes,
        "hidden_gap": _between(gaps.hidden, formula.hidden, paired) if gaps.one_view else None,
        "protocol_gap": _protocol(paired, gaps, formula),
        "recovery": recovered(paired),
        "flows": flows(paired),
        "agreement": modes_agree(paired),
        "divergence": divergence(paired),
        "strata": {"of": entry.strata, "rows": _strata(paired)} if entry.strata else None,
    }


def _formula_means(paired: Paired, mode: Mode) -> dict[str, Any]:
    scores = formulas_of(paired, mode)
    bound = 1 + max(penalty(record) for record, _ in paired.pairs)
    return {
        who: plain(mean_t([pair[side] for pair in scores], paired.clusters, bound=bound))
        for side, who in enumerate(("teacher", "student"))
    }


def _between(raw: Interval | None, formula: Interval | None, paired: Paired) -> dict[str, Any] | None:
    """A gap between the modes after the same bytes, in both units, with what they allow one to say."""
    if raw is None or formula is None:
        return None
    return {
        **plain(raw),
        "formula": plain(formula),
        "verdict": verdict(raw, formula),
        **step_test(hidden_steps(paired), paired.clusters),
    }


def _protocol(paired: Paired, gaps: Gaps, formula: Gaps) -> dict[str, Any] | None:
    """With its two parts; what it says is of the protocol, and only the mode's part is a hidden gap."""
    if gaps.protocol is None or formula.protocol is None or gaps.one_view:
        return None
    parts = {"mode": _maybe(formula.hidden), "view": _maybe(formula.view_shift)}
    return {
        **plain(gaps.protocol),
        "formula": {**plain(formula.protocol), "parts": parts},
        "verdict": verdict(gaps.protocol, formula.protocol),
        "parts": {"mode": _between(gaps.hidden, formula.hidden, paired), "view": _maybe(gaps.view_shift)},
    }


def _loglikelihood_only(paired: Paired) -> dict[str, Any]:
    """The primary normalisation, accuracy under each of them, and whether a closed thinking block came before."""
    accuracies: dict[str, Any] = {}
    pairs = outcomes_of(paired, LOGLIKELIHOOD)
    for normalisation in NORMALISATIONS:
        if not all(can_normalise(outcome, normalisation) for two in pairs for outcome in two):
            continue
        rights = [0, 0]
        for (t, s), (record, _) in zip(pairs, paired.pairs, strict=True):
            for side, outcome in enumerate((t, s)):
                ranked = decide(outcome, record.gold, record.choices, normalisation, record.also)
                rights[side] += ranked.outcome == "correct"
        accuracies[normalisation] = {"teacher": rights[0] / len(pairs), "student": rights[1] / len(pairs)}
    return {
        "normalisation": paired.teacher_entry.normalisation,
        "normalisations": accuracies,
        "after": CLOSED_BLOCK if _after_closed_block(paired) else "",
    }


def _after_closed_block(paired: Paired) -> bool:
    """Log-likelihood was scored behind a thinking block that evalkit or the chat template left empty and closed."""
    view = view_of(paired, LOGLIKELIHOOD)
    return any(record.prompts.get(view, "").rstrip().endswith(CLOSE) for pair in paired.pairs for record in pair)


def _strata(paired: Paired) -> list[dict[str, Any]]:
    """Accuracy of both models in each scored mode, stratum by stratum; no claim is made on them."""
    rows = []
    for stratum in sorted({t.stratum for t, _ in paired.pairs}, key=_natural):
        part = replace(paired, pairs=tuple(pair for pair in paired.pairs if pair[0].stratum == stratum))
        row: dict[str, Any] = {"stratum": stratum, "n": len(part.pairs), "modes": {}}
        for mode in MODES:
            rights = rights_of(part, mode)
            if rights:
                sums = [sum(side) / len(rights) for side in zip(*rights, strict=True)]
                row["modes"][mode] = {"teacher": sums[0], "student": sums[1]}
        rows.append(row)
    return rows


def _natural(text: str) -> list[tuple[int, int, str]]:
    """8 before 16."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]


def _floors(paired: Paired, mode: Mode) -> dict[str, dict[str, float]]:
    find: Callable[[Sequence[ItemRecord], TaskEntry], dict[str, float]]
    find = loglikelihood_floors if mode == LOGLIKELIHOOD else generation_floors
    teachers, students = zip(*paired.pairs, strict=True)
    return {"teacher": find(teachers, paired.teacher_entry), "student": find(students, paired.student_entry)}


def _accuracy(outcomes: Sequence[Outcome], clusters: Sequence[str]) -> dict[str, Any]:
    """Accuracy over all items and over those with a readable answer; how often each outcome came."""
    counts = Counter(outcome.outcome for outcome in outcomes)
    n = len(outcomes)
    assert sum(counts[verdict] for verdict in VERDICTS) == n, "an outcome of no known kind"
    overall = accuracy([outcome.outcome == "correct" for outcome in outcomes], clusters)
    read = counts["correct"] + counts["wrong"]
    parsed = wilson(counts["correct"], read) if read else None
    return {
        "accuracy": overall.mean,
        "ci95": [overall.low, overall.high],
        "outcomes": {verdict: counts[verdict] for verdict in VERDICTS},
        "parsed": None if parsed is None else {"accuracy": parsed.mean, "ci95": [parsed.low, parsed.high], "n": read},
    }


def overall(tasks: Sequence[dict[str, Any]], gaps: dict[str, Gaps], formulas: dict[str, Gaps]) -> dict[str, Any]:
    """Equal-weight averages over the tasks with signal in every scored mode, in raw points and in formula scores; each
    gap between the modes over those of them that have it, beside the modes' gaps over the same tasks."""
    used = [task for task in tasks if all(task["signal"].values())]
    result: dict[str, Any] = {
        "tasks": [task["name"] for task in used],
        "left_out": [task["name"] for task in tasks if task not in used],
        "modes": {},
        "hidden_gap": None,
        "protocol_gap": None,
    }

    def average(names: Sequence[str], mode: Mode, of: dict[str, Gaps]) -> dict[str, Any]:
        return plain(macro([of[name].gaps[mode] for name in names]))

    for mode in MODES:
        if used and all(mode in task["modes"] for task in used):
            cells = [task["modes"][mode] for task in used]
            result["modes"][mode] = {
                **{who: _mean_accuracy([cell[who] for cell in cells]) for who in ("teacher", "student")},
                "gap": average(result["tasks"], mode, gaps),
                "formula_gap": average(result["tasks"], mode, formulas),
            }
    for kind in ("hidden_gap", "protocol_gap"):
        names = [task["name"] for task in used if task[kind]]
        raw, formula = (_macro_between([of[name] for name in names], kind) for of in (gaps, formulas))
        if raw and formula:
            result[kind] = {
                **plain(raw),
                "formula": {
                    **plain(formula),
                    "gaps": {mode: average(names, mode, formulas) for mode in MODES},
                },
                "verdict": verdict(raw, formula),
                "tasks": names,
                "gaps": {mode: average(names, mode, gaps) for mode in MODES},
            }
    return result


def held_out(paired: dict[str, Paired], names: Sequence[str]) -> dict[str, Any] | None:
    """The averages again, over the items that did not decide which tasks carry signal; None where all items decided in
    one of the tasks."""
    rest: list[Gaps] = []
    for name in names:
        kept = deciding([teacher for teacher, _ in paired[name].pairs])
        if all(kept):
            return None
        pairs = tuple(pair for pair, decides in zip(paired[name].pairs, kept, strict=True) if not decides)
        rest.append(gaps_of(replace(paired[name], pairs=pairs)))
    if not rest:
        return None
    modes = [mode for mode in MODES if all(mode in gaps.gaps for gaps in rest)]
    return {
        "items": sum(next(iter(gaps.gaps.values())).n for gaps in rest),
        "gaps": {mode: plain(macro([gaps.gaps[mode] for gaps in rest])) for mode in modes},
        "hidden_gap": _maybe(_macro_between([gaps for gaps in rest if gaps.one_view], "hidden_gap")),
    }


def _macro_between(found: Sequence[Gaps], kind: str) -> Interval | None:
    parts = [gap.hidden if kind == "hidden_gap" else gap.protocol for gap in found]
    known = [part for part in parts if part is not None]
    return macro(known) if known else None


def _mean_accuracy(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    parts = [Interval(mean=cell["accuracy"], low=cell["ci95"][0], high=cell["ci95"][1], n=0) for cell in cells]
    found = macro(parts)
    return {"accuracy": found.mean, "ci95": [found.low, found.high]}


def model_result(run: Run) -> dict[str, Any]:
    model = run.manifest.model
    probe = (run.manifest.checkpoint or {}).get("probe")
    return {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "note": model.note,
        "dtype": model.dtype,
        "device": model.device,
        "parameters": model.parameters,
        "run": "" if run.path is None else str(run.path),
        "versions": run.manifest.versions,
        **({"probe": probe} if probe else {}),
    }


def notes(paired: dict[str, Paired], only: Sequence[str]) -> list[str]:
    """What a reader must know before believing the figures."""
    notes = [f"Only one run holds the task {name!r}; it is left out." for name in only]
    for name, p in paired.items():
        if p.left_out:
            notes.append(f"{name}: {p.left_out} items are in one run only and are left out.")
        if p.other_prompt:
            notes.append(
                f"{name}: the prompts of {p.other_prompt} of {len(p.pairs)} items differ between the models "
                f"(chat templates?)."
            )
        if _after_closed_block(p):
            notes.append(f"{name}: log-likelihood was scored after {CLOSED_BLOCK}.")
        for side, who in enumerate(("teacher", "student")):
            said = [outcome for pair in p.pairs if (outcome := pair[side].outcome(GENERATION, view_of(p, GENERATION)))]
            in_thought = sum(o.outcome == "truncated" and o.cut_in == "thought" for o in said)
            if in_thought:
                notes.append(
                    f"{name}: {in_thought} replies of the {who} were truncated in the thought, not in the answer."
                )
            cut = [pair[side].cut for pair in p.pairs if pair[side].cut]
            if cut:
                notes.append(
                    f"{name}: {len(cut)} prompts were cut on the left for the {who}'s window (up to {max(cut)} tokens)."
                )
    return notes
