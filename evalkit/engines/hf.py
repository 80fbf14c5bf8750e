"""Any transformers causal language model, on the CPU or a GPU.

Scores are log-softmax in float32 at the scored positions only. The output head itself runs in float32 too: a
bfloat16 head rounds logits so coarsely that 2 to 12 % of four-way items tie.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from evalkit.encoding import CLOSE, OPEN, Tokenizer
from evalkit.engines.replies import cut_reply, decode, eos_ids, first_stop
from evalkit.records import Generated, Generation, Reply, Request

Row = tuple[int, int, tuple[int, ...], int]
"""(request, continuation, tokens of prompt and continuation, tokens of the continuation)"""


class HFEngine:
    """``answer`` over a loaded model; the model is left as it was found."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        batch_size: int | None = None,
        padding: Literal["left", "right"] = "right",
    ) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self.device = next(model.parameters()).device
        self.batch_size = batch_size or (16 if self.device.type == "cpu" else 64)
        self.padding = padding
        accepted = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted
        self._takes_positions = "position_ids" in accepted
        if padding == "left" and not self._takes_positions:
            raise ValueError(
                f"{type(model).__name__} takes no position_ids, so it can't be padded on the left; use padding='right'"
            )
        self._eos = eos_ids(model, tokenizer)
        self._head: tuple[torch.Tensor, torch.Tensor | None] | None = None
        """The output head's weight and bias in float32, made once."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def head_dtype(self) -> str:
        """What the output head computes in: float32, but for a wrapped or quantised head, which keeps its own."""
        head = self._output_head()
        return "float32" if _plain_linear(head) else f"as in {type(head).__name__}"

    def _output_head(self) -> Any:
        return self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None

    @property
    def max_length(self) -> int:
        config = (
            self.model.config.get_text_config() if hasattr(self.model.config, "get_text_config") else self.model.config
        )
        return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31)

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Long requests first: an out-of-memory error comes at once, and rows of a batch are alike in length."""
        order = sorted(range(len(requests)), key=lambda i: -_cost(requests[i]))
        with self._at_work("what is scored so far is kept"):
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                with torch.inference_mode(), self._float32_head(), _plain_generation(self.model):
                    scores = self._score(requests, chosen)
                    said = self._generate(requests, chosen)
                for i in chosen:
                    rows = tuple(scores[i, j] for j in range(len(requests[i].continuations)))
                    yield i, Reply(logprobs=rows, generated=said.get(i))

    def logits(self, batch: Sequence[tuple[tuple[int, ...], int]]) -> list[torch.Tensor]:
        """Of each row (tokens, n) the float32 logits [n, vocabulary] of the steps that predict its last n tokens, in
        one forward pass over the rows."""
        with self._at_work("nothing is kept"), torch.inference_mode(), self._float32_head():
            return self._logits(batch)

    @contextlib.contextmanager
    def _at_work(self, kept: str) -> Iterator[None]:
        """Without dropout, and with a word of advice where memory runs out."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory on {self.device} at batch size {self.batch_size}; use a smaller --batch-size ({kept})"
            ) from error
        finally:
            self.model.train(training)

    @contextlib.contextmanager
    def _float32_head(self) -> Iterator[None]:
        """Run the output head in float32, keeping what the model does behind it (soft caps, scaling)."""
        head: Any = self._output_head()
        if not _plain_linear(head) or head.weight.dtype == torch.float32:
            yield
            return
        if self._head is None:
            self._head = (head.weight.float(), None if head.bias is None else head.bias.float())
        weight, bias = self._head
        head.forward = lambda hidden: F.linear(hidden.float(), weight, bias)
        try:
            yield
        finally:
            del head.forward

    # --- log-likelihood ---

    def _score(self, requests: Sequence[Request], chosen: Sequence[int]) -> dict[tuple[int, int], tuple[float, ...]]:
        rows: list[Row] = [
            (i, j, requests[i].prompt + tail, len(tail))
            for i in chosen
            for j, tail in enumerate(requests[i].continuations)
        ]
        rows.sort(key=lambda row: -len(row[2]))
        scores: dict[tuple[int, int], tuple[float, ...]] = {}
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            for (i, j, _, _), logprobs in zip(batch, self._logprobs(batch), strict=True):
                scores[i, j] = logprobs
        return scores

    def _logprobs(self, batch: Sequence[Row]) -> list[tuple[float, ...]]:
        """For each row the log-probability of every token of its continuation (float32, nats)."""
        out = []
        rows = [(tokens, scored) for _, _, tokens, scored in batch]
        for row, (tokens, scored) in zip(self._logits(rows), rows, strict=True):
            target = torch.tensor(tokens[-scored:], device=row.device)[:, None]
            # logsumexp would be nearer to float64 by some 1e-5 nats a token, but sums agree with lm-eval's this way.
            out.append(tuple(row.log_softmax(-1).gather(-1, target)[:, 0].tolist()))
        return out

    def _logits(self, batch: Sequence[tuple[tuple[int, ...], int]]) -> list[torch.Tensor]:
        # The last token predicts nothing that is scored, so it is not run.
        width = max(len(tokens) for tokens, _ in batch) - 1
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        first = []  # column whose logits predict the continuation's first token
        for r, (tokens, scored) in enumerate(batch):
            length = len(tokens) - 1
            offset = width - length if self.padding == "left" else 0
            ids[r, offset : offset + length] = torch.tensor(tokens[:-1])
            mask[r, offset : offset + length] = 1
            first.append(offset + length - scored)
        columns = sorted({c for start, row in zip(first, batch, strict=True) for c in range(start, start + row[1])})
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self._takes_positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        if self._keeps_logits:
            inputs["logits_to_keep"] = torch.tensor(columns, device=self.device)
            where = {column: at for at, column in enumerate(columns)}
        else:
            where = {column: column for column in columns}
        logits = self.model(**inputs, use_cache=False).logits
        # A row's columns stand side by side among the kept ones, so this copies nothing.
        spans = [(where[start], scored) for start, (_, scored) in zip(first, batch, strict=True)]
        return [logits[r, at : at + scored].float() for r, (at, scored) in enumerate(spans)]

    # --- generation ---

    def _generate(self, requests: Sequence[Request], chosen: Sequence[int]) -> dict[int, Generated]:
        said: dict[int, Generated] = {}
        for members in self._together(requests, chosen):
            jobs = [(requests[i].prompt, requests[i].generation) for i in members]
            said.update(zip(members, self._replies(jobs), strict=True))
        return said

    def _together(self, requests: Sequence[Request], chosen: Sequence[int]) -> list[list[int]]:
        """Groups that may generate in one batch.

        Prompts are padded on the left: only a model that is told positions can bear it. A finished row is carried on
        until the last one ends, so the longest prompt and the largest limit must fit the window together.
        """
        groups: list[list[int]] = []
        for i in chosen:
            if requests[i].generation is None:
                continue
            for group in groups:
                lengths = [len(requests[j].prompt) for j in (*group, i)]
                limits = [g.max_tokens for j in (*group, i) if (g := requests[j].generation)]
                alike = self._takes_positions or len(set(lengths)) == 1
                if alike and max(lengths) + max(limits) <= self.max_length:
                    group.append(i)
                    break
            else:
                groups.append([i])
        return groups

    def _replies(self, jobs: Sequence[tuple[tuple[int, ...], Any]]) -> list[Generated]:
        width = max(len(prompt) for prompt, _ in jobs)
        ids = torch.zeros(len(jobs), width, dtype=torch.long)
        mask = torch.zeros(len(jobs), width, dtype=torch.long)
        for r, (prompt, _) in enumerate(jobs):
            ids[r, width - len(prompt) :] = torch.tensor(prompt)
            mask[r, width - len(prompt) :] = 1
        stopping = _Stops(self._tokenizer, width, [generation for _, generation in jobs])
        config = GenerationConfig(
            max_new_tokens=max(generation.max_tokens for _, generation in jobs),
            do_sample=False,  # samples are greedy too, over noisy scores
            eos_token_id=sorted(self._eos) or None,
            pad_token_id=min(self._eos, default=0),  # after a row's end; never seen, the mask covers the left side
            use_cache=True,
        )
        out = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stopping]),
            logits_processor=LogitsProcessorList([_Sample(jobs)]),
        )
        tokens = out[:, width:].tolist()
        said = zip(tokens, jobs, strict=True)
        return [cut_reply(self._tokenizer, row, generation, self._eos) for row, (_, generation) in said]


_FIRST = 8
"""A thinking block that the model opens itself stands within its first tokens."""


class _Sample(LogitsProcessor):  # type: ignore[misc]
    """Sampling as the argmax of scores plus Gumbel noise (Gumbel, 1954), drawn from a generator of each row's own.

    A row's seed is its request's, so its reply depends on no other row, and the global generator is left alone.
    """

    def __init__(self, jobs: Sequence[tuple[tuple[int, ...], Any]]) -> None:
        self.temperatures = [generation.temperature for _, generation in jobs]
        self.generators = []
        for prompt, generation in jobs:
            digest = hashlib.sha256(f"{generation.seed} {prompt}".encode()).digest()
            self.generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not any(self.temperatures):
            return scores
        rows = []
        for row, temperature, generator in zip(scores.float(), self.temperatures, self.generators, strict=True):
            if temperature:
                noise = -torch.empty(row.shape).exponential_(generator=generator).log()
                row = row / temperature + noise.to(row.device)
            rows.append(row)
        return torch.stack(rows)


class _Stops(StoppingCriteria):  # type: ignore[misc]
    """A row ends at its own stop strings (found in the text, so a string split over tokens counts) or length."""

    def __init__(self, tokenizer: Tokenizer, width: int, generations: Sequence[Generation]) -> None:
        self.tokenizer = tokenizer
        self.width = width
        self.generations = generations
        self.done = [False] * len(generations)
        self.thinks = [False] * len(generations)
        """The model opened a thinking block itself; no stop string counts before its end."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for r, generation in enumerate(self.generations):
            if self.done[r]:
                continue
            new = input_ids.shape[1] - self.width
            if new <= _FIRST:
                opening = decode(self.tokenizer, input_ids[r, self.width :].tolist(), generation.stops)
                self.thinks[r] = opening.lstrip().startswith(OPEN)
            # A stop string of n characters lies within the last n + 8 tokens: every token but a byte piece has one.
            tail = max((len(stop) for stop in generation.stops), default=0) + 8
            shown = input_ids[r, self.width :][
                0 if self.thinks[r] and CLOSE not in generation.stops else -tail :
            ].tolist()
            text = decode(self.tokenizer, shown, generation.stops)
            self.done[r] = new >= generation.max_tokens or first_stop(text, generation.stops) is not None
        return torch.tensor(self.done, device=input_ids.device)


def _plain_linear(head: Any) -> bool:
    """A linear layer that nothing wraps, patches or quantises."""
    linear = torch.nn.Linear
    own = isinstance(head, linear) and type(head).forward is linear.forward and "forward" not in vars(head)
    return own and bool(head.weight.is_floating_point())


def _cost(request: Request) -> int:
    tails = sum(len(request.prompt) + len(tail) for tail in request.continuations)
    return tails + len(request.prompt) + (request.generation.max_tokens if request.generation else 0)


@contextlib.contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Greedy means greedy: a model's shipped defaults (repetition penalty, sampling) do not apply."""
    own = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
