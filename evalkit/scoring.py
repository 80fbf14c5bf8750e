"""Reply -> outcome, in each mode."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from evalkit.encoding import CLOSE, OPEN
from evalkit.extract import UNPARSED, Extraction, extract
from evalkit.markers import line_end
from evalkit.records import GENERATION, LOGLIKELIHOOD, Generated, Item, Normalisation, Outcome, Rules, Verdict
from evalkit.views import Ask

TIE = 1e-5
"""Scores a and b tie when |a - b| <= TIE * max(1, |a|): float32 results of one computation, batched in two ways,
differ by less."""


def can_normalise(outcome: Outcome, normalisation: Normalisation) -> bool:
    """Whether ``outcome`` holds what ``normalisation`` needs."""
    needs = {"token": outcome.tokens, "character": outcome.characters, "byte": outcome.bytes, "pmi": outcome.blind}
    return normalisation == "raw" or bool(needs[normalisation])


def normalised(outcome: Outcome, normalisation: Normalisation) -> tuple[float, ...]:
    """One score a choice under ``normalisation``; ValueError where "pmi" was not scored in this view."""
    sums = outcome.logprobs
    if normalisation == "raw":
        return sums
    if normalisation == "pmi":
        if not outcome.blind:
            raise ValueError(f"view {outcome.view!r} was scored without the blind prompt that 'pmi' needs")
        return tuple(a - b for a, b in zip(sums, outcome.blind, strict=True))
    if not can_normalise(outcome, normalisation):
        raise ValueError(f"view {outcome.view!r} was scored without the lengths that {normalisation!r} needs")
    lengths = {"token": outcome.tokens, "character": outcome.characters, "byte": outcome.bytes}[normalisation]
    return tuple(a / max(1, length) for a, length in zip(sums, lengths, strict=True))


def best(scores: Sequence[float]) -> tuple[int, ...]:
    """The choices that share the highest score, lowest index first."""
    top = max(scores)
    return tuple(i for i, score in enumerate(scores) if top - score <= TIE * max(1.0, abs(top)))


def rank(scores: Sequence[float], gold: int) -> tuple[Verdict, int | None, tuple[int, ...]]:
    """(outcome, choice, tied): a tie that holds the gold is ambiguous; one between wrong choices is wrong."""
    top = best(scores)
    if len(top) == 1:
        return ("correct" if top[0] == gold else "wrong"), top[0], ()
    return ("ambiguous" if gold in top else "wrong"), None, top


def score_loglikelihood(
    view: str,
    ask: Ask,
    item: Item,
    rows: Sequence[Sequence[float]],
    blind: Sequence[Sequence[float]],
    normalisation: Normalisation,
) -> Outcome:
    """``rows``: for each choice the log-probability of each of its tokens (nats); ``blind``: without the question."""
    sums, alone = _sums(rows), _sums(blind)
    if not all(map(math.isfinite, (*sums, *alone))):
        found = sums if not all(map(math.isfinite, sums)) else alone
        raise ValueError(
            f"{item.id}: the model's log-probabilities are not finite ({found}); is it loaded in a dtype it bears?"
        )
    outcome = Outcome(
        mode=LOGLIKELIHOOD,
        view=view,
        outcome="wrong",
        logprobs=sums,
        tokens=tuple(len(row) for row in rows),
        characters=tuple(len(answer) for answer in ask.answers),
        bytes=tuple(len(answer.encode()) for answer in ask.answers),
        blind=alone,
    )
    return decide(outcome, item.gold, item.choices, normalisation, item.also)


def _sums(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    # Not fsum: of +inf and -inf it raises before the item can be named.
    return tuple(float(sum(row)) if not all(map(math.isfinite, row)) else math.fsum(row) for row in rows)


def decide(
    outcome: Outcome, gold: int, choices: Sequence[str], normalisation: Normalisation, also: Sequence[int] = ()
) -> Outcome:
    """The same scores, ranked under ``normalisation``; no model needed. ``also``: other right choices.

    Choices of equal text are one answer, as they are in generation: a tie among them is none.
    """
    verdict, choice, tied = rank(normalised(outcome, normalisation), gold)
    best_texts = {choices[i] for i in (tied or (choice,)) if i is not None}
    right_texts = {choices[i] for i in (gold, *also)}
    if len(best_texts) == 1 or best_texts <= right_texts:
        verdict = "correct" if best_texts <= right_texts else "wrong"
        choice, tied = choices.index(choices[tied[0]]) if tied else choice, ()
    elif best_texts & right_texts:
        verdict = "ambiguous"
    return replace(outcome, outcome=verdict, choice=choice, tied=tied, answer="" if choice is None else choices[choice])


_THOUGHT = re.compile(r"<think>(.*?)(?:(</think>)\s*|\Z)", re.DOTALL)


def score_generation(view: str, ask: Ask, item: Item, said: Generated, rules: Rules) -> Outcome:
    """Extract the answer and compare it with the gold; a thinking block the model opened itself is set apart."""
    text = said.text
    head, closed, _ = text.partition(CLOSE)
    if closed and OPEN not in head:  # a block that the prompt, or nobody, opened
        text = OPEN + text
    blocks = list(_THOUGHT.finditer(text))
    reply = _THOUGHT.sub("", text)
    cut_in = said.cut_in or ("" if said.finish != "length" else "answer")
    if blocks and not blocks[-1][2] and said.finish == "length":
        cut_in = "thought"
    found = UNPARSED if cut_in == "thought" else _judged(ask, item, reply) or extract(reply, ask, item, rules)
    return Outcome(
        mode=GENERATION,
        view=view,
        outcome=_verdict(found, view, ask, item, reply, cut_in),
        choice=found.choice,
        answer=found.answer,
        reply=reply,
        thought="\n".join(thought for thought in (said.thought, *(block[1].strip() for block in blocks)) if thought),
        span=found.span,
        rule=found.rule,
        finish=said.finish,
        cut_in=cut_in,
        num_tokens=len(said.tokens),
    )


def _judged(ask: Ask, item: Item, reply: str) -> Extraction | None:
    """The verdict of the item's own judge; None: it has none."""
    if ask.judge is None:
        return None
    right, answer = ask.judge(reply)
    if right is None or not (right or reply.strip()):
        return UNPARSED
    at = reply.rfind(answer)
    span = (at, at + len(answer)) if at >= 0 and answer else None
    return Extraction(status="parsed", choice=item.gold if right else None, answer=answer, span=span, rule="judge")


