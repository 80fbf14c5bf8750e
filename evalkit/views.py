"""Views: the ways to put one item to a model.

A view gives the text up to the answer, the text of every answer, and how a generated answer is read. It is
the same for both modes, so that a difference between them is the mode's and not the prompt's.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evalkit.records import Example, Item
from evalkit.registry import Task

CUE = "Answer:"
"""What asks for the answer where options are lettered ("A:" would look like one of them) or the task has no cue."""

Reads = Literal["letter", "option", "number", "list"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One item in one view."""

    question: str
    """All text up to the answer; never ends in a space (the space belongs to the answer's first token)."""
    answers: tuple[str, ...]
    """What log-likelihood scores, one a choice, without a leading space."""
    reply: str
    """The gold answer as a few-shot example shows it."""
    reads: Reads
    """How the answer is found in a generated reply."""
    listed: bool
    """The options stand in the question."""
    max_tokens: int
    stops: tuple[str, ...] = ("\n",)
    """Of plain text; in a chat the turn's end stops the reply."""
    contexts: tuple[str, ...] = ()
    """View ``blank`` only: running text up to the scored part, one a choice."""
    joint: str = " "
    """Between question and answer in running text."""
    before: str = ""
    """In front of the examples; in a chat, the system message."""
    examples: tuple[Example, ...] = ()
    """Few-shot examples that belong to the item itself."""
    prefix: str = ""
    """What the answer begins with: the end of the prompt, in running text and in a chat's turn."""
    questions: tuple[str, ...] = ()
    """One a choice, each a prompt of its own in ``question``'s place; the same answer is scored behind all of them."""
    judge: Callable[[str], tuple[bool | None, str]] | None = None
    """Decides on a generated reply in extraction's place (``Native.judge``)."""


