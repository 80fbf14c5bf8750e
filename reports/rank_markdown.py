"""rank.md, and the table of `evalkit rank` in the terminal."""

from typing import Any

from rich import box
from rich.table import Table

from reports.cells import inline, table_of
from reports.checkpoints import PRIMARY
from reports.table import NO_SIGNAL, percent
from reports.why_markdown import p_value

HEADERS = ("Task", "Normalisation", "Tau", "Ceiling", "Spearman", "p", "Within budget", "Resolved, agree")


def rank_markdown(result: dict[str, Any]) -> str:
    return "\n\n".join([f"# {title(result)}", sentence(result), *rank_sections(result)]) + "\n"


def title(result: dict[str, Any]) -> str:
    return f"Ranking of {len(result['checkpoints'])} checkpoints"


def rank_sections(result: dict[str, Any]) -> list[str]:
    """Every table, the rankings first."""
    parts = [
        table_of(HEADERS, rows(result), left=2),
        NOTE,
        "## Accuracy",
        _accuracies(result),
        *_reversals(result),
        *_training(result),
        *_recipes(result),
    ]
    if result["notes"]:
        parts += ["## Notes", "\n".join(f"* {inline(note)}" for note in result["notes"])]
    return parts


NOTE = (
    "Tau: Kendall's tau-b between the ranking by log-likelihood and by generation. Ceiling: the tau to be expected "
    "from item noise alone if both modes ranked identically (below the bracketed value 5 % of the time). Within "
    "budget: tau over the pairs of checkpoints with equal training tokens. Resolved: pairs that both modes tell apart, "
    "Holm over all pairs and both modes; agree: those that they order alike. p: from 6 independent checkpoints. ∅: no "
    "checkpoint is above the floor in both modes."
)


def sentence(result: dict[str, Any]) -> str:
    """What the rankings allow one to say."""
    overall = result["overall"]
    if overall is None:
        return "No task carries signal in both modes, so nothing can be said of the rankings."
    found = overall["rankings"][overall["normalisation"]]
    pairs, over = overall["pairs"], f"{len(overall['tasks'])} task{'s' if len(overall['tasks']) > 1 else ''}"
    if found["tau"] is None:
        return f"Over {over}, one of the modes scores all checkpoints alike: there is no ranking."
    text = f"Over {over}, log-likelihood and generation rank the checkpoints with tau {found['tau']:.2f}"
    ceiling = found["ceiling"]
    if ceiling is None:
        text += "; the checkpoints differ by no more than item noise, so tau says nothing"
    else:
        beyond = "more than item noise explains" if found["tau"] < ceiling["low"] else "what item noise allows"
        text += f", where {ceiling['mean']:.2f} is to be expected if both ranked identically: {beyond}"
    text += (
        f". Of {pairs['all']} pairs both modes resolve {pairs['resolved']}, and order {pairs['agree']} of them alike."
    )
    held = result["held_out"]
    if held and held["tau"] is not None:
        text += (
            f" On the {held['items']:,} items that did not decide which tasks carry signal, tau is {held['tau']:.2f}."
        )
    chosen = overall["chosen"]
    if chosen and chosen["tau_reported"] is not None:
        kind = chosen["normalisation"]
        which = "each task's own normalisation" if kind == PRIMARY else f"normalisation {kind}"
        text += (
            f" On one half of the items {which} predicts generation best; on the other "
            f"half its tau is {chosen['tau_reported']:.2f}."
        )
    return text


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    cells = [(task["name"], task["signal"], task) for task in result["tasks"]]
    if result["overall"]:
        cells.append(("overall", True, result["overall"]))
    out: list[tuple[str, ...]] = []
    for name, signal, cell in cells:
        for kind, found in cell["rankings"].items():
            primary = kind == cell["normalisation"]
            pairs, within = cell["pairs"], found["within_budget"]
            ceiling = found["ceiling"]
            out.append(
                (
                    (name + ("" if signal else f" {NO_SIGNAL}"))
                    if found is next(iter(cell["rankings"].values()))
                    else "",
                    kind + (" (primary)" if primary and name != "overall" else ""),
                    _number(found["tau"]),
                    "–" if ceiling is None else f"{ceiling['mean']:.2f} [{ceiling['low']:.2f}]",
                    _number(found["spearman"]),
                    p_value(found["p"]),
                    "–" if within["tau"] is None else f"{within['tau']:.2f} ({within['pairs']} pairs)",
                    f"{pairs['resolved']} of {pairs['all']}, {pairs['agree']}" if primary else "",
                )
            )
    return out


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _figure(cell: dict[str, Any]) -> str:
    low, high = cell["ci95"]
    return f"{percent(cell['mean'])} [{percent(low)}, {percent(high)}]"


