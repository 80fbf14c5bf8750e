"""The item browser's data: every item once, small enough for one file, with or without benchmark text."""

import base64
import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from evalkit.records import VERDICTS, ItemRecord
from evalkit.store import Run
from reports.compare import item_row

BUDGET = 9_800_000
"""Bytes of compressed items: with base64, the chart library and the page the file stays under 15 MB."""
LIMITS = (None, 6000, 2500, 1000, 400, 0)
"""Characters of a reply and of a part of a prompt: the first under which all items fit."""

Prompts = Mapping[tuple[str, str], Sequence[tuple[str, str]]]
"""(task, item) -> (which prompt, its text)"""


def run_rows(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """The items that all ``runs`` (label -> run) hold, in the form of items.jsonl."""
    first = next(iter(runs.values()))
    rows = []
    for name in first.tasks:
        if all(name in run.tasks for run in runs.values()):
            entry, records = first.manifest.entry(name), {label: run.records(name) for label, run in runs.items()}
            common = [item for item in records[next(iter(runs))] if all(item in own for own in records.values())]
            rows += [item_row(name, {label: own[item] for label, own in records.items()}, entry) for item in common]
    return rows


def prompts_of(runs: Mapping[str, Run]) -> Prompts:
    """What was asked; a prompt that models were given in different words is told for each."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    records: dict[tuple[str, str], dict[str, ItemRecord]] = {}
    for label, run in runs.items():
        for name in run.tasks:
            for item, record in run.records(name).items():
                records.setdefault((name, item), {})[label] = record
    for key, own in records.items():
        for view in dict.fromkeys(view for record in own.values() for view in record.prompts):
            texts = {label: record.prompts[view] for label, record in own.items() if view in record.prompts}
            one = len(set(texts.values())) == 1
            told = [(view, next(iter(texts.values())))] if one else [(f"{view}, {who}", x) for who, x in texts.items()]
            found.setdefault(key, []).extend(told)
    return found


def packed(rows: Sequence[dict[str, Any]], who: Sequence[str], prompts: Prompts, text: bool) -> tuple[str, int | None]:
    """(gzip of JSON in base64, the characters that replies and prompts were cut to; None: they are whole).

    ``text`` False: no prompt, choice, answer or reply is in it.
    """
    for limit in LIMITS if text else (0,):
        told = json.dumps(_data(rows, who, prompts, text, limit), ensure_ascii=False, separators=(",", ":"))
        small = gzip.compress(told.encode(), compresslevel=6, mtime=0)
        if len(small) <= BUDGET:
            break
    return base64.b64encode(small).decode(), limit if text else None


def _data(
    rows: Sequence[dict[str, Any]], who: Sequence[str], prompts: Prompts, text: bool, limit: int | None
) -> dict[str, Any]:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    blocks: dict[str, int] = {}
    items = []
    asked_of = {
        key: [(label, prompt.split("\n\n")) for label, prompt in (prompts.get(key, ()) if text else ())]
        for key in ((row["task"], row["item"]) for row in rows)
    }
    of_task = Counter(row["task"] for row in rows)
    held = Counter(
        (task, part) for (task, _), asked in asked_of.items() for part in {part for _, parts in asked for part in parts}
    )
    for row in rows:
        # Few-shot examples are set apart by blank lines and are the same in many prompts: each is kept once.
        asked = [
            [
                label,
                [blocks.setdefault(_middle_out(part, limit), len(blocks)) for part in parts],
                _examples([held[row["task"], part] for part in parts], of_task[row["task"]]),
            ]
            for label, parts in asked_of[row["task"], row["item"]]
        ]
        choices = row["choices"] if text else len(row["choices"])
        sides = [_side(row, one, text, limit) for one in who]
        items.append([tasks.index(row["task"]), row["item"], row["stratum"], row["gold"], choices, asked, *sides])
    return {"who": list(who), "tasks": tasks, "verdicts": list(VERDICTS), "blocks": list(blocks), "items": items}


def _examples(held: Sequence[int], n: int) -> int:
    """How many parts of a prompt stand before the item's own; ``held``: how many of the task's ``n`` items hold each.
    Few-shot examples and instructions are in most. A passage with blank lines, or what a chat template puts behind the
    question, belongs to the item."""
    return next((at for at, items in enumerate(held) if 2 * items <= n), 0)


def _side(row: Mapping[str, Any], who: str, text: bool, limit: int | None) -> list[Any]:
    """[log-likelihood's outcome, choice picked, log-probabilities, generation's outcome, reply before the span, span,
    reply after it, rule]; -1 and empty where a mode was not scored or nothing was picked."""
    ranked, said = row.get(f"{who}_loglikelihood"), row.get(f"{who}_generation")
    answer = row.get(f"{who}_loglikelihood_answer")
    picked = row["choices"].index(answer) if answer in row["choices"] else -1
    logprobs = [round(value, 3) for value in row.get(f"{who}_logprobs", ())]
    side = [_index(ranked), picked, logprobs, _index(said)]
    if not text or said is None:
        return side
    reply, (low, high) = row[f"{who}_reply"], row[f"{who}_span"] or (0, 0)
    around = None if limit is None else limit // 2
    # The offsets count code points, JavaScript's UTF-16 units: the parts are cut here.
    return [*side, _cut(reply[:low], around, end=True), reply[low:high], _cut(reply[high:], around), row[f"{who}_rule"]]


def _index(verdict: str | None) -> int:
    return -1 if verdict is None else VERDICTS.index(verdict)


def _middle_out(text: str, limit: int | None) -> str:
    """A passage begins with what it is about and ends with the question."""
    if limit is None or len(text) <= limit:
        return text
    return f"{text[: limit // 2]} … {text[len(text) - limit // 2 :]}"


def _cut(text: str, limit: int | None, end: bool = False) -> str:
    if limit is None or len(text) <= limit:
        return text
    return f"… {text[len(text) - limit :]}" if end else f"{text[:limit]} …"
