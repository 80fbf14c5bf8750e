"""Runs that look like real ones: few-shot prompts in two views, replies of some sentences, every outcome."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evalkit.records import GENERATION, LOGLIKELIHOOD, VERDICTS, ItemRecord, Outcome, TaskEntry
from evalkit.settings import Settings
from evalkit.store import Manifest, Model, Run, RunWriter, key_of

WORDS = (
    "the model of a river that carries more water than one would expect in a dry year because light falls on the "
    "leaves and heat moves from warm to cold until both are equal so energy is kept but never made by a machine"
).split()


def text(rng: np.random.Generator, words: int) -> str:
    return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=words)).capitalize() + "."


def realistic_run(
    tasks: Sequence[str],
    n: int,
    *,
    name: str,
    skill: tuple[float, float],
    seed: int,
    folder: Path | None = None,
    checkpoint: dict[str, Any] | None = None,
    words: int = 45,
    shots: int = 5,
) -> Run:
    """``skill``: chance of being right by log-likelihood and by generation. Items and prompts are the same for every
    run; only answers differ with ``seed``."""
    own = np.random.default_rng(seed)
    records, entries = [], []
    for at, task in enumerate(tasks):
        shared = np.random.default_rng(1000 + at)
        shot_text = [f"Question: {text(shared, 25)}\nAnswer: {text(shared, 12)}" for _ in range(shots)]
        hardness = shared.random(n)
        for i in range(n):
            question = f"Question: {text(shared, 25)}"
            choices = tuple(f"{text(shared, 4)[:-1]} {k}" for k in range(4))
            gold = int(shared.integers(4))
            easy = hardness[i] + own.normal(scale=0.15)
            right_ll, right_gen = easy < skill[0], easy < skill[1] - 0.04 * at
            picked = gold if right_ll else (gold + 1 + int(own.integers(3))) % 4
            verdict = "correct" if right_gen else VERDICTS[1 + int(own.choice(5, p=[0.6, 0.2, 0.05, 0.12, 0.03]))]
            reply, span, said = _reply(own, verdict, choices, gold, words)
            logprobs = own.normal(-9, 1.5, size=4)
            logprobs[picked] = logprobs.max() + 0.3
            lengths = {"tokens": (5,) * 4, "characters": (20,) * 4, "bytes": (20,) * 4}
            outcomes = (
                Outcome(
                    mode=LOGLIKELIHOOD,
                    view="open",
                    outcome="correct" if right_ll else "wrong",
                    choice=picked,
                    answer=choices[picked],
                    logprobs=tuple(float(x) for x in logprobs),
                    blind=tuple(float(x) for x in own.normal(-9, 1.5, size=4)),
                    **lengths,
                ),
                Outcome(
                    mode=GENERATION,
                    view="open",
                    outcome=verdict,
                    choice=said,
                    answer="" if span is None else reply[slice(*span)],
                    reply=reply,
                    span=span,
                    rule="" if span is None else "marker",
                    finish="length" if verdict == "truncated" else "eos",
                ),
            )
            records.append(
                ItemRecord(
                    task=task,
                    version="1",
                    item=f"{task}-{i:05d}",
                    prompt_sha256=f"{at:04d}{i:08d}",
                    gold=gold,
                    choices=choices,
                    prompts={"open": "\n\n".join([*shot_text, f"{question}\nAnswer:"])},
                    outcomes=outcomes,
                )
            )
        entries.append(
            TaskEntry(
                name=task,
                version="1",
                loglikelihood="open",
                generation="open",
                normalisation="raw",
                shots=shots,
                n=n,
            )
        )
    manifest = Manifest(
        model=Model(name=name, fingerprint=f"f-{name}", dtype="bfloat16", device="cuda", parameters=600_000_000),
        settings=Settings(),
        tasks=tuple(entries),
        versions={"evalkit": "0.1.0"},
        checkpoint=checkpoint,
        complete=True,
    )
    made = Run(manifest, records)
    return made if folder is None else saved(made, folder)


def saved(run: Run, folder: Path) -> Run:
    """``run`` in a folder."""
    records = [record for task in run.tasks for record in run.records(task).values()]
    writer = RunWriter(folder, run.manifest)
    for record in records:
        writer.append(record)
    return writer.finish([key_of(record) for record in records])


def _reply(
    rng: np.random.Generator, verdict: str, choices: Sequence[str], gold: int, words: int
) -> tuple[str, tuple[int, int] | None, int | None]:
    """(reply, span of the answer, choice)."""
    if verdict == "empty":
        return "", None, None
    reasons = text(rng, words)
    if verdict not in ("correct", "wrong"):
        return reasons, None, None
    said = gold if verdict == "correct" else (gold + 1) % 4
    head = f"{reasons} So the answer is "
    return f"{head}{choices[said]}.", (len(head), len(head) + len(choices[said])), said
