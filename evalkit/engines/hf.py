"""Any transformers causal language model, on the CPU or a GPU.

Each different prompt is run once: its last position scores one-token choices, its cache serves longer choices and the
reply (prefill.py, decode.py). How that is laid out follows from the model, tried on a few tokens before the first
request: "tree" where attention alone remembers, "rows" where a layer has a recurrent state, "plain" (each text by
itself, plain.py) where neither gives what the model says without a cache.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from evalkit.encoding import Tokenizer
from evalkit.engines.cache import why_not
from evalkit.engines.decode import Decoder
from evalkit.engines.forward import Forward
from evalkit.engines.plain import Plain
from evalkit.engines.prefill import Prefill
from evalkit.engines.profile import Profile
from evalkit.engines.replies import eos_ids
from evalkit.engines.work import Job, Limits, Queue, Tokens, jobs_of
from evalkit.records import Generation, Reply, Request
from evalkit.scoring import best

logger = logging.getLogger("evalkit")

Layout = Literal["tree", "rows", "plain"]

ROWS = {"cpu": 16, "cuda": 256}
"""Rows of a batch, unless the user says so."""
PASS_TOKENS = {"cpu": 256, "cuda": 4096}
"""Tokens of a prefill pass: more keep no unit busier (512 on a CPU are no faster and take twice the memory), and a
tree's mask grows with their square."""
PASS_LOGITS = {"cpu": 2**24, "cuda": 2**28}
"""Logits of a prefill pass: 64 MiB, 1 GiB."""
NEAR, NEAR_HALF = 1e-2, 0.3
"""How far two layouts' log-probabilities may be apart on average (nats): in float32 (with TF32 on a GPU), and in
what is rounded more coarsely. A wrong mask, position or state moves them by more."""


