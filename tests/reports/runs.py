"""Runs of given right and wrong answers, in memory and on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evalkit.records import GENERATION, LOGLIKELIHOOD, ItemRecord, Outcome, TaskEntry
from evalkit.settings import Settings
from evalkit.store import Manifest, Model, Run, RunWriter, key_of

OPTIONS = 4


def run_of(
    answers: Mapping[str, tuple[Sequence[bool], Sequence[bool]]],
    *,
    name: str = "m",
    fingerprint: str = "f",
    parts: dict[str, str] | None = None,
    checkpoint: dict[str, Any] | None = None,
    clusters: Sequence[str] | None = None,
    prompt: str = "0123456789abcdef",
    version: str = "0.1.0",
    folder: Path | None = None,
    **settings: Any,
) -> Run:
    """``answers``: task -> (right by log-likelihood, right by generation) of each item; 4 options, gold in turn."""
    records, entries = [], []
    for task, (by_ll, by_gen) in answers.items():
        for i, (ll, gen) in enumerate(zip(by_ll, by_gen, strict=True)):
            gold = i % OPTIONS
            picked = gold if ll else (gold + 1) % OPTIONS
            said = gold if gen else (gold + 2) % OPTIONS
            logprobs = tuple(-1.0 if option == picked else -2.0 - option / 10 for option in range(OPTIONS))
            outcomes = (
                Outcome(
                    mode=LOGLIKELIHOOD,
                    view="letters",
                    outcome="correct" if ll else "wrong",
                    choice=picked,
                    logprobs=logprobs,
                    tokens=(1,) * OPTIONS,
                    characters=(1,) * OPTIONS,
                    bytes=(1,) * OPTIONS,
                    blind=tuple(-1.0 if option == 0 else -2.0 for option in range(OPTIONS)),
                ),
                Outcome(
                    mode=GENERATION,
                    view="letters",
                    outcome="correct" if gen else "wrong",
                    choice=said,
                    answer="ABCD"[said],
                    reply=f"Answer: {'ABCD'[said]}",
                    span=(8, 9),
                    rule="marker",
                    finish="eos",
                ),
            )
            records.append(
                ItemRecord(
                    task=task,
                    version="1",
                    item=f"{i:05d}",
                    prompt_sha256=prompt,
                    gold=gold,
                    choices=("a", "b", "c", "d"),
                    cluster=clusters[i] if clusters else f"{i:05d}",
                    prompts={"letters": f"Question {i}?\nAnswer:"},
                    outcomes=outcomes,
                )
            )
        entries.append(
            TaskEntry(
                name=task,
                version="1",
                loglikelihood="letters",
                generation="letters",
                normalisation="raw",
                shots=0,
                n=len(by_ll),
                listed=True,
            )
        )
    manifest = Manifest(
        model=Model(name=name, fingerprint=fingerprint, parts=parts or {}, dtype="float32", device="cpu"),
        settings=Settings(**settings),
        tasks=tuple(entries),
        versions={"evalkit": version},
        sessions=({"engine": "hf", "batch_size": 8},),
        checkpoint=checkpoint,
        complete=True,
    )
    if folder is None:
        return Run(manifest, records)
    writer = RunWriter(folder, manifest)
    for record in records:
        writer.append(record)
    return writer.finish([key_of(record) for record in records])


def flipped(rng: np.random.Generator, right: np.ndarray, lost: float, gained: float) -> np.ndarray:
    """Another model's answers: right ones are lost, wrong ones gained, at these rates over all items."""
    share = right.mean()
    drop = rng.random(len(right)) < lost / share
    rise = rng.random(len(right)) < gained / (1 - share)
    return np.where(right, ~drop, rise)
