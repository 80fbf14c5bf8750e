"""Other verdicts from what a run keeps, without the model."""

from collections.abc import Mapping
from dataclasses import replace

from evalkit.records import GENERATION, LOGLIKELIHOOD, Generated, Item, ItemRecord, Normalisation, Outcome, Rules
from evalkit.registry import Task
from evalkit.scoring import decide, score_generation
from evalkit.store import Run
from evalkit.views import ask


def renormalise(run: Run, normalisation: Normalisation) -> Run:
    """``run`` with log-likelihood ranked under ``normalisation``.

    ValueError: "pmi" was asked for, and the primary view has no blind scores. A second view without them keeps its
    verdicts.
    """
    entries = tuple(replace(entry, normalisation=normalisation) for entry in run.manifest.tasks)
    settings = run.manifest.settings.model_copy(update={"normalisation": normalisation})
    manifest = run.manifest.model_copy(update={"tasks": entries, "settings": settings})

    def again(record: ItemRecord, view: str) -> ItemRecord:
        outcomes = (
            decide(outcome, record.gold, record.choices, normalisation, record.also)
            if outcome.mode == LOGLIKELIHOOD and (outcome.view == view or normalisation != "pmi")
            else outcome
            for outcome in record.outcomes
        )
        return replace(record, outcomes=tuple(outcomes))

    records = [again(r, entry.loglikelihood) for entry in entries for r in run.records(entry.name).values()]
    return Run(manifest, records, run.path)


def reread(run: Run, rules: Rules, tasks: Mapping[str, tuple[Task, Mapping[str, Item]]]) -> Run:
    """``run`` with answers extracted under ``rules`` from the replies that it keeps.

    tasks: each task with its items by id, options in the order in which they were scored. ValueError: an item is not
    there any more, or has another gold answer or other choices.
    """
    settings = run.manifest.settings.model_copy(update={"rules": rules})
    manifest = run.manifest.model_copy(update={"settings": settings})
    records = []
    for entry in manifest.tasks:
        task, items = tasks[entry.name]
        for record in run.records(entry.name).values():
            item = items.get(record.item)
            if task.version != record.version or item is None:
                raise ValueError(
                    f"task {entry.name!r} changed since the run was scored (version {record.version}, now "
                    f"{task.version}; item {record.item}); score the model again"
                )
            if (item.gold, item.also, item.choices) != (record.gold, record.also, record.choices):
                raise ValueError(f"item {record.item} of {entry.name!r} has other choices now; score the model again")
            outcomes = (_reread(one, task, item, rules) if one.mode == GENERATION else one for one in record.outcomes)
            records.append(replace(record, outcomes=tuple(outcomes)))
    return Run(manifest, records, run.path)


def _reread(outcome: Outcome, task: Task, item: Item, rules: Rules) -> Outcome:
    said = Generated(
        text=outcome.reply,
        tokens=(),
        finish=outcome.finish,  # type: ignore[arg-type]  # one of the three, as it was written
        thought=outcome.thought,
        cut_in=outcome.cut_in,  # type: ignore[arg-type]
    )
    found = score_generation(outcome.view, ask(outcome.view, task, item), item, said, rules)
    return replace(found, num_tokens=outcome.num_tokens)
