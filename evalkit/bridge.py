"""Bridge cells: log-likelihood of the endings after a chain of thought that is given.

Between ranking the choices at once and generating an answer lie two steps: rolling a chain of thought out, and reading
the answer out of it. Scoring "The answer is X." for every X after somebody's reasoning holds the first step fixed.
"""

import math
import re
from collections.abc import Iterable, Sequence

from evalkit.encoding import Encoder
from evalkit.engines.base import Engine
from evalkit.records import GENERATION, ItemRecord, Request, TaskEntry
from evalkit.scoring import best
from evalkit.views import labels

VIEW = "cot"
_STOP = re.compile(r"[.!?]\s+|\n")


def reasoning(record: ItemRecord) -> str:
    """What the reply says before the sentence or line that holds the extracted answer; all of it where none was "
    "found."""
    outcome = record.outcome(GENERATION, VIEW)
    if outcome is None:
        raise ValueError(f"{record.item}: no reply in view {VIEW!r}; score both runs with --view {VIEW} --mode both")
    if outcome.span is None:
        return outcome.reply.strip()
    head = outcome.reply[: outcome.span[0]]
    stops = [match.end() for match in _STOP.finditer(head)]
    return head[: stops[-1] if stops else 0].strip()


def endings(record: ItemRecord, entry: TaskEntry) -> tuple[str, ...]:
    """View cot's answers: letters where the options are listed, else the choices themselves."""
    names = labels(len(record.choices)) if entry.listed else record.choices
    return tuple(f"The answer is {name}." for name in names)


def rights_after(
    records: Sequence[ItemRecord], thoughts: Iterable[str], entry: TaskEntry, encoder: Encoder, engine: Engine
) -> list[bool]:
    """Whether the gold ending is the likeliest after each record's prompt and the thought given for it.

    ValueError: the model's window has no room for prompt, thought and ending.
    """
    requests, tails_of = [], []
    for record, thought in zip(records, thoughts, strict=True):
        prompt, glue = record.prompts[VIEW], encoder.delimiter
        if thought:
            prompt, glue = f"{prompt}{glue}{thought}", " "
        head, tails = encoder.join(prompt, [glue + ending for ending in endings(record, entry)])
        longest = len(head) + max(map(len, tails))
        if longest > engine.max_length:
            raise ValueError(
                f"{record.item}: prompt, reasoning and ending are {longest} tokens and the model's window holds "
                f"{engine.max_length}; score the runs with fewer --shots or --max-tokens"
            )
        tails_of.append([tuple(tail) for tail in tails])
        # A text that two options share is scored once.
        requests.append(Request(prompt=tuple(head), continuations=tuple(dict.fromkeys(tails_of[-1]))))
    found = dict(engine.answer(requests))
    rights = []
    for at, (record, own) in enumerate(zip(records, tails_of, strict=True)):
        known = {tail: math.fsum(row) for tail, row in zip(requests[at].continuations, found[at].logprobs, strict=True)}
        picked = {record.choices[i] for i in best([known[tail] for tail in own])}
        rights.append(picked == {record.choices[record.gold]})
    return rights