def _accuracies(result: dict[str, Any]) -> str:
    cells = [(task["name"], task) for task in result["tasks"]]
    if result["overall"]:
        cells.append(("overall", result["overall"]))
    lines = []
    for name, cell in cells:
        for point, found in zip(result["checkpoints"], cell["accuracy"], strict=True):
            lines.append((name, point["label"], _figure(found["loglikelihood"]), _figure(found["generation"])))
    note = (
        "Percent [95 % interval, of this checkpoint (over items)]; log-likelihood in each task's primary normalisation."
    )
    return table_of(("Task", "Checkpoint", "LL", "GEN"), lines, left=2) + f"\n\n{note}"


def _reversals(result: dict[str, Any]) -> list[str]:
    cells = [(task["name"], task) for task in result["tasks"]]
    if result["overall"]:
        cells.append(("overall", result["overall"]))
    lines = [
        (
            name,
            row["first"],
            row["second"],
            *(
                f"{100 * row[m]['difference']:+.1f} (p {p_value(row[m]['holm_p'])})"
                for m in ("loglikelihood", "generation")
            ),
        )
        for name, cell in cells
        for row in cell["pairs"]["reversals"]
    ]
    if not lines:
        return []
    note = "First minus second in points; p of the paired test, Holm over all pairs and both modes."
    return ["## Reversals", table_of(("Task", "First", "Second", "LL", "GEN"), lines, left=3) + f"\n\n{note}"]


def _training(result: dict[str, Any]) -> list[str]:
    """Accuracy in both modes along training, where the runs say how many tokens."""
    cell = result["overall"]
    if cell is None:
        return []
    points = [(point, found) for point, found in zip(result["checkpoints"], cell["accuracy"], strict=True)]
    told = [(point, found) for point, found in points if point["tokens"] is not None]
    told.sort(key=lambda pair: (pair[0]["recipe"], pair[0]["seed"] or 0, pair[0]["tokens"]))
    lines = [
        (
            point["recipe"][:12],
            "" if point["seed"] is None else str(point["seed"]),
            point["stage"],
            f"{point['tokens']:,}",
            _figure(found["loglikelihood"]),
            _figure(found["generation"]),
        )
        for point, found in told
    ]
    return (
        ["## Along training", table_of(("Recipe", "Seed", "Stage", "Tokens", "LL", "GEN"), lines, left=3)]
        if lines
        else []
    )


def _recipes(result: dict[str, Any]) -> list[str]:
    lines = [
        (
            row["recipe"][:12],
            row["stage"],
            "–" if row["tokens"] is None else f"{row['tokens']:,}",
            str(row["seeds"]),
            _figure(row["loglikelihood"]),
            _figure(row["generation"]),
        )
        for row in (result["overall"] or {}).get("recipes", ())
    ]
    if not lines:
        return []
    note = "95 % intervals of this recipe (items x seeds): seed variance is pooled over the recipes with several seeds."
    return ["## Recipes", table_of(("Recipe", "Stage", "Tokens", "Seeds", "LL", "GEN"), lines, left=2) + f"\n\n{note}"]


def rank_table(result: dict[str, Any]) -> Table:
    table = Table(*HEADERS, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for row in rows(result):
        table.add_row(*row)
    return table
