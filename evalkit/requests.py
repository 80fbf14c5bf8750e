"""Item -> requests: what an engine is asked, and where in its replies each outcome's figures stand."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evalkit.encoding import CLOSE, Encoder, closing
from evalkit.records import GENERATION, LOGLIKELIHOOD, Generation, Item, Request, Thought
from evalkit.registry import Task
from evalkit.settings import Settings
from evalkit.views import Ask, ask, blind

Place = tuple[int, int]
"""(request, continuation)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A log-likelihood outcome to be: its choices' places, with and without the question."""

    view: str
    ask: Ask
    places: tuple[Place, ...]
    blind: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is asked about one item. Prompts of equal tokens are one request, whichever mode they serve."""

    item: Item
    requests: tuple[Request, ...]
    scored: tuple[Scored, ...]
    said: tuple[str, Ask, int] | None
    """(view, ask, request) of the generated reply."""
    prompts: dict[str, str]
    prompt_sha256: str
    cut: int


class _Requests:
    """Collects requests, merging those whose prompts are the same tokens."""

    def __init__(self, max_length: int, bos: int | None) -> None:
        self.max_length = max_length
        self.bos = bos
        self.requests: list[Request] = []
        self.index: dict[tuple[int, ...], int] = {}
        self.cut = 0

    def add(self, prompt: list[int], reserve: int) -> int:
        """Index of the request with this prompt, cut on the left (BOS kept) to leave ``reserve`` tokens of window."""
        room = self.max_length - reserve
        kept = 1 if prompt[0] == self.bos else 0  # whoever wrote it: the tokenizer or the chat template
        if room < kept + 1 and room < len(prompt):
            raise ValueError(
                f"the model's window of {self.max_length} tokens has no room for a prompt beside {reserve} tokens of "
                f"answer; lower --max-tokens or the thinking budget"
            )
        over = max(0, len(prompt) - room)
        if over:
            prompt = [*prompt[:kept], *prompt[kept + over :]]
            self.cut = max(self.cut, over)
        key = tuple(prompt)
        if key not in self.index:
            self.index[key] = len(self.requests)
            self.requests.append(Request(prompt=key))
        return self.index[key]

    def score(self, request: int, tails: Sequence[Sequence[int]]) -> tuple[Place, ...]:
        """Places of ``tails`` in the request; a continuation asked for twice is scored once."""
        known = list(self.requests[request].continuations)
        for tail in map(tuple, tails):
            if tail not in known:
                known.append(tail)
        self.requests[request] = replace(self.requests[request], continuations=tuple(known))
        return tuple((request, known.index(tuple(tail))) for tail in tails)

    def generate(self, request: int, generation: Generation) -> None:
        assert self.requests[request].generation is None, "one reply an item"
        self.requests[request] = replace(self.requests[request], generation=generation)


def plan(task: Task, item: Item, shots: Sequence[Item], encoder: Encoder, settings: Settings, max_length: int) -> Plan:
    """The requests for ``item``. With generation in a view of its own, that view is scored by log-likelihood too:
    it is the same request, and it splits a protocol gap into the mode's part and the view's."""
    try:
        return _plan(task, item, shots, encoder, settings, max_length)
    except ValueError as error:
        raise error if str(error).startswith(f"{item.id}: ") else ValueError(f"{item.id}: {error}") from error


def _plan(task: Task, item: Item, shots: Sequence[Item], encoder: Encoder, settings: Settings, max_length: int) -> Plan:
    requests = _Requests(max_length, encoder.tokenizer.bos_token_id)
    prompts: dict[str, str] = {}
    texts: list[str] = []
    scored: list[Scored] = []
    said: tuple[str, Ask, int] | None = None
    ll_view, gen_view = settings.views_of(task)
    ll_views = list(dict.fromkeys((ll_view, gen_view) if GENERATION in settings.modes else (ll_view,)))

    def written(view: str, closed: bool) -> tuple[Ask, str]:
        one = ask(view, task, item)
        text = encoder.prompt([ask(view, task, shot) for shot in shots], one, closed=closed)
        scored_texts = one.answers if item.native is None else [encoder.answer(one, answer) for answer in one.answers]
        texts.extend([text, *one.contexts, *one.questions, *scored_texts])
        return one, text

    def score(view: str, one: Ask, text: str) -> tuple[Place, ...]:
        if one.contexts:
            return _score_contexts(requests, encoder, one, text)
        if one.questions:
            return _score_questions(requests, encoder, one)
        prompt, tails = encoder.join(text, [encoder.answer(one, answer) for answer in one.answers])
        longest = max(map(len, tails))
        # Both modes cut an overlong prompt alike, so that they still see the same one.
        reserve[view] = max(longest, reserve.get(view, 0))
        return requests.score(requests.add(prompt, reserve[view]), tails)

    reserve: dict[str, int] = {}
    if GENERATION in settings.modes:
        reserve[gen_view] = _limit(settings, ask(gen_view, task, item))
    if LOGLIKELIHOOD in settings.modes:
        for view in ll_views:
            one, text = written(view, closed=True)
            apart = one.contexts or one.questions
            prompts[view] = text + (f" [{' | '.join(apart)}]" if apart else "")
            hidden: tuple[Place, ...] = ()
            if view == ll_view or "pmi" in (settings.normalisation, task.normalisation):
                bare = blind(view, task, item)
                hidden = score(view, bare, encoder.prompt([], bare, closed=True))
            scored.append(Scored(view=view, ask=one, places=score(view, one, text), blind=hidden))
    if GENERATION in settings.modes:
        one, text = written(gen_view, closed=False)
        if one.questions:
            raise ValueError(
                f"view {gen_view!r} has a prompt for each choice and can't generate; give generation another one, "
                f"e.g. --view {gen_view}:{task.generation}"
            )
        prompts.setdefault(gen_view, text)
        if prompts[gen_view] != text:  # log-likelihood came after a closed thinking block
            prompts[f"{gen_view} (thinking)"] = text
        limit = _limit(settings, one)
        budget = settings.thought_budget()
        thought = Thought(max_tokens=budget[0], close=CLOSE, force=budget[1]) if budget else None
        room = reserve[gen_view]
        if thought:
            shut = encoder.tokenizer.encode(closing(thought.close), add_special_tokens=False)
            room += thought.max_tokens + len(shut)
        request = requests.add(encoder.encode(text), room)
        requests.generate(
            request,
            Generation(
                max_tokens=limit,
                stops=() if encoder.chat and one.judge is None else one.stops,
                temperature=settings.temperature,
                seed=settings.seed,
                thought=thought,
            ),
        )
        said = (gen_view, one, request)
    return Plan(
        item=item,
        requests=tuple(requests.requests),
        scored=tuple(scored),
        said=said,
        prompts=prompts,
        prompt_sha256=hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        cut=requests.cut,
    )


def _limit(settings: Settings, one: Ask) -> int:
    return settings.max_tokens or one.max_tokens


def _score_contexts(requests: _Requests, encoder: Encoder, one: Ask, text: str) -> tuple[Place, ...]:
    """View ``blank``: a prompt for each choice, one and the same text scored after all of them."""
    header = text if encoder.chat else text.removesuffix(one.question)
    places: list[Place] = []
    for context, answer in zip(one.contexts, one.answers, strict=True):
        prompt, tails = encoder.join(header + context, [" " + answer])
        places += requests.score(requests.add(prompt, len(tails[0])), tails)
    return tuple(places)


def _score_questions(requests: _Requests, encoder: Encoder, one: Ask) -> tuple[Place, ...]:
    """A prompt for each choice, examples and all, and one and the same answer scored after all of them."""
    places: list[Place] = []
    for question, answer in zip(one.questions, one.answers, strict=True):
        text = encoder.prompt([], replace(one, question=question), closed=True)
        prompt, tails = encoder.join(text, [encoder.answer(one, answer)])
        places += requests.score(requests.add(prompt, len(tails[0])), tails)
    return tuple(places)
