"""Which items are scored, in which order their options stand, and which examples come before them.

All by stable hash: the same for every model, machine and Python, and a smaller limit is a subset of a larger one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from evalkit.records import Item
from evalkit.registry import Task
from evalkit.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The items of one task that a run scores, and the pool its few-shot examples come from."""

    items: tuple[Item, ...]
    pool: tuple[Item, ...]
    """The examples of every item, and behind them one to spare for the item that is an example itself."""
    shots: int
    by_stratum: bool

    def examples(self, item: Item) -> list[Item]:
        """The few-shot examples before ``item``: never the item itself, whatever id it has in the pool.

        Where there is no example to spare for it, the item has one fewer.
        """
        pool = (x for x in self.pool if not self.by_stratum or x.stratum == item.stratum)
        return list(islice((x for x in pool if not _same(x, item)), self.shots))


def select(task: Task, settings: Settings, data_dir: Path | None) -> Selection:
    """Read ``task``'s items and choose; ValueError names what is missing."""
    items = list(task.items(data_dir))
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"task {task.name!r}: two items have the id {item.id!r}; ids must be unique")
        seen.add(item.id)
    if not items:
        raise ValueError(f"task {task.name!r} has no items")
    shots = task.shots if settings.shots is None else settings.shots
    if any(item.native for item in items):  # the examples came with each item
        shots = 0
    pool = list(task.pool(data_dir)) if shots and task.pool is not None else []
    strata = sorted({item.stratum for item in items})
    salt = f"shots {task.name}"
    if pool and not task.shots_by_stratum:
        first = lowest(pool, shots, salt)
        kept = set(map(id, first))
        pool = [*first, *lowest([item for item in pool if id(item) not in kept], 1, salt)]
    elif shots and not pool:  # no split of their own: they come from the items, and are not scored
        groups = [[x for x in items if x.stratum == s] for s in strata] if task.shots_by_stratum else [items]
        pool = [item for group in groups for item in lowest(group, shots, salt)]
        examples = {item.id for item in pool}
        items = [item for item in items if item.id not in examples]
    if task.shots_by_stratum and shots:
        for stratum in strata:
            found = sum(x.stratum == stratum for x in pool)
            if found < shots:
                raise ValueError(f"task {task.name!r} has {found} examples for {stratum!r}, fewer than {shots} shots")
            if not any(item.stratum == stratum for item in items):
                raise ValueError(f"task {task.name!r}: all items of {stratum!r} became examples; use fewer shots")
    elif len(pool) < shots:
        raise ValueError(f"task {task.name!r} has {len(pool)} examples, fewer than {shots} shots")
    if settings.limit is not None:
        items = lowest(items, settings.limit, f"limit {task.name}")
    if not items:
        raise ValueError(f"task {task.name!r}: all its items became few-shot examples; use fewer than {shots} shots")
    seed = settings.shuffle_seed if settings.shuffle_seed is not None else (0 if task.shuffle else None)
    if (seed is not None or settings.permutations > 1) and any(item.native and item.native.listed for item in items):
        raise ValueError(
            f"task {task.name!r} lists its options in a text that is given, so their order can't be changed; "
            f"leave --shuffle-seed and --permutations out"
        )
    if seed is not None:
        items, pool = ([shuffled(item, seed) for item in group] for group in (items, pool))
    items = [turned for item in items for turned in rotations(item, settings.permutations)]
    return Selection(items=tuple(items), pool=tuple(pool), shots=shots, by_stratum=task.shots_by_stratum)


def digest(*parts: object) -> int:
    """A hash that is the same everywhere (Python's own is salted)."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def lowest(items: Sequence[Item], n: int, salt: str) -> list[Item]:
    """The ``n`` items with the lowest hash, in their own order."""
    kept = set(lowest_ids([item.id for item in items], n, salt))
    return [item for item in items if item.id in kept]


def lowest_ids(ids: Sequence[str], n: int, salt: str) -> list[str]:
    """The same of items' ids."""
    kept = set(sorted(ids, key=lambda one: (digest(salt, one), one))[:n])
    return [one for one in ids if one in kept]


def first_of(ids: Sequence[str], limit: int | None, task: str, permutations: int) -> list[str]:
    """Of a run's items those that a run with ``limit`` would hold; one in several orders of its options counts once."""
    if limit is None:
        return list(ids)
    base = {one: one.rpartition(TURNED)[0] if permutations > 1 and TURNED in one else one for one in ids}
    kept = set(lowest_ids(list(dict.fromkeys(base.values())), limit, f"limit {task}"))
    return [one for one in ids if base[one] in kept]


def _same(a: Item, b: Item) -> bool:
    """One question, whatever its id and the order of its options."""
    return a.question == b.question and a.passage == b.passage and sorted(a.choices) == sorted(b.choices)


def shuffled(item: Item, seed: int) -> Item:
    """``item`` with its options in an order drawn from its id and ``seed``."""
    order = sorted(range(len(item.choices)), key=lambda i: digest("options", seed, item.id, i))
    return reordered(item, order)


def reordered(item: Item, order: Sequence[int]) -> Item:
    """``item`` with choice ``order[0]`` first, and so on."""
    return replace(
        item,
        choices=tuple(item.choices[i] for i in order),
        gold=order.index(item.gold),
        also=tuple(order.index(i) for i in item.also),
    )


def rotations(item: Item, number: int) -> list[Item]:
    """``item`` with its options rotated 0, 1, ... places: in as many orders as it has options every option stands once
    in every place. At most ``number`` of them, and no more than there are options. They share the item's cluster."""
    n = len(item.choices)
    turned = [
        replace(
            reordered(item, [*range(k, n), *range(k)]),
            id=f"{item.id}{TURNED}{k}" if k else item.id,
            cluster=item.cluster or item.id,
        )
        for k in range(min(number, n))
    ]
    return turned if number > 1 else [item]


TURNED = "~"
"""Stands in a rotated item's id between the item's own and the places it was rotated by."""
