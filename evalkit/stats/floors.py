"""Floors: what one scores on a task without the skill it asks for. A model below its floor shows no signal."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from evalkit.records import LOGLIKELIHOOD, ItemRecord, Mode, TaskEntry
from evalkit.scoring import decide
from evalkit.selection import digest
from evalkit.stats.intervals import Interval, mean_t, wilson


def loglikelihood_floors(records: Sequence[ItemRecord], entry: TaskEntry) -> dict[str, float]:
    """chance, always the same position, and this model's accuracy without the question."""
    floors = {"chance": _chance(records), "position": _position(records)}
    blind = [_blind_right(record, entry) for record in records]
    known = [right for right in blind if right is not None]
    if known:
        floors["blind"] = sum(known) / len(known)
    return floors


def generation_floors(records: Sequence[ItemRecord], entry: TaskEntry) -> dict[str, float]:
    """With the options in sight chance and position; else what always saying one and the same answer scores."""
    if entry.listed:
        return {"chance": _chance(records), "position": _position(records)}
    answers = Counter(record.choices[record.gold].casefold() for record in records)
    return {"constant": max(answers.values()) / len(records)}


def _chance(records: Sequence[ItemRecord]) -> float:
    return sum(1 / len(record.choices) for record in records) / len(records)


def _position(records: Sequence[ItemRecord]) -> float:
    return max(Counter(record.gold for record in records).values()) / len(records)


def _blind_right(record: ItemRecord, entry: TaskEntry) -> bool | None:
    """Whether the choices alone, ranked without the question, give the gold away."""
    outcome = record.outcome(LOGLIKELIHOOD, entry.loglikelihood)
    if outcome is None or not outcome.blind:
        return None
    alone = replace(outcome, logprobs=outcome.blind, blind=())
    lengths = "raw" if entry.normalisation == "pmi" else entry.normalisation
    return decide(alone, record.gold, record.choices, lengths, record.also).outcome == "correct"


FEWEST_DECIDING = 20
"""With fewer items in either half all of them decide: half of 30 says too little."""


def deciding(records: Sequence[ItemRecord]) -> list[bool]:
    """Which items decide whether a cell carries signal: a fixed half, by hash of the cluster, the same for every model.

    A cell that is kept because its teacher happened to score high looks worse for the student than it is; deciding on
    a part of the items, whatever they score, keeps most of that out. All decide where a half would be under 20 items.
    """
    task = records[0].task if records else ""
    return deciding_clusters(task, [record.cluster or record.item for record in records])


def deciding_clusters(task: str, clusters: Sequence[str]) -> list[bool]:
    """The same of items whose clusters are known, item by item."""
    half = [digest("signal", task, cluster) % 2 == 0 for cluster in clusters]
    if min(sum(half), len(half) - sum(half)) < FEWEST_DECIDING:
        return [True] * len(clusters)
    return half


def has_signal(records: Sequence[ItemRecord], entry: TaskEntry, mode: Mode) -> bool:
    """Whether the lower bound of the model's accuracy is above its highest floor, on the items that decide."""
    kept = [record for record, decides in zip(records, deciding(records), strict=True) if decides]
    rights = [_right(record, mode, entry) for record in kept]
    find = loglikelihood_floors if mode == LOGLIKELIHOOD else generation_floors
    return accuracy(rights, [record.cluster or record.item for record in kept]).low > max(find(kept, entry).values())


def _right(record: ItemRecord, mode: Mode, entry: TaskEntry) -> bool:
    outcome = record.outcome(mode, entry.view(mode))
    return outcome is not None and outcome.outcome == "correct"


def accuracy(rights: Sequence[bool], clusters: Sequence[str]) -> Interval:
    """Wilson's interval, or clustered t where items share a cluster."""
    if len(set(clusters)) == len(rights):
        return wilson(sum(rights), len(rights))
    found = mean_t([float(right) for right in rights], clusters)
    return replace(found, low=max(0.0, found.low))
