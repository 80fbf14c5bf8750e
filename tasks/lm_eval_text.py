"""A document of lm-evaluation-harness -> an item in both modes.

lm-eval itself writes the prompt and draws the few-shot examples; what it writes is kept byte by byte (view
``native``). For generation the options are listed with letters between that text and its cue (view ``letters``),
unless the text lists them already.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from evalkit.records import Example, Item, Native
from evalkit.selection import digest, reordered
from evalkit.views import CUE, labels, lettered

_CUE = re.compile(r"\n[ \t]*([^\n:：]{1,40}[:：])$")
_BETWEEN = re.compile(r"\W{0,12}(?:\w{1,5}\W{1,6})?")
"""What may stand between two options of one list: "yes or no", "True, False, or Neither", "A. x\\nB. y"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A document as lm-eval puts it to a model."""

    doc: Any
    native: Native
    """Without what the options add."""
    shots: tuple[Any, ...]
    """The documents behind ``native.examples``."""


class Writer:
    """Has lm-eval write documents, and notes of which turns the text is made."""

    def __init__(self, task: Any, shots: int) -> None:
        self.task = task
        self.shots = shots
        self._turns: list[list[Any]] = []
        self._drawn: list[Any] = []
        build, sample = task.build_qa_turn, task.sampler.sample

        def noted_turn(**parts: Any) -> Any:
            self._turns.append(build(**parts))
            return self._turns[-1]

        def noted_sample(*args: Any, **kwargs: Any) -> Any:
            self._drawn = list(sample(*args, **kwargs))
            return self._drawn

        task.build_qa_turn, task.sampler.sample = noted_turn, noted_sample

    def documents(self) -> Iterator[Written]:
        """Every document, in lm-eval's order: its sampler draws anew for each, so none may be skipped."""
        for doc in self.task.task_docs:
            self._turns, self._drawn = [], []
            context = self.task.fewshot_context(doc, self.shots, gen_prefix=self.task.doc_to_prefix(doc))
            if len(self._drawn) != self.shots:
                raise ValueError(f"{self.shots} examples were asked for, and it gives {len(self._drawn)}")
            first = context[0] if isinstance(context, list) else context
            shots, (user, *begun) = self._turns[: self.shots], self._turns[self.shots]
            own = "".join(message.to_text() for turn in (*shots, [user, *begun]) for message in turn)
            prefix = f"{user._delimiter}{begun[0].content}" if begun else ""
            # lm-eval, too, scores white space at the prompt's end with the answer.
            end = prefix or user.content
            yield Written(
                doc=doc,
                native=Native(
                    question=user.content if begun else end.rstrip(),
                    prefix=prefix.rstrip(),
                    joint=end[len(end.rstrip()) :] + self.task.config.target_delimiter,
                    before=first.removesuffix(own),
                    examples=tuple(map(_example, shots)),
                ),
                shots=tuple(self._drawn),
            )


def _example(turn: Sequence[Any]) -> Example:
    user, *said = turn
    reply, gap = (said[0].content, said[0]._delimiter) if said else ("", "")
    return Example(question=user.content, joint=user._delimiter, reply=reply, gap=gap)


# --- multiple choice -----------------------------------------------------------------------------------------------


def choice_items(task: Any, name: str, shots: int) -> tuple[list[Item], list[str]]:
    """(items, what is wrong with each document that makes none)."""
    documents = list(Writer(task, shots).documents())
    mixed = one_place(options(task, written.doc) for written in documents)
    pool = itertools.islice(task.fewshot_docs() or () if shots else (), POOL)
    form = _Form(
        mixed=mixed,
        examples=mixed or one_place(options(task, doc, task.fewshot_cfg) for doc in pool),
        cue=_common_cue(written.native.question for written in documents),
    )
    items, bad = [], []
    for at, written in enumerate(documents):
        try:
            items.append(_choice_item(task, f"{name}-{at:05d}", written, form))
        except ValueError as error:
            bad.append(str(error))
    return items, bad


POOL = 200
"""Documents that examples come from whose golds' places are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """What view ``letters`` does in all documents of a task."""

    mixed: bool
    """Options are listed in an order by hash: where the gold always stands at one place, its letter gives it away."""
    examples: bool
    """So are the examples'."""
    cue: str


def one_place(listed: Iterable[tuple[Sequence[str], Sequence[int]]]) -> bool:
    """Whether one place, from the front or from the back, holds a right choice in all documents that have one.

    listed: (choices, the right ones' places) of each document.
    """
    known = [(len(choices), golds) for choices, golds in listed if golds]
    front = [set(golds) for _, golds in known]
    back = [{gold - n for gold in golds} for n, golds in known]
    return bool(known) and bool(set.intersection(*front) or set.intersection(*back))


def _common_cue(questions: Iterable[str]) -> str:
    """The last line that asks for the answer, if it is the same everywhere; a text that ends in "He said:" does not."""
    cues = {found[1] if (found := _CUE.search(question)) else "" for question in questions}
    return cues.pop() if len(cues) == 1 else ""


def _choice_item(task: Any, one: str, written: Written, form: _Form) -> Item:
    choices, golds = options(task, written.doc)
    if not golds:
        raise ValueError(f"{one}: lm-eval names no right one of its {len(choices)} choices")
    native = written.native
    if task.multiple_input:
        ending = str(task.doc_to_target(written.doc))
        around, texts = gap(choices)
        stem, cue = f"{around[0]}_{around[1]}{native.joint}{ending}".strip(), CUE
        native = replace(native, question="", around=around, ending=ending)
    else:
        listed, texts = listing(native.question, choices)
        stem, cue = cut_cue(native.question, form.cue)
        native = replace(native, listed=listed, labels=() if texts == tuple(choices) else tuple(choices))
    examples = tuple(_lettered_examples(task, written, form))
    native = replace(native, stem=stem, cue=cue, examples=examples)
    item = Item(
        id=one, question=native.question or stem, choices=texts, gold=golds[0], also=tuple(golds[1:]), native=native
    )
    return reordered(item, _order(one, len(texts))) if form.mixed and not native.listed else item


