"""Beside each gap: tests, what could be seen at all, where the loss comes from, and what to know of the answers."""

import os
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from evalkit.records import GENERATION, LOGLIKELIHOOD, MODES, Mode, Outcome
from evalkit.selection import TURNED
from evalkit.stats.agreement import flips, histogram, kappa
from evalkit.stats.clustered import FEW, mean_error, sums, wild_bootstrap
from evalkit.stats.flows import net_flows
from evalkit.stats.intervals import Interval, mean_t, wilson
from evalkit.stats.mass import masses
from evalkit.stats.paired_tests import holm, mcnemar, sign_flip
from evalkit.stats.power import detectable_loss, detectable_mean, items_for_loss, items_for_mean
from evalkit.stats.recovery import recovery, recovery_bootstrap
from reports.pairing import Paired, discordant, formulas_of, losses, outcomes_of, rights_of, view_of

FAMILIES = ("loss by loglikelihood", "loss by generation", "hidden gap")
"""Holm's correction runs within each, over the tasks with signal; every other figure is exploratory."""


def plain(interval: Interval) -> dict[str, Any]:
    return {"mean": interval.mean, "ci95": [interval.low, interval.high]}


def _clustered(paired: Paired) -> bool:
    return len(set(paired.clusters)) < len(paired.pairs)


def loss_test(paired: Paired, mode: Mode) -> dict[str, Any]:
    """The test of no loss, what it could have found, and how many items a loss of this size needs."""
    rights = rights_of(paired, mode)
    lost, gained = discordant(rights)
    n = len(rights)
    volume, direction = flips(lost, gained, n)
    flipped = {"lost": lost, "gained": gained, "volume": volume, "direction": direction}
    if not _clustered(paired):
        exact, mid = mcnemar(lost, gained)
        return {
            "flips": flipped,
            "test": {"name": "McNemar exact", "p": exact, "mid_p": mid, "holm_p": None},
            "detectable": detectable_loss(n, volume),
            "items_needed": items_for_loss(lost, gained, n),
        }
    steps = losses(rights)
    return {"flips": flipped, **_clustered_test(steps, paired.clusters)}


def step_test(steps: Sequence[int], clusters: Sequence[str]) -> dict[str, Any]:
    """The same for differences between the modes: a sign-flip test, of clusters where items have them."""
    return _clustered_test(steps, clusters)


def _clustered_test(steps: Sequence[int], clusters: Sequence[str]) -> dict[str, Any]:
    error = mean_error(steps, clusters)
    totals, _ = sums(np.asarray(steps, dtype=float), clusters)
    name = "cluster sign-flip" if error.clusters < len(steps) else "sign-flip"
    found: dict[str, Any] = {
        "test": {"name": name, "p": sign_flip([round(t) for t in totals]), "holm_p": None},
        "detectable": detectable_mean(error),
        "items_needed": items_for_mean(error, len(steps)),
    }
    if 4 <= error.clusters < min(FEW, len(steps)):
        low, high = wild_bootstrap(np.asarray(steps), clusters)
        found["wild_ci95"] = [max(-2.0, low), min(2.0, high)]
    return found


def adjust(tasks: Sequence[dict[str, Any]]) -> None:
    """Fill in Holm's p within each family, over the tasks that carry signal in what the family speaks of."""
    for family in FAMILIES:
        cells = []
        for task in tasks:
            if family == "hidden gap":
                gap = task["hidden_gap"] or (task["protocol_gap"] or {}).get("parts", {}).get("mode")
                if gap and all(task["signal"].values()):
                    cells.append(gap["test"])
            else:
                mode = family.removeprefix("loss by ")
                if task["signal"].get(mode):
                    cells.append(task["modes"][mode]["test"])
        for cell, p in zip(cells, holm([cell["p"] for cell in cells]), strict=True):
            cell["holm_p"] = p
            cell["family"] = family


def recovered(paired: Paired) -> dict[str, Any] | None:
    """Of the teacher's formula score, what the student keeps in each mode; only where the teacher's is above 0 in both
    (or in the one that was scored). ``raw``: S/T of the accuracies, for comparison with published figures."""
    found: dict[str, Any] = {}
    for mode in MODES:
        scores = formulas_of(paired, mode)
        if not scores:
            continue
        sides = [t for t, _ in scores], [s for _, s in scores]
        kept = recovery(*sides, paired.clusters)
        if kept is None:
            return None
        rights = rights_of(paired, mode)
        raw = sum(s for _, s in rights) / max(1, sum(t for t, _ in rights))
        again = recovery_bootstrap(*sides, paired.clusters)
        found[mode] = {**plain(kept), "raw": raw, "keeps_90": kept.low >= 0.9}
        found[mode]["bootstrap_ci95"] = None if again is None else list(again)
    return found


