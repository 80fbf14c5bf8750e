"""A user's own questions: a JSONL file becomes a task in both modes, without code.

One object a line, as ``tasks.data.Row`` describes. With ``choices``, every question is multiple choice.
Without, it is open: numbers are ranked against near numbers, texts against up to three answers of other
questions.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evalkit.registry import Task
from evalkit.selection import digest
from tasks.data import Row, answer_text, read_rows, row_item
from tasks.distractors import Ring
from tasks.numbers import number_item

NUMBER = re.compile(r"[-+−]?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")

Rows = Sequence[tuple[int, str, Row]]
"""Line number, item id and content of every line."""


def user_task(path: Path) -> Task:
    """The questions in ``path`` as a task; ValueError names file, line and field."""
    rows = _checked(path)
    if all(row.choices for _, _, row in rows):
        task = _choice_task(path, rows)
    elif all(NUMBER.fullmatch(answer_text(row)) for _, _, row in rows):
        task = _number_task(rows)
    else:
        task = _text_task(path, rows)
    return replace(
        task,
        name=task_name(path),
        summary=f"{len(rows)} questions of {path.name}",
        version=hashlib.sha256(path.read_bytes()).hexdigest()[:12],
        source=path.name,
    )


def task_name(path: Path) -> str:
    """mine.jsonl and mine.jsonl.gz are both task "mine"."""
    return Path(path.name.removesuffix(".gz")).stem


def _checked(path: Path) -> Rows:
    """The file's rows, of one kind and with ids of their own."""
    rows: list[tuple[int, str, Row]] = []
    lines: dict[str, int] = {}
    for number, row in read_rows(path):
        name = row.id or f"{task_name(path)}-{number:05d}"
        if name in lines:
            raise ValueError(f"{path}, line {number}: field 'id': {name!r} is also the id of line {lines[name]}")
        lines[name] = number
        if rows and bool(row.choices) != bool(rows[0][2].choices):
            here, before = ("choices", "none") if row.choices else ("no choices", "some")
            raise ValueError(
                f"{path}, line {number}: field 'choices': this line has {here} and those before it {before}; "
                f"put questions with and without choices in two files"
            )
        if not row.question.strip():
            raise ValueError(f"{path}, line {number}: field 'question' is empty")
        if not row.choices and not answer_text(row):
            raise ValueError(f"{path}, line {number}: field 'answer' is empty")
        rows.append((number, name, row))
    if not rows:
        raise ValueError(f"{path} has no items")
    return rows


def _choice_task(path: Path, rows: Rows) -> Task:
    items = []
    for number, name, row in rows:
        try:
            items.append(row_item(row, name))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    gaps = all(item.question.count("_") == 1 and item.question.partition("_")[2].strip() for item in items)
    return Task(
        items=lambda _: items,
        views=("cloze", "open", "letters", "text", "copy", "cot", *(("blank",) if gaps else ())),
        loglikelihood="cloze",
        generation="letters",
        normalisation="character",
    )


def _number_task(rows: Rows) -> Task:
    items = []
    for _, name, row in rows:
        item = number_item(
            id=name,
            question=row.question.strip(),
            answer=answer_text(row),
            solution=row.solution or "",
            stratum=row.subject or "",
            passage=(row.passage or "").strip(),
        )
        items.append(replace(item, cluster=row.cluster or ""))
    return Task(
        items=lambda _: items,
        views=("open", "cot", "cloze"),
        loglikelihood="open",
        generation="open",
        answer="number",
    )


def _text_task(path: Path, rows: Rows) -> Task:
    ring = Ring(answer_text(row) for _, _, row in rows)
    items = []
    for number, name, row in rows:
        wrong = ring.others(name, {answer_text(row), *row.aliases})
        if not wrong:
            raise ValueError(
                f"{path}, line {number}: field 'answer': no question has another answer than "
                f"{answer_text(row)!r}, so log-likelihood has nothing to rank it against; "
                "add questions, or 'choices' to every line"
            )
        choices = sorted((answer_text(row), *wrong), key=lambda text: digest("place", name, text))
        closed = row.model_copy(update={"choices": choices, "answer": answer_text(row)})
        items.append(row_item(closed, name))
    return Task(items=lambda _: items, views=("open", "cloze"), loglikelihood="open", generation="open")
