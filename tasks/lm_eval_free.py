"""Documents of lm-evaluation-harness without choices -> items in both modes.

A generated reply is judged by the task's own filter and metric (the first filter; the first metric that says right or
wrong). Log-likelihood ranks the gold answer against near numbers, where all answers are numbers, or else against
answers of other documents.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from evalkit.numerals import parse_number
from evalkit.records import Item, Native
from evalkit.selection import digest
from tasks.distractors import Ring
from tasks.lm_eval_kinds import metric_of
from tasks.lm_eval_text import Writer
from tasks.numbers import distractors, plain
from tasks.user import NUMBER

Judge = Callable[[str], tuple[bool | None, str]]

INVALID = "[invalid]"
"""What lm-eval's filters give where they find nothing."""


def free_items(task: Any, name: str, shots: int) -> tuple[list[Item], list[str]]:
    """(items, what is wrong with each document that makes none) of a task that generates until a stop."""
    documents = [
        (f"{name}-{at:05d}", written, gold_texts(task, written.doc))
        for at, written in enumerate(Writer(task, shots).documents())
    ]
    short = [[_filtered(task, written.doc, text).strip() for text in golds] for _, written, golds in documents]
    numeric = all(NUMBER.fullmatch(golds[0]) for golds in short if golds)
    ring = Ring(golds[0] for golds in short if golds)
    metric = metric_of(task.config.to_dict(keep_callable=True)) or ""
    items, bad = [], []
    for (one, written, given), golds in zip(documents, short, strict=True):
        try:
            choices, gold = _choices(task, one, written.doc, golds, ring, numeric)
        except ValueError as error:
            bad.append(str(error))
            continue
        native = replace(
            written.native,
            joint=written.native.joint + _lead(given[0]),
            judge=_judge(task, one, written.doc, metric),
            stops=tuple(stop for stop in _until(task) if stop),
            max_tokens=_length(task),
        )
        items.append(_item(one, native, choices, gold, tuple(golds[1:])))
    return items, bad


def word_items(task: Any, name: str, shots: int) -> tuple[list[Item], list[str]]:
    """The same of a task whose one continuation is scored (LAMBADA). Right in generation: the reply begins with it."""
    documents = [
        (f"{name}-{at:05d}", written, str(task.doc_to_target(written.doc)))
        for at, written in enumerate(Writer(task, shots).documents())
    ]
    ring = Ring(target.strip() for _, _, target in documents)
    items, bad = [], []
    for one, written, target in documents:
        word = target.strip()
        try:
            choices, gold = _ranked(one, word, ring.others(one, [word]))
        except ValueError as error:
            bad.append(str(error))
            continue
        # lm-eval joins by what the target begins with, and by nothing else.
        blank = written.native.joint.removesuffix(task.config.target_delimiter)
        native = replace(
            written.native, joint=blank + _lead(target), judge=_begins(word), stops=("\n",), max_tokens=len(word) + 8
        )
        items.append(_item(one, native, choices, gold, ()))
    return items, bad


def _item(one: str, native: Native, choices: tuple[str, ...], gold: int, aliases: tuple[str, ...]) -> Item:
    return Item(id=one, question=native.question, choices=choices, gold=gold, aliases=aliases, native=native)


def gold_texts(task: Any, doc: Any) -> list[str]:
    """All answers that lm-eval takes as right, the first one first."""
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    return [str(text) for text in (target if isinstance(target, list) else [target]) if str(text).strip()]


def _choices(task: Any, one: str, doc: Any, golds: list[str], ring: Ring, numeric: bool) -> tuple[tuple[str, ...], int]:
    if not golds:
        raise ValueError(f"{one}: lm-eval names no answer")
    if task.config.doc_to_choice is not None:
        choices = tuple(str(choice).strip() for choice in task.doc_to_choice(doc))
        return choices, int(task.doc_to_target(doc))
    number = parse_number(golds[0]) if numeric else None
    if number is not None:
        return _ranked(one, plain(number), [plain(value) for value in distractors(number, one)])
    return _ranked(one, golds[0], ring.others(one, golds))


