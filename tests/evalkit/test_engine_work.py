"""The order of the work: every prompt once, common prefixes once, batches within their limits."""

import itertools
import random
from collections.abc import Sequence

import pytest

from evalkit.engines.work import Group, Job, Limits, Queue, Tree, groups_of, jobs_of
from evalkit.records import Generation, Request

Tokens = tuple[int, ...]


def random_prompts(seed: int, number: int) -> list[Tokens]:
    """Different prompts that grow from each other, so that prefixes are shared at many depths."""
    rng = random.Random(seed)
    prompts: set[Tokens] = {(1,)}
    while len(prompts) < number:
        start = rng.choice(sorted(prompts))
        kept = start[: rng.randint(0, len(start))]
        prompts.add((*kept, *(rng.randint(1, 3) for _ in range(rng.randint(1, 6)))))
    return sorted(prompts)


def saved(groups: Sequence[Group], worth: int) -> int:
    return sum((len(group.jobs) - 1) * group.shared - worth for group in groups if group.shared)


def common(a: Tokens, b: Tokens) -> int:
    most = min(len(a), len(b)) - 1
    return next((i for i in range(most) if a[i] != b[i]), most)


def best_saving(prompts: Sequence[Tokens], worth: int) -> int:
    """Over every way to cut the sorted prompts into intervals."""
    best = 0
    for cuts in itertools.product((False, True), repeat=len(prompts) - 1):
        total, start = 0, 0
        for end in [*(i + 1 for i, cut in enumerate(cuts) if cut), len(prompts)]:
            part = prompts[start:end]
            if len(part) > 1:
                shared = min(common(a, b) for a, b in itertools.pairwise(part))
                total += max(0, (len(part) - 1) * shared - worth)
            start = end
        best = max(best, total)
    return best


@pytest.mark.parametrize("seed", range(30))
def test_a_group_is_cut_where_that_saves_more(seed: int) -> None:
    worth = seed % 4
    prompts = random_prompts(seed, 2 + seed % 9)
    groups = groups_of([Job(prompt) for prompt in prompts], worth)
    assert sorted(job.prompt for group in groups for job in group.jobs) == prompts
    for group in groups:
        prefix = group.jobs[0].prompt[: group.shared]
        # The last token of a prompt is run with it: its logits are asked for.
        assert all(job.prompt[: group.shared] == prefix and len(job.prompt) > group.shared for job in group.jobs)
    assert saved(groups, worth) == whole_or_cut(prompts, worth)


def whole_or_cut(prompts: Sequence[Tokens], worth: int) -> int:
    """The rule, from the top: one group, or cut wherever neighbours share the least."""
    if len(prompts) < 2:
        return 0
    shared = [common(a, b) for a, b in itertools.pairwise(prompts)]
    parts, start = [], 0
    for i, n in enumerate(shared, 1):
        if n == min(shared):
            parts.append(prompts[start:i])
            start = i
    cut = sum(whole_or_cut(part, worth) for part in [*parts, prompts[start:]])
    return max(cut, (len(prompts) - 1) * min(shared) - worth)


def test_the_rule_comes_near_the_best_of_all_divisions() -> None:
    found = best = 0
    for seed in range(30):
        prompts = random_prompts(seed, 10)
        found += saved(groups_of(map(Job, prompts), 2), 2)
        best += best_saving(prompts, 2)
    assert 0.9 * best < found <= best


def test_subjects_are_groups_of_their_own() -> None:
    """A short beginning that all share must not hide the long one that each subject shares."""
    prompts = [(7, 7, *[s] * 400, s, i) for s in range(3, 6) for i in range(10)]
    groups = groups_of(map(Job, [*prompts, (8, 9)]))
    assert sorted((group.shared, len(group.jobs)) for group in groups) == [(0, 1), *[(403, 10)] * 3]


def test_equal_prompts_and_equal_questions_are_one_job() -> None:
    short, long = Generation(max_tokens=2), Generation(max_tokens=9)
    requests = [
        Request(prompt=(1, 2), continuations=((3,), (4, 5))),
        Request(prompt=(1, 2), continuations=((4, 5), (6,)), generation=long),
        Request(prompt=(1,), continuations=((2, 3),)),
        Request(prompt=(1, 2), generation=short),
        Request(prompt=(1, 2), generation=long),
    ]
    first, second = jobs_of(requests)
    assert (first.prompt, first.owners, second.owners) == ((1, 2), [0, 1, 3, 4], [2])
    assert first.continuations == [(3,), (4, 5), (6,)] and first.generations == [long, short]
    assert first.need == 11


@pytest.mark.parametrize("seed", range(10))
def test_every_path_of_a_tree_is_its_text_and_no_token_stands_twice(seed: int) -> None:
    tree, texts = Tree(), random_prompts(seed, 12)
    for text in texts:
        path = tree.add(text)
        assert tuple(tree.tokens[node] for node in path) == text
        assert [tree.depths[node] for node in path] == list(range(len(text)))
        assert [tree.parents[node] for node in path] == [-1, *path[:-1]]
    assert len(tree.tokens) == len({text[:n] for text in texts for n in range(1, len(text) + 1)})


@pytest.mark.parametrize("seed", range(10))
def test_batches_hold_all_the_work_within_the_limits(seed: int) -> None:
    rng = random.Random(seed)
    jobs = [
        Job(
            prompt,
            continuations=[tuple(rng.choices(range(9), k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))],
            generations=[Generation(max_tokens=n + 1) for n in range(rng.randint(0, 5))],
        )
        for prompt in random_prompts(seed, 40)
    ]
    limits = Limits(rows=4, tokens=20, logits=12)
    queue = Queue(jobs, limits, slots=3, share=True, branches=True)
    tails, replies = [], []
    while queue:
        room = rng.randint(1, 3)
        prefix, batch = queue.take(room)
        assert all(job.prompt[: len(prefix)] == prefix and len(job.prompt) > len(prefix) for job in batch)
        assert len(batch) <= 4
        if len(batch) > 1:
            assert sum(len(job.generations) for job in batch) <= room
            assert sum(len(job.prompt) - len(prefix) + job.tail_tokens for job in batch) <= 20
            assert sum(1 + job.tail_tokens for job in batch) <= 12
        assert all(len(job.generations) <= 3 for job in batch)
        tails += [(job.prompt, tail) for job in batch for tail in job.continuations]
        replies += [(job.prompt, generation) for job in batch for generation in job.generations]
    assert sorted(tails) == sorted((job.prompt, tail) for job in jobs for tail in job.continuations)
    assert len(replies) == len(set(replies)) == sum(len(job.generations) for job in jobs)


def test_halving_ends_at_one_row() -> None:
    job = Job((1,), continuations=[(2,), (3,), (4,)], generations=[Generation(max_tokens=n) for n in (1, 2, 3)])
    parts = [job]
    while any(len(part.halves()) > 1 for part in parts):
        parts = [half for part in parts for half in part.halves()]
    assert len(parts) == 6
    assert sorted(tail for part in parts for tail in part.continuations) == job.continuations
    assert all(part.scores is job.scores and part.said is job.said for part in parts)