def _cut_short(found: Extraction, view: str, ask: Ask, reply: str) -> bool:
    """Whether the token limit may have taken what would have been read instead, or the rest of what was: a number's
    digits, a list's or a free answer's end; or, where options are named by letters or several were named, the answer
    that the reasoning which mentions them led to. A marked answer was there whole; so was one at the reply's start,
    except in view cot, where words behind it on its line may be the start of the reasoning."""
    mentioned = found.rule in ("bare letter", "option text", "mention")
    if found.rule == "last line" or (mentioned and (ask.reads == "letter" or found.status == "ambiguous")):
        return True
    if found.status == "ambiguous":
        return False
    if view == "cot" and ask.reads == "letter" and found.rule == "whole reply" and found.span is not None:
        return any(c.isalnum() for c in reply[found.span[1] : line_end(reply, found.span[1])])
    at_end = found.span is not None and found.span[1] >= len(reply.rstrip())
    return at_end and (ask.reads in ("number", "list") or found.choice is None)


def _verdict(found: Extraction, view: str, ask: Ask, item: Item, reply: str, cut_in: str) -> Verdict:
    cut = bool(cut_in) and found.rule != "" and _cut_short(found, view, ask, reply)
    if found.status == "ambiguous" and not cut:
        return "ambiguous"
    if found.status == "parsed" and not cut:
        same = found.choice is not None and item.choices[found.choice] in item.answers
        return "correct" if same else "wrong"
    if cut_in:
        return "truncated"
    return "unparsed" if reply.strip() else "empty"