def options(task: Any, doc: Any, config: Any = None) -> tuple[list[str], list[int]]:
    """(choices, the right ones' places) as lm-eval's own metric takes them; ``config``: of few-shot examples."""
    own = (config.doc_to_text, config.doc_to_choice, config.doc_to_target) if config else (None, None, None)
    choices = list(task.doc_to_choice(doc, own[1]))
    gold = task.doc_to_text(doc, own[0]) if task.multiple_input else task.doc_to_target(doc, own[2])
    golds = gold if isinstance(gold, list) else [gold]
    golds = [choices.index(one) if isinstance(one, str) and one in choices else one for one in golds]
    return choices, [one for one in dict.fromkeys(golds) if isinstance(one, int) and 0 <= one < len(choices)]


def _lettered_examples(task: Any, written: Written, form: _Form) -> Iterator[Example]:
    for example, doc in zip(written.native.examples, written.shots, strict=True):
        choices, golds = options(task, doc, task.fewshot_cfg)
        listed, texts = listing(example.question, choices)
        stem, cue = cut_cue(example.question.rstrip(), form.cue)
        if task.multiple_input:
            around, texts = gap(choices)
            stem, cue = f"{around[0]}_{around[1]}{example.joint}{example.reply}".strip(), CUE
        if listed == "letters" or not golds:
            yield replace(example, lettered=(example.question, example.reply))
            continue
        order = _order(stem, len(texts)) if form.examples and not listed else list(range(len(texts)))
        question = lettered(stem, [texts[i].strip() for i in order], cue)
        yield replace(example, lettered=(question, labels(len(texts))[order.index(golds[0])]))


def _order(seed: str, n: int) -> list[int]:
    return sorted(range(n), key=lambda i: digest("place", seed, i))


def gap(contexts: Sequence[str]) -> tuple[tuple[str, str], tuple[str, ...]]:
    """((what all contexts begin with, what all end with), what each has in between), cut at words.

    Where nothing is left of one in between, the whole contexts are.
    """
    head = os.path.commonprefix(list(contexts))
    head = head[: head.rfind(" ") + 1]
    rest = [context[len(head) :] for context in contexts]
    tail = os.path.commonprefix([text[::-1] for text in rest])[::-1]
    tail = tail[tail.find(" ") :] if " " in tail else ""
    middles = tuple(text.removesuffix(tail) for text in rest)
    return ((head, tail), middles) if all(map(str.strip, middles)) else (("", ""), tuple(contexts))


def cut_cue(question: str, cue: str) -> tuple[str, str]:
    """(question, its last line ``cue``); "A:" would look like an option, so it becomes "Answer:"."""
    found = _CUE.search(question)
    if found is None or found[1] != cue or not question[: found.start()].strip():
        return question, CUE
    cue = CUE if len(found[1]) <= 2 else found[1]
    return question[: found.start()].rstrip(), cue


def listing(question: str, choices: Sequence[str]) -> tuple[Literal["", "letters", "words"], tuple[str, ...]]:
    """(how ``question`` lists the choices, the texts of the options).

    Choices that are letters themselves ("A", "(B)") stand for the texts behind these letters in the question, and
    choices that bring their letter along ("(A) 12") for what is behind it.
    """
    names = labels(len(choices))
    if [choice.strip(" ().:").upper() for choice in choices] == list(names):
        return "letters", _behind(question, names) or tuple(choices)
    own = [
        re.match(rf"\(?{name}[.):]\s*(.+)", choice.strip(), re.S) for name, choice in zip(names, choices, strict=True)
    ]
    if all(own) and all(_last(question, choice.strip()) for choice in choices):
        return "letters", tuple(found[1] for found in own if found)
    places = [_last(question, choice.strip()) for choice in choices]
    if not all(places):
        return "", tuple(choices)
    spans = [place for place in places if place]
    ordered = sorted(spans)
    if not all(_BETWEEN.fullmatch(question[a[1] : b[0]]) for a, b in zip(ordered, ordered[1:], strict=False)):
        return "", tuple(choices)
    before = (question[:start].rstrip(" \t") for start, _ in spans)
    marks = [re.search(rf"(?:^|\W)({'|'.join(names)})[.:)]$", text) for text in before]
    found = [mark[1] if mark else "" for mark in marks]
    if found != list(names) and all(found):
        return "", tuple(choices)  # a letter would stand for another choice than its place
    return "letters" if found == list(names) else "words", tuple(choices)


def _last(question: str, choice: str) -> tuple[int, int] | None:
    """Where ``choice`` stands last, as words of its own."""
    if not choice:
        return None
    found = list(re.finditer(rf"(?<!\w){re.escape(choice)}(?!\w)", question, re.IGNORECASE))
    return found[-1].span() if found else None


def _behind(question: str, names: Sequence[str]) -> tuple[str, ...] | None:
    """The texts behind the last list of ``names`` in the question; None: it has no such list."""
    marks = [rf"(?:^|[\n \t])\(?{name}[.:)][ \t]*" for name in names]
    middle = "(.+?)".join(marks)
    found = re.match(rf"(?s).*{middle}([^\n]+)", question)
    texts = tuple(text.strip() for text in found.groups()) if found else ()
    return texts if texts and all(texts) else None
