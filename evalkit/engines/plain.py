"""Every row by itself from its first token: for models without a cache of ours, and for teacher forcing."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from evalkit.encoding import Tokenizer
from evalkit.engines.decode import Sampler
from evalkit.engines.forward import Forward, logprobs
from evalkit.engines.profile import Profile
from evalkit.engines.replies import Watch, cut_reply
from evalkit.engines.work import Job
from evalkit.records import Generation


class Plain:
    """Padded batches of whole texts, and transformers' own ``generate``."""

    def __init__(
        self,
        forward: Forward,
        tokenizer: Tokenizer,
        eos: frozenset[int],
        profile: Profile,
        *,
        padding: Literal["left", "right"],
        max_length: int,
    ) -> None:
        self.forward = forward
        self.tokenizer = tokenizer
        self.eos = eos
        self.profile = profile
        self.padding = padding
        self.max_length = max_length

    def __call__(self, jobs: Sequence[Job], rows: int) -> None:
        """Score the jobs' continuations and generate their replies, ``rows`` at a time."""
        texts = [(job, tail) for job in jobs for tail in job.continuations if tail]
        texts.sort(key=lambda text: -len(text[0].prompt) - len(text[1]))
        for job in jobs:
            job.scores.update((tail, ()) for tail in job.continuations if not tail)
        for start in range(0, len(texts), rows):
            batch = texts[start : start + rows]
            with self.profile.phase("choices", len(batch), choices=sum(len(j.prompt) + len(t) - 1 for j, t in batch)):
                logits = self.logits([(job.prompt + tail, len(tail)) for job, tail in batch])
                for (job, tail), own in zip(batch, logits, strict=True):
                    rows_ = logprobs(own, [[token] for token in tail])
                    job.scores[tail] = tuple(row[token] for row, token in zip(rows_, tail, strict=True))
        replies = [(job, generation) for job in jobs for generation in job.generations]
        for members in self._together(replies):
            for start in range(0, len(members), rows):
                batch_ = members[start : start + rows]
                with self.profile.phase("decode", len(batch_), decode=sum(len(job.prompt) for job, _ in batch_)):
                    self._generate(batch_)

    def logits(self, batch: Sequence[tuple[tuple[int, ...], int]]) -> list[torch.Tensor]:
        """Of each row (tokens, n) the float32 logits [n, vocabulary] of the steps that predict its last n tokens."""
        # The last token predicts nothing that is scored, so it is not run.
        width = max(len(tokens) for tokens, _ in batch) - 1
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        rows: list[int] = []
        columns: list[int] = []
        for r, (tokens, scored) in enumerate(batch):
            length = len(tokens) - 1
            offset = width - length if self.padding == "left" else 0
            ids[r, offset : offset + length] = torch.tensor(tokens[:-1])
            mask[r, offset : offset + length] = 1
            rows += [r] * scored
            columns += range(offset + length - scored, offset + length)
        device = self.forward.device
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = self.forward(
            ids.to(device), (rows, columns), mask=mask.to(device), positions=positions.to(device), cache=None
        )
        return list(found.split([scored for _, scored in batch]))

    def _together(self, replies: Sequence[tuple[Job, Generation]]) -> list[list[tuple[Job, Generation]]]:
        """Groups that may generate in one batch.

        Prompts are padded on the left: only a model that is told positions can bear it. A finished row is carried on
        until the last one ends, so the longest prompt and the largest limit must fit the window together.
        """
        groups: list[list[tuple[Job, Generation]]] = []
        for one in replies:
            for group in groups:
                lengths = [len(job.prompt) for job, _ in (*group, one)]
                limits = [generation.max_tokens for _, generation in (*group, one)]
                alike = self.forward.takes_positions or len(set(lengths)) == 1
                if alike and max(lengths) + max(limits) <= self.max_length:
                    group.append(one)
                    break
            else:
                groups.append([one])
        return groups

    def _generate(self, batch: Sequence[tuple[Job, Generation]]) -> None:
        width = max(len(job.prompt) for job, _ in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for r, (job, _) in enumerate(batch):
            ids[r, width - len(job.prompt) :] = torch.tensor(job.prompt)
            mask[r, width - len(job.prompt) :] = 1
        config = GenerationConfig(
            max_new_tokens=max(generation.max_tokens for _, generation in batch),
            do_sample=False,  # samples are greedy too, over noisy scores
            eos_token_id=sorted(self.eos) or None,
            pad_token_id=min(self.eos, default=0),  # after a row's end; never seen, the mask covers the left side
            use_cache=True,
        )
        model = self.forward.model
        own = getattr(model, "generation_config", None)
        model.generation_config = GenerationConfig()  # a model's shipped defaults (penalties, sampling) do not apply
        try:
            with self.forward.float32_head():
                out = model.generate(
                    input_ids=ids.to(self.forward.device),
                    attention_mask=mask.to(self.forward.device),
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([_Stops(self.tokenizer, width, batch)]),
                    logits_processor=LogitsProcessorList([_Sample(batch)]),
                )
        finally:
            model.generation_config = own
        for tokens, (job, generation) in zip(out[:, width:].tolist(), batch, strict=True):
            job.said[generation] = cut_reply(self.tokenizer, tokens, generation, self.eos)


class _Sample(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, batch: Sequence[tuple[Job, Generation]]) -> None:
        self.samplers = [Sampler(job.prompt, generation) for job, generation in batch]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = zip(self.samplers, scores.float(), strict=True)
        return torch.stack([sampler(row) for sampler, row in rows])


class _Stops(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, tokenizer: Tokenizer, width: int, batch: Sequence[tuple[Job, Generation]]) -> None:
        self.width = width
        watches = {generation.stops: Watch(tokenizer, generation.stops) for _, generation in batch}
        self.rows = [(generation.max_tokens, watches[generation.stops]) for _, generation in batch]
        self.done = [False] * len(batch)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for r, (said, (most, watch)) in enumerate(zip(input_ids[:, self.width :].tolist(), self.rows, strict=True)):
            self.done[r] = self.done[r] or len(said) >= most or watch(said)
        return torch.tensor(self.done, device=input_ids.device)