def labels(n: int) -> tuple[str, ...]:
    """A to Z, then AA, AB, ... as a spreadsheet's columns go on."""

    def label(i: int) -> str:
        return (label(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)

    return tuple(label(i) for i in range(n))


def _stem(task: Task, item: Item) -> str:
    stem = task.stem.format(question=item.question) if item.question else ""
    return "\n".join(part for part in (item.passage, stem) if part)


def _room(task: Task, item: Item) -> int:
    """Tokens for a reply that is an option's text: half its characters hold the longest, with some to spare."""
    return max(task.max_tokens, max(len(choice) for choice in item.choices) // 2 + 8)


def _lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part).rstrip(" ")


def _label_stop(task: Task) -> str:
    """A plain-text model that goes on to invent the next question has finished its answer."""
    label = task.stem.partition("{")[0].strip()
    return f"\n{label}" if label else "\n\n\n"


def _free(task: Task, item: Item, cue: str, instruction: str = "") -> Ask:
    return Ask(
        question=_lines(_stem(task, item), instruction, cue),
        answers=item.choices,
        reply=item.answer,
        reads="option" if task.answer == "choice" else task.answer,
        listed=False,
        max_tokens=_room(task, item),
    )


def cloze(task: Task, item: Item) -> Ask:
    """The choice's text continues the question (lm-eval's default form); options are not listed."""
    return _free(task, item, task.cue)


def open_(task: Task, item: Item) -> Ask:
    """No options listed, a short free answer asked for."""
    short = "" if task.answer == "list" else "Answer with a word or a short phrase, nothing else."
    return _free(task, item, task.cue or CUE, "Answer with the number only." if task.answer == "number" else short)


def _options(item: Item) -> str:
    return listed(item.choices)


def listed(choices: Sequence[str]) -> str:
    """A line a choice, with its letter."""
    return "\n".join(f"{label}. {choice}" for label, choice in zip(labels(len(choices)), choices, strict=True))


def lettered(stem: str, choices: Sequence[str], cue: str) -> str:
    """The question of view ``letters``."""
    return _lines(stem, listed(choices), cue)


def letters(task: Task, item: Item) -> Ask:
    """Options listed with letters, a letter answers (MMLU's form)."""
    names = labels(len(item.choices))
    if item.native is not None:
        return _native_letters(task, item)
    return Ask(
        question=lettered(_stem(task, item), item.choices, CUE),
        answers=names,
        reply=names[item.gold],
        reads="letter",
        listed=True,
        max_tokens=task.max_tokens,
    )


def text(task: Task, item: Item) -> Ask:
    """Options listed, the option's text answers."""
    return Ask(
        question=_lines(_stem(task, item), *(f"- {choice}" for choice in item.choices), CUE),
        answers=item.choices,
        reply=item.answer,
        reads="option",
        listed=True,
        max_tokens=_room(task, item),
    )


def copy(task: Task, item: Item) -> Ask:
    """Options listed; the reply repeats them, then gives the letter."""
    names, options = labels(len(item.choices)), _options(item)
    ask = "Repeat the options, then give the letter of the right one after 'Answer:'."
    return Ask(
        question=_lines(_stem(task, item), options, ask, "Options:"),
        answers=tuple(f"{options}\nAnswer: {name}" for name in names),
        reply=f"{options}\nAnswer: {names[item.gold]}",
        reads="letter",
        listed=True,
        max_tokens=task.max_tokens + len(options) // 2,
        stops=("\n\n", _label_stop(task)),
    )


def chain_of_thought(task: Task, item: Item) -> Ask:
    """Reasoning, then "The answer is ...". Log-likelihood scores that sentence without any reasoning."""
    numeric = task.answer == "number"
    names = item.choices if numeric else labels(len(item.choices))
    ask = f"Think step by step. End with: The answer is [{'NUMBER' if numeric else 'LETTER'}]."
    endings = tuple(f"The answer is {name}." for name in names)
    return Ask(
        question=_lines(_stem(task, item), "" if numeric else _options(item), ask, CUE),
        answers=endings,
        reply=" ".join(part for part in (item.solution, endings[item.gold]) if part),
        reads="number" if numeric else "letter",
        listed=not numeric,
        max_tokens=task.cot_tokens,
        stops=(_label_stop(task),),
    )


def blank(task: Task, item: Item) -> Ask:
    """The choice fills the gap ``_``; the text after the gap is scored (winogrande's partial evaluation)."""
    parts = re.split(r"_+", item.question)
    if len(parts) != 2 or not parts[1].strip():
        raise ValueError(
            f"{item.id}: view 'blank' needs one gap '_' in the question and text after it, found {item.question!r}"
        )
    contexts = tuple(parts[0] + choice for choice in item.choices)
    suffix = parts[1].strip()
    filled = (contexts[item.gold] + " " + suffix).strip()
    return Ask(
        question=_lines(f"Fill in the blank: {item.question}"),
        answers=(suffix,) * len(item.choices),
        reply=filled,
        reads="option",
        listed=False,
        max_tokens=task.max_tokens,
        contexts=contexts,
    )


def native(task: Task, item: Item) -> Ask:
    """The text that came with the item, byte by byte; the answer is read as the text asks for it."""
    given = item.native
    if given is None:
        raise ValueError(f"{item.id}: view 'native' needs an item whose text is given; choose another view")
    questions = tuple(f"{given.around[0]}{choice}{given.around[1]}" for choice in item.choices) if given.around else ()
    letter = given.listed == "letters"
    room = task.max_tokens if letter else _room(task, item)
    return Ask(
        question=given.question,
        questions=questions,
        answers=(given.ending,) * len(item.choices) if given.around else given.labels or item.choices,
        reply="",
        reads="letter" if letter else "option",
        listed=bool(given.listed),
        max_tokens=given.max_tokens or room,
        # A reply that begins with the line break that joins it to the question would end there.
        stops=given.stops if given.judge else ("\n\n",) if "\n" in given.joint else ("\n",),
        joint=given.joint,
        before=given.before,
        examples=given.examples,
        prefix=given.prefix,
        judge=given.judge,
    )


def _native_letters(task: Task, item: Item) -> Ask:
    """Options listed between the given text and its cue, in the examples too; the text itself where it lists them."""
    given = item.native
    assert given is not None
    if given.listed == "letters":
        return native(task, item)
    names = labels(len(item.choices))
    examples = (replace(x, question=x.lettered[0], reply=x.lettered[1], joint=" ") for x in given.examples)
    return Ask(
        question=lettered(given.stem, [choice.strip() for choice in item.choices], given.cue),
        answers=names,
        reply=names[item.gold],
        reads="letter",
        listed=True,
        max_tokens=task.max_tokens,
        before=given.before,
        examples=tuple(examples),
    )


VIEWS: dict[str, Callable[[Task, Item], Ask]] = {
    "cloze": cloze,
    "open": open_,
    "letters": letters,
    "text": text,
    "copy": copy,
    "cot": chain_of_thought,
    "blank": blank,
    "native": native,
}


def ask(view: str, task: Task, item: Item) -> Ask:
    return VIEWS[view](task, item)


def blind(view: str, task: Task, item: Item) -> Ask:
    """The same answers without the question: what the choices alone give away."""
    if view == "blank":
        seen = blank(task, item)
        return replace(seen, question="Fill in the blank.", contexts=item.choices)
    given = item.native
    if given is not None:
        around = ("", "") if given.around else None
        given = replace(given, question="", stem="", before="", examples=(), prefix="", around=around)
    return VIEWS[view](task, replace(item, question="", passage="", native=given))


_LETTER_STEM = re.compile(r"^[A-Z]{1,2}$")


def chosen_by_label(label: str, n: int) -> int | None:
    """The choice that ``label`` names, or None when there is no such option."""
    if not _LETTER_STEM.match(label):
        return None
    names = labels(n)
    return names.index(label) if label in names else None
