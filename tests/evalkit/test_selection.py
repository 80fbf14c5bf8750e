"""Which items, examples and orders of options a run gets: the same everywhere."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalkit.records import Item
from evalkit.registry import Task
from evalkit.selection import Selection, digest, lowest, rotations, select, shuffled
from evalkit.settings import Settings


def items(n: int, name: str = "item", strata: int = 1) -> list[Item]:
    return [
        Item(
            id=f"{name}-{i:03d}",
            question=f"{name} {i}?",
            choices=(f"right {i}", "wrong", "bad", "poor"),
            gold=0,
            stratum=f"stratum {i % strata}",
        )
        for i in range(n)
    ]


def task(scored: list[Item], pool: list[Item] | None = None, **fields: Any) -> Task:
    return Task(
        name="made",
        items=lambda _: scored,
        pool=None if pool is None else lambda _: pool,
        views=("cloze",),
        loglikelihood="cloze",
        generation="cloze",
        **fields,
    )


def selected(of: Task, **settings: Any) -> Selection:
    return select(of, Settings(**settings), None)


def ids(found: Any) -> list[str]:
    return [item.id for item in found]


# --- limit ---------------------------------------------------------------------------------------------------------


@given(st.permutations(items(40)), st.integers(1, 40), st.integers(1, 40))
def test_a_smaller_limit_is_a_subset_of_a_larger_one_in_any_order(order: list[Item], one: int, other: int) -> None:
    low, high = sorted((one, other))
    small, large = (selected(task(order), limit=n).items for n in (low, high))
    assert len(small) == low and len(large) == high
    assert set(ids(small)) <= set(ids(large))
    assert set(ids(small)) == set(ids(selected(task(items(40)), limit=low).items))
    assert ids(large) == [item.id for item in order if item in large], "in the task's own order"


def test_a_limit_beyond_the_end_takes_all() -> None:
    assert ids(selected(task(items(5)), limit=99).items) == ids(items(5))


def test_an_item_more_changes_the_subset_by_one_at_most() -> None:
    before, after = (set(ids(lowest(items(n), 10, "salt"))) for n in (40, 41))
    assert len(before - after) <= 1


def test_the_subset_is_no_prefix_and_depends_on_the_task() -> None:
    chosen = ids(selected(task(items(100)), limit=10).items)
    assert chosen != ids(items(10))
    assert chosen != ids(selected(replace(task(items(100)), name="other"), limit=10).items)


# --- examples ------------------------------------------------------------------------------------------------------


def test_examples_come_from_the_pool_and_are_the_same_for_every_item() -> None:
    found = selected(task(items(10), items(30, "pool")), shots=4)
    assert ids(found.items) == ids(items(10)), "none is left out"
    examples = {tuple(ids(found.examples(item))) for item in found.items}
    assert len(examples) == 1
    [four] = examples
    assert len(four) == 4 and all(name.startswith("pool-") for name in four)


def test_no_shots_read_no_pool() -> None:
    def unread(_: Path | None) -> list[Item]:
        raise AssertionError("the pool was read")

    found = select(replace(task(items(3)), pool=unread), Settings(), None)
    assert found.examples(found.items[0]) == []


@given(st.integers(0, 5), st.integers(0, 19), st.booleans())
def test_an_example_is_never_the_scored_item(shots: int, twin: int, renamed: bool) -> None:
    """One question stands in both splits, maybe under another id and with its options in another order."""
    pool = items(20, "pool")
    leak = shuffled(pool[twin], 3)
    leak = replace(leak, id="leak") if renamed else leak
    found = selected(task([*items(5), leak], pool), shots=shots)
    for item in found.items:
        examples = found.examples(item)
        assert len(examples) == shots
        assert all(example.question != item.question for example in examples)


def test_equal_questions_with_other_choices_are_other_items() -> None:
    one = Item(id="one", question="Which is true?", choices=("a", "b"), gold=0)
    other = replace(one, id="other", choices=("c", "d"))
    found = selected(task([one], [other]), shots=1)
    assert ids(found.examples(one)) == ["other"]


def test_a_task_without_a_pool_leaves_its_examples_out() -> None:
    for pool in (None, []):
        found = selected(task(items(20), pool), shots=5)
        examples = ids(found.examples(found.items[0]))
        assert len(examples) == 5 and len(found.items) == 15
        assert not set(examples) & set(ids(found.items))
        assert {tuple(ids(found.examples(item))) for item in found.items} == {tuple(examples)}


def test_a_limit_leaves_the_examples_as_they_are() -> None:
    whole, part = (selected(task(items(20)), shots=5, limit=limit) for limit in (None, 3))
    assert ids(whole.examples(whole.items[0])) == ids(part.examples(part.items[0]))
    assert set(ids(part.items)) <= set(ids(whole.items)) and len(part.items) == 3


def test_examples_by_stratum_are_the_items_own_in_the_pools_order() -> None:
    pool = items(12, "pool", strata=3)
    found = selected(task(items(9, strata=3), pool, shots_by_stratum=True, shots=4))
    for item in found.items:
        assert found.examples(item) == [x for x in pool if x.stratum == item.stratum]
    two = selected(task(items(9, strata=3), pool, shots_by_stratum=True), shots=2)
    assert ids(two.examples(two.items[1])) == ["pool-001", "pool-004"]


def test_examples_by_stratum_come_from_the_items_where_there_is_no_pool() -> None:
    found = selected(task(items(30, strata=3), [], shots_by_stratum=True), shots=2)
    assert len(found.items) == 30 - 3 * 2
    for item in found.items:
        examples = found.examples(item)
        assert len(examples) == 2 and {x.stratum for x in examples} == {item.stratum}
        assert not set(ids(examples)) & set(ids(found.items))


def test_a_stratum_without_a_spare_example_has_one_fewer_rather_than_the_item_itself() -> None:
    pool = items(6, "pool", strata=3)
    found = selected(task([replace(pool[0], id="leak"), *items(3, strata=3)], pool, shots_by_stratum=True), shots=2)
    assert [len(found.examples(item)) for item in found.items] == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("of", "settings", "message"),
    [
        (task([*items(3), items(1)[0]]), {}, "task 'made': two items have the id 'item-000'; ids must be unique"),
        (task([]), {}, "task 'made' has no items"),
        (task(items(3), items(2, "pool")), {"shots": 3}, "task 'made' has 2 examples, fewer than 3 shots"),
        (task(items(3)), {"shots": 4}, "task 'made' has 3 examples, fewer than 4 shots"),
        (task(items(3)), {"shots": 3}, "all its items became few-shot examples; use fewer than 3 shots"),
        (
            task([*items(9), replace(items(1, "lone")[0], stratum="small")], [], shots_by_stratum=True),
            {"shots": 1},
            "task 'made': all items of 'small' became examples; use fewer shots",
        ),
        (
            task(items(4, strata=2), items(3, "pool", strata=2), shots_by_stratum=True),
            {"shots": 2},
            "task 'made' has 1 examples for 'stratum 1', fewer than 2 shots",
        ),
    ],
)
def test_what_is_missing_is_named(of: Task, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selected(of, **settings)


# --- order of options ----------------------------------------------------------------------------------------------


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=8), st.data(), st.integers(0, 99))
def test_shuffling_keeps_the_gold_text_and_every_option(choices: list[str], data: Any, seed: int) -> None:
    gold = data.draw(st.integers(0, len(choices) - 1))
    item = Item(id="x", question="?", choices=tuple(choices), gold=gold)
    mixed = shuffled(item, seed)
    assert mixed.answer == item.answer
    assert Counter(mixed.choices) == Counter(item.choices)
    assert (mixed.id, mixed.question) == (item.id, item.question)
    assert shuffled(item, seed) == mixed


def test_shuffling_spreads_the_gold_answer_and_follows_the_seed() -> None:
    golds = [Counter(shuffled(item, seed).gold for item in items(400)) for seed in (0, 1)]
    assert all(60 < golds[seed][place] < 140 for seed in (0, 1) for place in range(4))
    assert [shuffled(item, 0).gold for item in items(50)] != [shuffled(item, 1).gold for item in items(50)]


def test_options_are_shuffled_only_where_the_task_or_the_user_says_so() -> None:
    kept, mixed = selected(task(items(20))), selected(task(items(20), shuffle=True))
    assert all(item.gold == 0 for item in kept.items)
    assert {item.gold for item in mixed.items} == {0, 1, 2, 3}
    assert selected(task(items(20)), shuffle_seed=0).items == mixed.items
    assert selected(task(items(20), shuffle=True), shuffle_seed=1).items != mixed.items


def test_examples_are_shuffled_like_the_items() -> None:
    found = selected(task(items(5), items(20, "pool"), shuffle=True), shots=8)
    assert {example.gold for example in found.examples(found.items[0])} != {0}


def test_the_choice_of_items_and_orders_is_the_same_under_every_hash_seed() -> None:
    code = (
        "from tests.evalkit.test_selection import items, task, selected, ids;"
        "found = selected(task(items(50), shuffle=True), shots=3, limit=10);"
        "print(ids(found.items), ids(found.examples(found.items[0])), [i.gold for i in found.items])"
    )
    root = Path(__file__).resolve().parents[2]
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "12345")
    }
    assert len(said) == 1
    found = selected(task(items(50), shuffle=True), shots=3, limit=10)
    assert said == {f"{ids(found.items)} {ids(found.examples(found.items[0]))} {[item.gold for item in found.items]}\n"}


def test_the_hash_is_pinned() -> None:
    """Changing it would change the items of every published run."""
    assert digest("a", 1) == 9484037261928657086  # the first 8 bytes of SHA-256 of b"a\x1f1"
    assert ids(lowest(items(100), 5, "limit made")) == ["item-019", "item-047", "item-063", "item-074", "item-097"]


def test_permutations_put_every_option_in_every_place_once_and_share_a_cluster() -> None:
    item = Item(id="i", question="q?", choices=("a", "b", "c", "d"), gold=1)
    turned = rotations(item, 4)
    assert [x.id for x in turned] == ["i", "i~1", "i~2", "i~3"] and {x.cluster for x in turned} == {"i"}
    assert {x.answer for x in turned} == {"b"} and sorted(x.gold for x in turned) == [0, 1, 2, 3]
    for place in range(4):
        assert {x.choices[place] for x in turned} == {"a", "b", "c", "d"}
    assert rotations(item, 1) == [item] and len(rotations(item, 9)) == 4
    passage = Item(id="i", question="q?", choices=("a", "b"), gold=0, cluster="passage")
    assert {x.cluster for x in rotations(passage, 2)} == {"passage"}