def flows(paired: Paired) -> list[dict[str, Any]] | None:
    """Net flows that add up to generation's loss, the largest first."""
    pairs = [(t.outcome, s.outcome) for t, s in outcomes_of(paired, GENERATION)]
    if not pairs:
        return None
    rows = [
        {"outcome": kind, "lost": lost, "gained": gained, "net": net.mean, "ci95": [net.low, net.high]}
        for kind, (lost, gained, net) in net_flows(pairs, paired.clusters).items()
    ]
    return sorted(rows, key=lambda row: -abs(float(row["net"])))


def modes_agree(paired: Paired) -> dict[str, Any] | None:
    """Per model, how far being right by log-likelihood and by generation go together; in generation's view where
    log-likelihood was scored there."""
    view = view_of(paired, GENERATION)
    generation = rights_of(paired, GENERATION)
    inside = rights_of(paired, LOGLIKELIHOOD, view) or rights_of(paired, LOGLIKELIHOOD)
    if not generation or not inside:
        return None
    found: dict[str, Any] = {}
    for side, who in enumerate(("teacher", "student")):
        pairs = [(ll[side], gen[side]) for ll, gen in zip(inside, generation, strict=True)]
        counts = Counter(pairs)
        k = kappa(pairs)
        found[who] = {
            "kappa": None if k is None else plain(k),
            "loglikelihood_only": counts[True, False],
            "generation_only": counts[False, True],
        }
    return found


def answers(paired: Paired, mode: Mode) -> dict[str, Any]:
    """Which positions are picked (where an answer is a position), and the mass on the choices where each is a token."""
    outcomes = outcomes_of(paired, mode)
    found: dict[str, Any] = {}
    if mode == LOGLIKELIHOOD or paired.teacher_entry.listed:
        width = max(len(record.choices) for record, _ in paired.pairs)
        found["options"] = {
            "gold": histogram([record.gold for record, _ in paired.pairs], width),
            **{
                who: histogram([pair[side].choice for pair in outcomes], width)
                for side, who in enumerate(("teacher", "student"))
            },
        }
    if mode == LOGLIKELIHOOD:
        weight = [_mass([pair[side] for pair in outcomes]) for side in (0, 1)]
        found["mass"] = dict(zip(("teacher", "student"), weight, strict=True)) if any(weight) else None
    turned = [consistency(paired, mode, side) for side in (0, 1)]
    found["permutations"] = dict(zip(("teacher", "student"), turned, strict=True)) if all(turned) else None
    return found


def consistency(paired: Paired, mode: Mode, side: int) -> dict[str, Any] | None:
    """Of the items scored in several orders of their options, the share whose answer is the same text in all of them,
    and the accuracy in each order (how many places the options were rotated by); None: one order only."""
    picked: dict[str, list[tuple[int, str | None, bool]]] = {}
    for pair, outcomes in zip(paired.pairs, outcomes_of(paired, mode), strict=False):
        base, mark, turn = pair[side].item.partition(TURNED)
        chosen = outcomes[side].choice
        text = None if chosen is None else pair[side].choices[chosen]
        picked.setdefault(base, []).append((int(turn) if mark else 0, text, outcomes[side].outcome == "correct"))
    several = [found for found in picked.values() if len(found) > 1]
    if not several:
        return None
    same = sum(len({text for _, text, _ in found}) == 1 and found[0][1] is not None for found in several)
    orders: dict[int, list[bool]] = {}
    for found in several:
        for place, _, right in found:
            orders.setdefault(place, []).append(right)
    return {
        "items": len(several),
        "same": plain(wilson(same, len(several))),
        "accuracy": [sum(rights) / len(rights) for _, rights in sorted(orders.items())],
    }


def _mass(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    found = masses(outcomes)
    return {**plain(mean_t(found)), "n": len(found)} if found else None


def divergence(paired: Paired) -> dict[str, Any] | None:
    """How soon the replies part: the share that are equal; of the others the median characters in common, and the
    median place (from 0) of the first word that differs. Words stand for tokens: runs keep the text of a reply, and two
    models need not share a tokenizer."""
    pairs = [(t.reply, s.reply) for t, s in outcomes_of(paired, GENERATION)]
    if not pairs:
        return None
    other = [pair for pair in pairs if pair[0] != pair[1]]
    common = [len(os.path.commonprefix(pair)) for pair in other]
    words = [len(os.path.commonprefix([reply.split() for reply in pair])) for pair in other]
    return {
        "same": 1 - len(common) / len(pairs),
        "characters": float(statistics.median(common)) if common else None,
        "words": float(statistics.median(words)) if words else None,
    }
