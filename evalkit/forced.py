"""Teacher forcing: two models read one reply, and what each would say next is compared step by step.

A step is a token of the teacher's reply, and the end of the reply where the teacher ended it itself. At each step
KL(teacher || student) = sum over the vocabulary of p (log p - log q), in nats, from float32 log-softmax. A stop string
is no step: a run keeps the text before it.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from evalkit.encoding import Encoder, Tokenizer
from evalkit.engines.hf import HFEngine
from evalkit.records import GENERATION, ItemRecord

LOGITS = 2**28
"""Logits of one model held at a time: 1 GiB."""
CHUNK = 128
"""Steps of a reply compared at a time: over a vocabulary of 150,000 they are 75 MB a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A reply of the teacher as tokens."""

    item: str
    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    ended: bool
    """By an end-of-sequence token: saying nothing more is a step as well."""
    respelled: bool
    """The tokens are not those that were generated: the same text has several spellings, and a run keeps the text."""

    @property
    def steps(self) -> int:
        return len(self.reply) + self.ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Forced:
    """One reply read by both models."""

    item: str
    steps: int
    kl: float
    """KL(teacher || student), mean over the steps (nats)."""
    first: int | None
    """The first step, from 0, at which the student's likeliest token is not the teacher's. None: there is none."""
    logprob: float
    """The student's, of the reply's tokens together, without the end (nats)."""


def said_by(record: ItemRecord, view: str, encoder: Encoder) -> Said | str:
    """The reply as tokens, after the prompt's as the engine had them; or why it can't be rebuilt: "cut" (the prompt was
    cut to the window), "thought" (the model opened a thinking block), "empty" (no step)."""
    outcome = record.outcome(GENERATION, view)
    if outcome is None:
        raise ValueError(f"{record.item}: no reply in view {view!r}; score the run with --mode both")
    if record.cut:
        return "cut"
    if outcome.thought or outcome.cut_in == "thought":
        return "thought"
    prompt = encoder.encode(record.prompts[view])
    whole = encoder.encode(record.prompts[view] + outcome.reply)
    # Generation starts after the prompt's own tokens, so one that would span the join was not generated.
    joined = whole[: len(prompt)] == prompt
    reply = whole[len(prompt) :] if joined else encoder.tokenizer.encode(outcome.reply, add_special_tokens=False)
    ended = outcome.finish == "eos"
    if not reply and not ended:
        return "empty"
    # The text ends before a stop string, whose tokens were counted.
    other = len(reply) > outcome.num_tokens if outcome.finish == "stop" else len(reply) != outcome.num_tokens
    return Said(item=record.item, prompt=tuple(prompt), reply=tuple(reply), ended=ended, respelled=other)


def forced(
    said: Sequence[Said],
    teacher: HFEngine,
    student: HFEngine,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Forced]:
    """Both models on every reply; the batches change nothing but rounding.

    ValueError: a model's window is too short, or one gives no finite KL.
    """
    for who, engine in (("teacher", teacher), ("student", student)):
        for one in said:
            if len(one.prompt) + one.steps > engine.max_length + 1:  # the last token is predicted, not read
                raise ValueError(
                    f"{one.item}: prompt and reply are {len(one.prompt) + len(one.reply)} tokens and the {who}'s "
                    f"window holds {engine.max_length}; score the run with fewer --shots or --max-tokens"
                )
    found: dict[int, Forced] = {}
    tokenizer: Any = teacher.tokenizer
    vocabulary = 1 + max(tokenizer.get_vocab().values())
    for chosen in _batches(said, min(teacher.batch_size, student.batch_size), vocabulary):
        # What stands in the place of the end is predicted, not read, and its log-probability is not asked for.
        rows = [(said[i].prompt + said[i].reply + (0,) * said[i].ended, said[i].steps) for i in chosen]
        for i, p, q in zip(chosen, teacher.logits(rows), student.logits(rows), strict=True):
            found[i] = read_reply(said[i], p, q, vocabulary)
        report(len(found), len(said))
    return [found[i] for i in range(len(said))]


def _batches(said: Sequence[Said], size: int, vocabulary: int) -> Iterator[list[int]]:
    """Long replies first, and as few in a batch as keep its logits within bounds (those between the first and the last
    column that any row asks for)."""
    order = sorted(range(len(said)), key=lambda i: (-len(said[i].prompt) - said[i].steps, i))
    batch: list[int] = []
    for i in order:
        grown = [*batch, i]
        first = min(len(said[j].prompt) for j in grown)
        last = max(len(said[j].prompt) + said[j].steps for j in grown)
        if batch and (len(grown) > size or len(grown) * (last - first) * vocabulary > LOGITS):
            yield batch
            grown = [i]
        batch = grown
    if batch:
        yield batch


@torch.inference_mode()  # type: ignore[untyped-decorator]
def read_reply(said: Said, teacher: torch.Tensor, student: torch.Tensor, vocabulary: int) -> Forced:
    """``teacher``, ``student``: float32 logits [steps, width of the head]."""
    width = teacher.shape[-1]
    if student.shape[-1] != width:  # heads are padded to round numbers; no token stands behind the padding
        width = min(width, student.shape[-1])
        if width < vocabulary:
            raise ValueError(f"a model's head has {width} rows, fewer than the tokenizer's {vocabulary} tokens")
    total, first, logprob = 0.0, None, 0.0
    for start in range(0, said.steps, CHUNK):
        log_p = F.log_softmax(teacher[start : start + CHUNK, :width], -1)
        log_q = F.log_softmax(student[start : start + CHUNK, :width].to(log_p.device), -1)
        p = log_p.exp()
        # A token that the teacher rules out adds nothing, whatever the student makes of it.
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
        total += float(kl.double().sum())
        if first is None:
            other = (log_p.argmax(-1) != log_q.argmax(-1)).nonzero()
            first = start + int(other[0]) if len(other) else None
        target = torch.tensor(said.reply[start : start + CHUNK], dtype=torch.long, device=log_q.device)
        logprob += float(log_q[: len(target)].gather(-1, target[:, None]).double().sum())
    if not math.isfinite(total) or not math.isfinite(logprob):
        raise ValueError(
            f"{said.item}: KL is {total} and the student's log-probability {logprob}; a model's weights are damaged, "
            "or it rules a token out that the other allows"
        )
    # Rounding can leave a sum of some 1e-8 below 0.
    kl_mean = max(0.0, total / said.steps)
    return Forced(item=said.item, steps=said.steps, kl=kl_mean, first=first, logprob=logprob)


def tokenizer_difference(one: Any, other: Any) -> str:
    """What two tokenizers differ in, in words; empty: nothing."""
    first, second = one.get_vocab(), other.get_vocab()
    if first != second:
        token = min(dict(first.items() ^ second.items()), key=lambda t: min(first.get(t, 2**31), second.get(t, 2**31)))
        ids = " against ".join(str(vocab.get(token, "none")) for vocab in (first, second))
        return f"their vocabularies ({len(first):,} tokens against {len(second):,}; first {token!r}: {ids})"
    parts = [_sections(tokenizer) for tokenizer in (one, other)]
    names = [name for name in dict.fromkeys((*parts[0], *parts[1])) if parts[0].get(name) != parts[1].get(name)]
    return f"their {', '.join(name.replace('_', ' ') for name in names)}" if names else ""


def _sections(tokenizer: Tokenizer) -> dict[str, Any]:
    """Parts of a fast tokenizer but how its last caller padded or cut a batch; nothing of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    return {name: part for name, part in state.items() if name not in ("padding", "truncation")}