def _ranked(one: str, right: str, wrong: list[str]) -> tuple[tuple[str, ...], int]:
    """(choices, gold's place), in an order drawn from the id."""
    if not wrong:
        raise ValueError(f"{one}: no other document has another answer, so there is nothing to rank {right!r} against")
    texts = [right, *wrong]
    order = sorted(range(len(texts)), key=lambda i: digest("place", one, i))
    return tuple(texts[i] for i in order), order.index(0)


def _lead(text: str) -> str:
    """The white space that a target brings along in front."""
    return text[: len(text) - len(text.lstrip())]


def _until(task: Any) -> list[str]:
    until = task.config.generation_kwargs.get("until") or []
    return [until] if isinstance(until, str) else list(until)


LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""lm-eval's names of one setting; the first given counts."""


def _length(task: Any) -> int:
    """Tokens generated at most."""
    from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS

    given = (task.config.generation_kwargs.get(name) for name in LENGTHS)
    return int(next((value for value in given if value is not None), DEFAULT_MAX_GEN_TOKS))


def _filtered(task: Any, doc: Any, text: str) -> str:
    """A gold answer as the task's filter would read it from a reply ("... #### 72" -> "72"), else the text itself."""
    found = _apply(task, doc, text)
    return found if isinstance(found, str) and found not in ("", INVALID) else text


def _apply(task: Any, doc: Any, text: str) -> Any:
    """``text`` through the task's first filter."""
    from lm_eval.api.instance import Instance

    instance = Instance(request_type="generate_until", doc=doc, arguments=("", {}), idx=0, resps=[text])
    first = task._filters[0]
    first.apply([instance])
    return instance.filtered_resps[first.name]


def _judge(task: Any, one: str, doc: Any, metric: str) -> Judge:
    def judge(reply: str) -> tuple[bool | None, str]:
        read = _apply(task, doc, reply)
        score = task.process_results(doc, [read])[metric]
        if score not in (0, 1):
            raise ValueError(f"{one}: lm-eval's {metric} of a reply is {score}, neither right (1) nor wrong (0)")
        text = read if isinstance(read, str) else ""
        return (None if not score and text in ("", INVALID) else bool(score)), text

    return judge


class NoJudge(ValueError):
    """A task whose metric does not tell right from wrong."""


def try_judge(task: Any, name: str, item: Item) -> None:
    """NoJudge unless the task's metric calls ``item``'s gold answer right and nonsense wrong.

    Code of the task's own may read replies only in a form that its gold answers don't have (minerva_math's "Final
    Answer: ..."), so there 0 or 1 will do for the gold.
    """
    assert item.native is not None and item.native.judge is not None
    doc = next(itertools.islice(task.task_docs, int(item.id.rpartition("-")[2]), None))
    metric = metric_of(task.config.to_dict(keep_callable=True))
    gold = gold_texts(task, doc)[0]
    try:
        read = _apply(task, doc, gold)
        found = read not in (None, "", INVALID, [])
        right = task.process_results(doc, [read if found else gold])[metric]
        wrong = item.native.judge(NONSENSE)[0]
    except Exception as error:  # whatever the metric's code raises
        raise NoJudge(f"{name} can't be judged: {type(error).__name__}: {_line(error)}; {INSTEAD}") from error
    allowed = (0, 1) if task.config.process_results else (1,)
    if right not in allowed or wrong:
        said = f"{metric} of the gold answer {gold!r} is {right}, of nonsense {int(bool(wrong))}"
        raise NoJudge(f"{name} can't be judged: {said}, not 1 and 0; {INSTEAD}")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


NONSENSE = "qwx zvk"
INSTEAD = "score it by --mode loglikelihood"


def _begins(word: str) -> Judge:
    def judge(reply: str) -> tuple[bool | None, str]:
        said = reply.strip()
        right = said.startswith(word) and not said[len(word) :][:1].isalnum()
        return right, word if right else said.partition(" ")[0]

    return judge