class HFEngine:
    """``answer`` over a loaded model; the model is left as it was found."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        batch_size: int | None = None,
        padding: Literal["left", "right"] = "right",
        layout: Layout | None = None,
    ) -> None:
        """batch_size: prompts of a prefill pass and rows of a decode step, at most. padding: of the plain layout.
        layout: only this one, or plain where it fails; None: the first that works."""
        self.model = model
        self._tokenizer = tokenizer
        self._forward = Forward(model)
        self.device = self._forward.device
        self.batch_size = batch_size or ROWS.get(self.device.type, 64)
        if padding == "left" and not self._forward.takes_positions:
            raise ValueError(
                f"{type(model).__name__} takes no position_ids, so it can't be padded on the left; use padding='right'"
            )
        self.profile = Profile()
        self._layouts: tuple[Layout, ...] = ("tree", "rows") if layout is None else (layout,)
        self._eos = eos_ids(model, tokenizer)
        self._plain = Plain(
            self._forward, tokenizer, self._eos, self.profile, padding=padding, max_length=self.max_length
        )
        self._prefill: Prefill | None = None
        self._decoder = Decoder(self._forward, tokenizer, self._eos, self.profile, rows=self.batch_size)
        kind = "cpu" if self.device.type == "cpu" else "cuda"
        vocabulary = getattr(_text_of(model.config), "vocab_size", None) or 2**15
        self._limits = Limits(self.batch_size, PASS_TOKENS[kind], PASS_LOGITS[kind] // vocabulary)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def head_dtype(self) -> str:
        """What the output head computes in: float32, but for a wrapped or quantised head, which keeps its own."""
        return self._forward.head_dtype

    @property
    def max_length(self) -> int:
        return window_of(self.model.config)

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Long requests first: an out-of-memory error comes at once, and rows of a batch are alike in length."""
        self._count(requests)
        waiting = dict(enumerate(requests))
        with self._at_work():
            self._choose_layout()
            for job in self._finished(jobs_of(requests)):
                for i in job.owners:
                    if i in waiting and (reply := _reply(waiting[i], job)):
                        del waiting[i]
                        self.profile.ties += _tie(reply)
                        yield i, reply
        assert not waiting, "a request was left out"

    def close(self) -> None:
        """Give back what is kept between calls; the model's memory goes with the last that holds it."""
        self._decoder.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def logits(self, batch: Sequence[tuple[tuple[int, ...], int]]) -> list[torch.Tensor]:
        """Of each row (tokens, n) the float32 logits [n, vocabulary] of the steps that predict its last n tokens, in
        one forward pass over the rows."""
        self._decoder.clear()  # nothing is being generated
        with self._at_work(), torch.inference_mode():
            try:
                return self._plain.logits(batch)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"out of memory on {self.device} at batch size {self.batch_size}; use a smaller --batch-size "
                    "(nothing is kept)"
                ) from error

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Without dropout."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def _count(self, requests: Sequence[Request]) -> None:
        profile = self.profile
        profile.requests += len(requests)
        for request in requests:
            profile.asked["choices"] += sum(len(request.prompt) + len(tail) - 1 for tail in request.continuations)
            profile.asked["prefill"] += len(request.prompt) * (request.generation is not None)

    # --- how the model is run ---

    def _choose_layout(self) -> None:
        """ "tree", else "rows", else "plain": the first that says on a few tokens what plain passes say."""
        if self.profile.layout:
            return
        self.profile.layout, why = "plain", ""
        for layout in self._layouts:
            if layout == "plain":
                break
            try:
                wrong = why_not(self._forward, layout) or self._trial(layout)
            except torch.OutOfMemoryError as error:
                raise ValueError(f"out of memory on {self.device} with a few tokens: the model leaves none") from error
            except Exception as error:  # whatever the model's own code makes of a cache or a mask that it doesn't know
                wrong = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if not wrong:
                self.profile.layout = layout
                self._prefill = Prefill(self._forward, self.profile, layout)
                break
            why = f"{layout}: {wrong}"
        self.profile.why = why
        if self.profile.layout == "plain" and why:
            logger.warning("every text is run by itself, without a cache: %s", why)

    def _trial(self, layout: Literal["tree", "rows"]) -> str:
        """How far scores and replies in ``layout`` are from plain passes on a few tokens; empty: near enough."""
        ids = tuple((37 * i + 11) % int(_text_of(self.model.config).vocab_size) for i in range(20))
        replies = [Generation(max_tokens=n) for n in (2, 3)]  # the first ends first: the other takes its place
        jobs = [
            Job(ids[:14], continuations=[ids[14:17], ids[17:19], ids[14:15]], generations=replies[:1]),
            Job((*ids[:3], ids[7]), continuations=[ids[3:5]], generations=replies[1:]),  # much shorter: mostly masked
        ]
        profile = Profile()
        decoder = Decoder(self._forward, self._tokenizer, frozenset(), profile, rows=2)
        with torch.inference_mode():
            decoder.enter(Prefill(self._forward, profile, layout)(jobs, ids[:3]))
            while decoder.rows:
                decoder.step()
            off = []
            for job in jobs:
                said = [generated.tokens for generated in job.said.values()]
                texts = [*job.continuations, *said]
                for tail, logits in zip(
                    texts, self._plain.logits([(job.prompt + tail, len(tail)) for tail in texts]), strict=True
                ):
                    rows = logits.log_softmax(-1)
                    plain = rows.gather(-1, torch.tensor(tail, device=rows.device)[:, None])[:, 0]
                    # Greedy replies have no scores of their own: each token should be the likeliest.
                    mine = rows.max(-1).values.tolist() if tail in said else job.scores[tail]
                    off += [abs(a - b) for a, b in zip(mine, plain.tolist(), strict=True)]
        mean = sum(off) / len(off)
        exact = next(self.model.parameters()).dtype == torch.float32
        return "" if mean <= (NEAR if exact else NEAR_HALF) else f"scores differ by {mean:.2g} nats a token"

    # --- the work, batch by batch ---

    def _finished(self, jobs: Sequence[Job]) -> Iterator[Job]:
        """Jobs of which something was finished, as it happens. A batch that finds no memory is halved."""
        self.profile.prompts += len(jobs)
        decoder, prefill = self._decoder, self._prefill
        queue = Queue(
            jobs,
            self._limits,
            slots=decoder.limit,
            share=prefill is not None,
            branches=prefill is not None and prefill.layout == "tree",
        )
        decoder.needs = [job.need for job in jobs for _ in job.generations]
        try:
            while queue or decoder.rows:
                prefix: Tokens = ()
                batch: list[Job] = []
                failed: torch.OutOfMemoryError | None = None
                idle = decoder.slots is not None and not decoder.rows
                try:
                    with torch.inference_mode():
                        if queue and self._may_enter(queue.next):
                            prefix, batch = queue.take(decoder.room(queue.next.need))
                            done = self._run(batch, prefix)
                        else:
                            done = [row.job for row in decoder.step()]
                except torch.OutOfMemoryError as error:
                    failed = error
                if failed is not None:  # outside of the handler; the traceback holds what the pass had allocated
                    failed = failed.with_traceback(None)
                    if idle:  # slots that are kept for replies to come: what is at hand goes first
                        decoder.clear()
                        queue.put_back(batch, prefix)
                    else:
                        self._halve(queue, batch, prefix, failed)
                    if self.device.type == "cuda":
                        torch.cuda.empty_cache()
                    continue
                yield from done
        finally:
            decoder.rest()
            if prefill is not None:
                prefill.forget()

    def _may_enter(self, job: Job) -> bool:
        """Prompts are run a few at a time: a quarter of the slots must be free, unless nothing else is left to do."""
        if not self._decoder.rows or not job.generations:
            return True
        most = self._decoder.most
        return self._decoder.room(job.need) >= max(1, most // 4, min(most, len(job.generations)))

    def _run(self, batch: Sequence[Job], prefix: Tokens) -> list[Job]:
        """Jobs of the batch that have something new to tell; the others' replies have only begun."""
        if self._prefill is None:
            self._plain(batch, self._limits.rows)
            return list(batch)
        begun = self._prefill(batch, prefix)
        return [*batch, *(row.job for row in self._decoder.enter(begun))]

    def _halve(self, queue: Queue, batch: Sequence[Job], prefix: Tokens, error: torch.OutOfMemoryError) -> None:
        """Memory ran out, in a prefill of ``batch`` or (no batch) in a decode step: go on with half of the rows."""
        decoder, limits = self._decoder, self._limits
        self.profile.halvings += 1
        if self._prefill is not None:
            self._prefill.forget()
        rows = len(decoder.rows)
        if len(batch) > 1:
            limits.rows = (len(batch) + 1) // 2
            queue.put_back(batch, prefix)
        elif batch and limits.rows > 1 and self._prefill is None:
            limits.rows //= 2  # a job's texts are rows of their own
            queue.put_back(batch, prefix)
        elif batch and len(halves := batch[0].halves()) > 1:
            queue.put_back(halves, prefix)
        elif batch and (rows or (decoder.limit > 1 and batch[0].generations)):
            decoder.limit = max(1, decoder.limit // 2)
            queue.put_back(decoder.evict())
            queue.put_back(batch, prefix)
        elif rows > 1:
            decoder.limit = rows // 2
            queue.put_back(decoder.evict())
        else:
            raise ValueError(
                f"out of memory on {self.device} with a single row; use fewer --shots, a smaller --max-tokens or "
                "--dtype, or a larger device (what is scored so far is kept)"
            ) from error


def window_of(config: Any) -> int:
    """The window of a model with this configuration (tokens); where it does not tell, 2**31."""
    text = _text_of(config)
    return int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2**31)


def _text_of(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _reply(request: Request, job: Job) -> Reply | None:
    """None: something of it is still to be done."""
    if any(tail not in job.scores for tail in request.continuations):
        return None
    if request.generation is not None and request.generation not in job.said:
        return None
    said = job.said[request.generation] if request.generation is not None else None
    return Reply(logprobs=tuple(job.scores[tail] for tail in request.continuations), generated=said)


def _tie(reply: Reply) -> bool:
    """The best two continuations are nearer than rounding may move them."""
    return len(reply.logprobs) > 1 and len(best([sum(row) for row in reply.logprobs])) > 1
