"""The flow, on one screen: item -> plan -> requests -> replies -> outcomes -> record."""

from collections.abc import Iterable, Iterator, Sequence

from evalkit.engines.base import Engine
from evalkit.engines.thinking import ThinkingEngine
from evalkit.records import ItemRecord, Reply
from evalkit.registry import Task
from evalkit.requests import Place, Plan
from evalkit.scoring import score_generation, score_loglikelihood
from evalkit.settings import Settings

CHUNK = 512
"""Items planned and handed to the engine at a time, for each of its workers: many enough to sort by length, few enough
to hold in memory."""


def evaluate(
    task: Task, plans: Iterable[Plan], engine: Engine, settings: Settings, workers: int = 1
) -> Iterator[ItemRecord]:
    """Score every planned item of ``task``; records come in the order in which items finish. ``workers`` answer at the
    same time."""
    engine = ThinkingEngine(engine)
    for chunk in _chunks(plans, CHUNK * workers):
        owners = [(p, r) for p, plan in enumerate(chunk) for r in range(len(plan.requests))]
        replies: list[dict[int, Reply]] = [{} for _ in chunk]
        for index, reply in engine.answer([chunk[p].requests[r] for p, r in owners]):
            p, r = owners[index]
            replies[p][r] = reply
            if len(replies[p]) == len(chunk[p].requests):
                yield record(task, chunk[p], replies[p], settings)
                replies[p] = {}


def record(task: Task, plan: Plan, replies: dict[int, Reply], settings: Settings) -> ItemRecord:
    """Every outcome of one item from the replies to its requests."""
    item = plan.item

    def rows(places: Sequence[Place]) -> list[tuple[float, ...]]:
        return [replies[request].logprobs[continuation] for request, continuation in places]

    outcomes = []
    normalisation = settings.normalisation or task.normalisation
    for scored in plan.scored:
        outcomes.append(
            score_loglikelihood(scored.view, scored.ask, item, rows(scored.places), rows(scored.blind), normalisation)
        )
    if plan.said is not None:
        view, ask, request = plan.said
        said = replies[request].generated
        assert said is not None, "the engine left out a reply"
        outcomes.append(score_generation(view, ask, item, said, settings.rules))
    return ItemRecord(
        task=task.name,
        version=task.version,
        item=item.id,
        prompt_sha256=plan.prompt_sha256,
        gold=item.gold,
        choices=item.choices,
        also=item.also,
        stratum=item.stratum,
        cluster=item.cluster or item.id,
        prompts=plan.prompts,
        cut=plan.cut,
        outcomes=tuple(outcomes),
    )


def _chunks(plans: Iterable[Plan], size: int) -> Iterator[list[Plan]]:
    chunk: list[Plan] = []
    for plan in plans:
        chunk.append(plan)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
