"""`evalkit show`: items one by one, with prompt, choices, reply, and what was read from it."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from evalkit.records import GENERATION, LOGLIKELIHOOD, ItemRecord, Outcome
from evalkit.store import MANIFEST, Run, read_manifest, read_run


def disagreements(folder: Path, task: str | None, everything: bool) -> list[dict[str, Any]]:
    """Items of a run or a comparison in which the modes, or the models, disagree."""
    if (folder / MANIFEST).is_file():
        runs = [("", read_run(folder))]
    elif (folder / "compare.json").is_file():
        runs = [(who, _side(folder, who)) for who in ("teacher", "student")]
    else:
        raise ValueError(f"{folder} is neither a run (it has no {MANIFEST}) nor a comparison (no compare.json)")
    names = runs[0][1].tasks
    if task is not None and task not in names:
        raise ValueError(f"task {task!r} is not in {folder}; it has {', '.join(names)}")
    found = []
    for name in names:
        if task in (None, name):
            sides = [(who, run, run.records(name)) for who, run in runs if name in run.tasks]
            for item in sides[0][2]:
                shown = _item(name, item, [(who, run, records.get(item)) for who, run, records in sides])
                if everything or shown["disagree"]:
                    found.append(shown)
    return found


def _side(folder: Path, who: str) -> Run:
    """The run that a comparison was made of."""
    told = json.loads((folder / "compare.json").read_text(encoding="utf-8"))[who]
    found = run_behind(folder, who, told)
    if found is None:
        places = " or ".join(map(str, _places(folder, who, told)))
        raise ValueError(f"the {who}'s run is no longer at {places}; show a run's own folder instead")
    return read_run(found)


def run_behind(folder: Path, who: str, told: dict[str, Any]) -> Path | None:
    """Where the run is that ``told`` (compare.json's teacher or student) names; None: no longer there."""
    for place in _places(folder, who, told):
        if (place / MANIFEST).is_file() and read_manifest(place).model.fingerprint == told["fingerprint"]:
            return place
    return None


def _places(folder: Path, who: str, told: dict[str, Any]) -> list[Path]:
    """Where it was when compared, or (moved along with it) beside the report."""
    return [*([Path(told["run"])] if told["run"] else []), folder / who]


def _item(name: str, item: str, sides: list[tuple[str, Run, ItemRecord | None]]) -> dict[str, Any]:
    known = [(who, run, record) for who, run, record in sides if record is not None]
    first = known[0][2]
    models = []
    for who, run, record in known:
        entry = run.manifest.entry(name)
        models.append(
            {
                "who": who or "model",
                "name": run.manifest.model.name,
                "loglikelihood": _told(record, record.outcome(LOGLIKELIHOOD, entry.loglikelihood)),
                "generation": _told(record, record.outcome(GENERATION, entry.generation)),
            }
        )
    return {
        "task": name,
        "item": item,
        "choices": list(first.choices),
        "gold": first.gold,
        "prompts": first.prompts,
        "models": models,
        "disagree": _disagree(models),
    }


def _told(record: ItemRecord, outcome: Outcome | None) -> dict[str, Any] | None:
    if outcome is None:
        return None
    told: dict[str, Any] = {"view": outcome.view, "outcome": outcome.outcome, "answer": outcome.answer}
    if outcome.mode == LOGLIKELIHOOD:
        return {**told, "logprobs": list(outcome.logprobs)}
    span = list(outcome.span) if outcome.span else None
    return {
        **told,
        "reply": outcome.reply,
        "thought": outcome.thought,
        "span": span,
        "rule": outcome.rule,
        "finish": outcome.finish,
        "cut_in": outcome.cut_in,
    }


def _disagree(models: list[dict[str, Any]]) -> bool:
    """Comparison: the teacher is right and the student is not, in either mode. Run: right by log-likelihood only."""

    def right(model: dict[str, Any], mode: str) -> bool | None:
        return None if model[mode] is None else model[mode]["outcome"] == "correct"

    if len(models) == 2:
        return any(right(models[0], mode) and right(models[1], mode) is False for mode in (LOGLIKELIHOOD, GENERATION))
    return right(models[0], LOGLIKELIHOOD) is not False and right(models[0], GENERATION) is False


def print_item(console: Console, item: dict[str, Any]) -> None:
    """Model text is printed as it is, never as markup."""
    console.rule(Text(f"{item['task']} · {item['item']}"))
    for view, prompt in item["prompts"].items():
        console.print(Text(f"prompt ({view})", style="dim"))
        console.print(Text(prompt))
    for model in item["models"]:
        console.print(Text(f"\n{model['who']}: {model['name']}", style="bold"))
        _print_loglikelihood(console, item, model["loglikelihood"])
        _print_generation(console, model["generation"])
    console.print()


def _print_loglikelihood(console: Console, item: dict[str, Any], told: dict[str, Any] | None) -> None:
    if told is None:
        return
    console.print(Text(f"  log-likelihood: {told['outcome']}", style=_style(told["outcome"])))
    for i, (choice, logprob) in enumerate(zip(item["choices"], told["logprobs"], strict=True)):
        marks = ("gold" if i == item["gold"] else "") + (" picked" if choice == told["answer"] else "")
        console.print(Text(f"    {logprob:9.3f}  {choice}  {marks.strip()}"))


def _print_generation(console: Console, told: dict[str, Any] | None) -> None:
    if told is None:
        return
    rule = f", by rule {told['rule']}" if told["rule"] else ""
    cut = f" in {told['cut_in']}" if told["cut_in"] else ""
    console.print(
        Text(
            f"  generation: {told['outcome']}{rule} (ended by {told['finish']}{cut})",
            style=_style(told["outcome"]),
        )
    )
    reply = Text(f"    {told['reply']}")
    if told["span"]:
        reply.stylize("reverse", 4 + told["span"][0], 4 + told["span"][1])
    console.print(reply if told["reply"] else Text("    (empty)", style="dim"))


def _style(outcome: str) -> str:
    return "green" if outcome == "correct" else "red"
