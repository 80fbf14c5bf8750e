"""Prompts and their continuations: scored from one run of each prompt, which stays behind in a cache for generation.

A tree (attention alone): many prompts and all their continuations lie in one row, each token attending to those before
it in its own text. Nothing is padded, nothing is run twice, no cache is copied for each choice.

Rows (a recurrent layer has one state, not a column a token): a row a prompt, padded on the right; then a row a
continuation of several tokens, each from a copy of its prompt's cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from evalkit.engines.cache import new_cache, rows_of
from evalkit.engines.forward import Forward, logprobs
from evalkit.engines.profile import Profile
from evalkit.engines.work import Job, Tokens, Tree


@dataclass(frozen=True, slots=True)
class Begun:
    """A prompt that replies can be generated after."""

    job: Job
    logits: Tensor
    """[vocabulary], after the prompt's last token."""
    cache: Any
    row: int
    columns: Sequence[int]
    """Where the prompt's tokens lie in that row of the cache."""


class Prefill:
    """Scores the continuations of jobs (into ``job.scores``) and begins their replies."""

    def __init__(self, forward: Forward, profile: Profile, layout: Literal["tree", "rows"]) -> None:
        self.forward = forward
        self.profile = profile
        self.layout = layout
        self._prefix: Tokens = ()
        self._prefix_cache: Any = None

    def __call__(self, jobs: Sequence[Job], prefix: Tokens) -> list[Begun]:
        """``prefix``: tokens that all the prompts begin with, each going on behind them."""
        cache = self._shared(prefix)
        for job in jobs:
            for tail in job.continuations:
                if not tail:
                    job.scores[tail] = ()
        return (self._tree if self.layout == "tree" else self._rows)(jobs, len(prefix), cache)

    def forget(self) -> None:
        """Give back the prefix's cache."""
        self._prefix, self._prefix_cache = (), None

    def _shared(self, prefix: Tokens) -> Any:
        if not prefix:
            return None
        if prefix != self._prefix:
            self.forget()
            cache = new_cache(self.forward)
            with self.profile.phase("prefill", 1, prefill=len(prefix)):
                self.forward(self._tensor([prefix]), None, positions=self._tensor([range(len(prefix))]), cache=cache)
            self._prefix, self._prefix_cache = prefix, cache
        return self._prefix_cache

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([list(row) for row in rows], dtype=torch.long, device=self.forward.device)

    # --- a tree ---

    def _tree(self, jobs: Sequence[Job], shared: int, prefix: Any) -> list[Begun]:
        tree = Tree()
        paths = [tree.add(job.prompt[shared:]) for job in jobs]
        prompts = len(tree.tokens)
        picks: dict[int, dict[int, None]] = {}  # node -> the tokens whose log-probability is asked for there
        texts: list[tuple[Job, Tokens, list[int]]] = []
        for job, path in zip(jobs, paths, strict=True):
            if job.generations:
                picks.setdefault(path[-1], {})
            for tail in filter(None, job.continuations):
                nodes = [path[-1], *tree.add(tail[:-1], path[-1])]
                texts.append((job, tail, nodes))
                for node, token in zip(nodes, tail, strict=True):
                    picks.setdefault(node, {})[token] = None
        begin = any(job.generations for job in jobs)
        cache = rows_of(prefix, 1) if prefix is not None else new_cache(self.forward) if begin else None
        place = {node: at for at, node in enumerate(picks)}
        with self.profile.phase("prefill", len(jobs), prefill=prompts, choices=len(tree.tokens) - prompts):
            logits = self.forward(
                self._tensor([tree.tokens]),
                ([0] * len(picks), list(picks)),
                mask=self._ancestors(tree.parents, shared),
                positions=self._tensor([tree.depths]) + shared,
                cache=cache,
            )
            found = logprobs(logits, list(picks.values()))
        for job, tail, nodes in texts:
            job.scores[tail] = tuple(found[place[node]][token] for node, token in zip(nodes, tail, strict=True))
        return [
            Begun(
                job=job,
                logits=logits[place[path[-1]]],
                cache=cache,
                row=0,
                columns=[*range(shared), *(shared + node for node in path)],
            )
            for job, path in zip(jobs, paths, strict=True)
            if job.generations
        ]

    def _ancestors(self, parents: Sequence[int], shared: int) -> Tensor:
        """[1, 1, tokens, shared + tokens]: 0 where a token may look (what all share, its ancestors, itself).

        A node is an ancestor of those that are entered after it and before it is left (depth first).
        """
        size = len(parents)
        below = [1] * size
        for node in range(size - 1, -1, -1):  # a parent stands before its children
            if parents[node] >= 0:
                below[parents[node]] += below[node]
        entered, free = [0] * size, [0] * (size + 1)  # free[-1]: of the roots
        for node, parent in enumerate(parents):
            entered[node] = free[parent]
            free[node] = free[parent] + 1
            free[parent] += below[node]
        at = self._tensor([entered])[0]
        left = at + self._tensor([below])[0]
        seen = (at <= at[:, None]) & (at[:, None] < left)
        dtype = self.forward.model.dtype
        mask = torch.zeros(size, shared + size, dtype=dtype, device=at.device)
        mask[:, shared:].masked_fill_(~seen, torch.finfo(dtype).min)
        return mask[None, None]

    # --- rows ---

    def _rows(self, jobs: Sequence[Job], shared: int, prefix: Any) -> list[Begun]:
        rests = [job.prompt[shared:] for job in jobs]
        cache = new_cache(self.forward) if prefix is None else rows_of(prefix, len(jobs))
        ids, mask = self._padded(rests)
        width = ids.shape[1]
        seen = torch.cat([torch.ones(len(jobs), shared, dtype=torch.long, device=mask.device), mask], 1)
        with self.profile.phase("prefill", len(jobs), prefill=sum(map(len, rests))):
            ends = self.forward(
                ids,
                (range(len(jobs)), [len(rest) - 1 for rest in rests]),
                mask=seen,
                positions=(shared + torch.arange(width, device=ids.device)).expand(len(jobs), -1),
                cache=cache,
            )
            first = logprobs(ends, [sorted({tail[0] for tail in job.continuations if tail}) for job in jobs])
        longer: list[tuple[int, Tokens]] = []
        for r, job in enumerate(jobs):
            for tail in job.continuations:
                if len(tail) == 1:
                    job.scores[tail] = (first[r][tail[0]],)
                elif tail:
                    longer.append((r, tail))
        longer.sort(key=lambda one: -len(one[1]))
        for start in range(0, len(longer), len(jobs)):  # as many rows as memory had room for
            self._continue(jobs, longer[start : start + len(jobs)], cache, seen, first)
        return [
            Begun(job=job, logits=ends[r], cache=cache, row=r, columns=range(len(job.prompt)))
            for r, job in enumerate(jobs)
            if job.generations
        ]

    def _continue(
        self,
        jobs: Sequence[Job],
        batch: Sequence[tuple[int, Tokens]],
        cache: Any,
        seen: Tensor,
        first: Sequence[dict[int, float]],
    ) -> None:
        rows = self._tensor([[r for r, _ in batch]])[0]
        ids, mask = self._padded([tail[:-1] for _, tail in batch])
        lengths = self._tensor([[len(jobs[r].prompt) for r, _ in batch]]).T
        picks = [(at, column) for at, (_, tail) in enumerate(batch) for column in range(len(tail) - 1)]
        with self.profile.phase("choices", len(batch), choices=len(picks)):
            logits = self.forward(
                ids,
                ([at for at, _ in picks], [column for _, column in picks]),
                mask=torch.cat([seen[rows], mask], 1),
                positions=lengths + torch.arange(ids.shape[1], device=ids.device),
                cache=rows_of(cache, rows),
            )
            found = iter(logprobs(logits, [[batch[at][1][column + 1]] for at, column in picks]))
            for r, tail in batch:
                jobs[r].scores[tail] = (first[r][tail[0]], *(next(found)[token] for token in tail[1:]))

    def _padded(self, rows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """(ids, mask) [rows, longest], padded on the right."""
        width = max(map(len, rows))
        fill = [width - len(row) for row in rows]
        ids = self._tensor([[*row, *[0] * pads] for row, pads in zip(rows, fill, strict=True)])
        mask = self._tensor([[*[1] * len(row), *[0] * pads] for row, pads in zip(rows, fill, strict=True)])
        return ids, mask
