"""What an engine is asked, put in the order of the least work. Pure: no model, no tensor.

Requests -> jobs (every prompt once) -> groups of jobs whose prompts begin alike -> batches.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from evalkit.records import Generated, Generation, Request

Tokens = tuple[int, ...]

WORTH = 256
"""Tokens that a common prefix must save: what the pass of its own costs in overhead (a launch for every operation)."""


@dataclass(slots=True)
class Job:
    """One prompt, whoever asked it, and all that is asked of it."""

    prompt: Tokens
    owners: list[int] = field(default_factory=list)
    """The requests with this prompt."""
    continuations: list[Tokens] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    """Still to be generated."""
    scores: dict[Tokens, tuple[float, ...]] = field(default_factory=dict)
    said: dict[Generation, Generated] = field(default_factory=dict)

    @property
    def need(self) -> int:
        """Columns of a cache: the prompt and the longest reply after it."""
        return len(self.prompt) + max((generation.max_tokens for generation in self.generations), default=0)

    @property
    def tail_tokens(self) -> int:
        """At most this many are run beside the prompt: the last token of a continuation predicts nothing."""
        return sum(max(0, len(tail) - 1) for tail in self.continuations)

    def halves(self) -> "list[Job]":
        """The same work in two parts that can be done one after the other; itself where it is one row."""
        tails, replies = self.continuations, self.generations
        if len(tails) > 1 or (tails and replies):
            half = len(tails) // 2
            return [
                replace(self, continuations=tails[:half]),
                replace(self, continuations=tails[half:], generations=[]),
            ]
        if len(replies) > 1:
            half = len(replies) // 2
            return [replace(self, generations=replies[:half]), replace(self, generations=replies[half:])]
        return [self]


@dataclass(slots=True)
class Group:
    """Jobs whose prompts begin with the same ``shared`` tokens; 0: nothing that pays is shared."""

    shared: int
    jobs: list[Job]


def jobs_of(requests: Sequence[Request]) -> list[Job]:
    """Every prompt, and everything asked of it, once."""
    jobs: dict[Tokens, Job] = {}
    for index, request in enumerate(requests):
        job = jobs.setdefault(request.prompt, Job(prompt=request.prompt))
        job.owners.append(index)
        job.continuations.extend(request.continuations)
        if request.generation is not None:
            job.generations.append(request.generation)
    for job in jobs.values():
        job.continuations = list(dict.fromkeys(job.continuations))
        job.generations = list(dict.fromkeys(job.generations))
    return list(jobs.values())


def groups_of(jobs: Iterable[Job], worth: int = WORTH) -> list[Group]:
    """``jobs`` divided so that running each group's common prefix once saves many tokens.

    In lexical order prompts that begin alike stand side by side, so groups are intervals. An interval is either one
    group or cut wherever neighbours share the least (the tree of common prefixes), whichever saves more. Groups, and
    the jobs in each, come longest first.
    """
    order = sorted(jobs, key=lambda job: job.prompt)
    groups: list[Group] = []
    rest: list[Job] = []
    at = 0
    for low, high, shared in [*_intervals([job.prompt for job in order], worth), (len(order), len(order), 0)]:
        rest += order[at:low]
        if low < high:
            groups.append(Group(shared=shared, jobs=order[low:high]))
        at = high
    if rest:
        groups.append(Group(shared=0, jobs=rest))
    for group in groups:
        group.jobs.sort(key=lambda job: -job.need)
    return sorted(groups, key=lambda group: -group.jobs[0].need)


def _intervals(prompts: Sequence[Tokens], worth: int) -> list[tuple[int, int, int]]:
    """(first, end, tokens shared) of the intervals of sorted ``prompts`` that are run from a common prefix."""

    @dataclass(slots=True)
    class Open:
        """An interval whose end is not reached: all its neighbours share at least ``shared`` tokens."""

        shared: int
        low: int
        saved: int
        parts: list[tuple[int, int, int]]

    stack = [Open(0, 0, 0, [])]
    for i in range(1, len(prompts) + 1):
        shared = _common(prompts[i - 1], prompts[i]) if i < len(prompts) else 0
        low, saved, parts = i - 1, 0, list[tuple[int, int, int]]()
        while stack[-1].shared > shared:
            one = stack.pop()
            low, saved, parts = one.low, one.saved + saved, one.parts + parts
            whole = (i - low - 1) * one.shared - worth
            if whole > saved:
                saved, parts = whole, [(low, i, one.shared)]
        if stack[-1].shared == shared:
            stack[-1].saved += saved
            stack[-1].parts += parts
        else:
            stack.append(Open(shared, low, saved, parts))
    return stack[0].parts


def _common(one: Tokens, other: Tokens) -> int:
    """Tokens that both begin with. The last of each is left out: it is always run, its logits are asked for."""
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), most)


@dataclass(slots=True)
class Limits:
    """Of one prefill pass. They fall where memory runs out, and stay low."""

    rows: int
    """Prompts."""
    tokens: int
    logits: int
    """Scored positions."""


class Queue:
    """Jobs in the order of the work, groups of common prefixes first to last, handed out a batch at a time."""

    def __init__(self, jobs: Sequence[Job], limits: Limits, *, slots: int, share: bool, branches: bool) -> None:
        """slots: rows that generate at once. share: common prefixes are run once. branches: many prompts lie in one row
        (a tree), so a long one is better run as a prefix."""
        self.limits = limits
        parts = [part for job in jobs for part in _parts(job, slots, limits.logits)]
        groups = groups_of(parts) if share else [Group(0, sorted(parts, key=lambda job: -job.need))]
        self._jobs: deque[tuple[Tokens, Job]] = deque()
        for group in groups:
            prefix = group.jobs[0].prompt[: group.shared]
            for job in group.jobs:
                long = branches and len(job.prompt) - group.shared > limits.tokens
                self._jobs.append((job.prompt[:-1] if long else prefix, job))

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def next(self) -> Job:
        return self._jobs[0][1]

    def take(self, room: int) -> tuple[Tokens, list[Job]]:
        """(common prefix, jobs) of the next batch, which generates at most ``room`` replies: at least a job, or that
        part of it for which there is room."""
        prefix, first = self._jobs.popleft()
        while len(first.generations) > room and len(halves := first.halves()) > 1:
            first = halves[0]
            self._jobs.extendleft((prefix, half) for half in reversed(halves[1:]))
        batch, replies, tokens, logits = [first], len(first.generations), 0, 0
        tokens += len(first.prompt) - len(prefix) + first.tail_tokens
        logits += 1 + first.tail_tokens
        while self._jobs and len(batch) < self.limits.rows:
            other, job = self._jobs[0]
            replies += len(job.generations)
            tokens += len(job.prompt) - len(prefix) + job.tail_tokens
            logits += 1 + job.tail_tokens
            full = replies > room or tokens > self.limits.tokens or logits > self.limits.logits
            if other != prefix or full or job.need > first.need:  # room is for rows as long as the first
                break
            batch.append(job)
            self._jobs.popleft()
        return prefix, batch

    def put_back(self, jobs: Sequence[Job], prefix: Tokens = ()) -> None:
        """To be done next; ``prefix`` as ``take`` gave it."""
        self._jobs.extendleft((prefix, job) for job in reversed(jobs))


def _parts(job: Job, slots: int, logits: int) -> list[Job]:
    """A job with more replies than slots, or more to score than a pass may, as several."""
    if (len(job.generations) <= slots and job.tail_tokens < logits) or len(halves := job.halves()) == 1:
        return [job]
    return [part for half in halves for part in _parts(half, slots, logits)]


class Tree:
    """Token sequences as one row in which nothing stands twice: a node a token, its parent the token before it.

    Two continuations of one prompt hang from its last node, and share what they begin with. Each node attends to its
    ancestors alone, so every path is scored as if it were run by itself.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        """-1: nothing stands before it but what the whole tree shares."""
        self.depths: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def add(self, tokens: Sequence[int], after: int = -1) -> list[int]:
        """The nodes of ``tokens`` behind node ``after``; those that are there already are used again."""
        path = []
        for token in tokens:
            node = self._children.setdefault((after, token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(after)
                self.depths.append(0 if after < 0 else self.depths[after] + 1)
            path.append(node)
            after = node
        return path
