"""Other verdicts from what a run keeps, without the model."""

from dataclasses import replace

from evalkit.records import LOGLIKELIHOOD, ItemRecord, Normalisation
from evalkit.scoring import decide
from evalkit.store import Run


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
