"""compare.md's sections on tests, on where the loss comes from, and on how the modes answer."""

from typing import Any

from reports.cells import table_of
from reports.table import SHORT, percent, signed


def why_sections(result: dict[str, Any]) -> list[str]:
    return [
        *_tests(result),
        *_formula(result),
        *_flows(result),
        *_answers(result),
        *_divergence(result),
        *_permutations(result),
    ]


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _tests(result: dict[str, Any]) -> list[str]:
    rows = []
    for task in result["tasks"]:
        cells = [(f"loss by {SHORT[mode]}", cell["gap"], cell) for mode, cell in task["modes"].items()]
        between = task["hidden_gap"] or (task["protocol_gap"] or {}).get("parts", {}).get("mode")
        if between:
            cells.append(("hidden gap", between, between))
        for what, effect, cell in cells:
            least, needed = cell["detectable"], cell["items_needed"]
            rows.append(
                (
                    task["name"],
                    what,
                    signed(effect),
                    cell["test"]["name"] + _wild(cell),
                    p_value(cell["test"]["p"]),
                    p_value(cell["test"].get("mid_p")),
                    p_value(cell["test"]["holm_p"]),
                    "–" if least is None else percent(least),
                    "–" if needed is None else f"{needed:,}",
                )
            )
    headers = ("Task", "Effect", "Points", "Test", "p", "mid-p", "Holm p", "Detectable", "Items needed")
    note = (
        "Two-sided; the exact p decides, mid-p is printed beside it. Holm p: corrected within the losses of each mode "
        "and within the hidden gaps, over the tasks with signal; all else here is exploratory. Detectable: smallest "
        "effect in points found with 80 % power on these items. Items needed: to find an effect of the size "
        "seen as often."
    )
    return ["## Tests, and what could be seen", table_of(headers, rows, left=2) + f"\n\n{note}"]


def _wild(cell: dict[str, Any]) -> str:
    """Under 40 clusters: the wild bootstrap's interval, beside CR2's in the column of points."""
    if "wild_ci95" not in cell:
        return ""
    low, high = cell["wild_ci95"]
    return f"; wild bootstrap [{100 * low:+.1f}, {100 * high:+.1f}]"


def _formula(result: dict[str, Any]) -> list[str]:
    rows = []
    for task in result["tasks"]:
        for mode, cell in task["modes"].items():
            kept = (task["recovery"] or {}).get(mode)
            formula = cell["formula"]
            keeps = "–" if kept is None else f"{percent(kept['mean'])} [{_bounds(kept)}]"
            published = "–" if kept is None else percent(kept["raw"])
            again = (kept or {}).get("bootstrap_ci95")
            rows.append(
                (
                    task["name"],
                    SHORT[mode],
                    signed(formula["teacher"]),
                    signed(formula["student"]),
                    signed(formula["gap"]),
                    keeps + (" ≥ 90" if kept and kept["keeps_90"] else ""),
                    "–" if again is None else f"[{', '.join(percent(bound) for bound in again)}]",
                    published,
                )
            )
    note = (
        "In hundredths of a formula score: 100 is all right, 0 what guessing gives. Kept: the student's score in "
        "percent of the teacher's [95 % Fieller interval], where the teacher's is above 0 in every mode; ≥ 90 where "
        "the lower bound says so. Bootstrap: the same interval by a cluster bootstrap, from 40 clusters on. Raw "
        "S/T: the accuracies' ratio, for comparison with published figures."
    )
    headers = ("Task", "Mode", "Teacher", "Student", "Gap", "Kept", "Bootstrap", "Raw S/T")
    return ["## Formula scores", table_of(headers, rows, left=2) + f"\n\n{note}"]


def log_odds_appendix(result: dict[str, Any]) -> list[str]:
    rows = []
    for task in result["tasks"]:
        for mode, cell in task["modes"].items():
            low, high = cell["log_odds"]["ci95"]
            rows.append((task["name"], SHORT[mode], f"{cell['log_odds']['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"))
    note = (
        "The teacher's log-odds of a right answer minus the student's [95 % interval, the gap's carried over]: a third "
        "unit, in which a loss near 100 % or 0 % weighs more. Exploratory; no verdict rests on it."
    )
    return ["## Appendix: loss in log-odds", table_of(("Task", "Mode", "Loss"), rows, left=2) + f"\n\n{note}"]


def _bounds(cell: dict[str, Any]) -> str:
    return ", ".join(percent(bound) for bound in cell["ci95"])


def _flows(result: dict[str, Any]) -> list[str]:
    rows = []
    for task in result["tasks"]:
        for row in task["flows"] or ():
            if row["lost"] or row["gained"]:
                net = {"mean": row["net"], "ci95": row["ci95"]}
                rows.append((task["name"], row["outcome"], str(row["lost"]), str(row["gained"]), signed(net)))
    if not rows:
        return []
    note = (
        "Items that the teacher had right and the student has in this outcome (lost), the reverse (gained), and their "
        "difference in points; the differences of a task add up to its loss by generation."
    )
    headers = ("Task", "Outcome", "Lost", "Gained", "Net")
    return ["## Where generation's loss comes from", table_of(headers, rows, left=2) + f"\n\n{note}"]


def _answers(result: dict[str, Any]) -> list[str]:
    rows = []
    for task in result["tasks"]:
        mass = task["modes"].get("loglikelihood", {}).get("mass") or {}
        for who, cell in (task["agreement"] or {}).items():
            kappa = "–" if cell["kappa"] is None else f"{cell['kappa']['mean']:.2f}"
            weight = mass.get(who)
            rows.append(
                (
                    task["name"],
                    who,
                    str(cell["loglikelihood_only"]),
                    str(cell["generation_only"]),
                    kappa,
                    "–" if weight is None else f"{percent(weight['mean'])} [{_bounds(weight)}]",
                )
            )
    if not rows:
        return []
    note = (
        "Items right in one mode only; Cohen's kappa of being right in both; mean probability that the next token is "
        "one of the choices at all, where each is one token (letters): what is missing went to other tokens."
    )
    headers = ("Task", "Model", "Right by LL only", "Right by GEN only", "Kappa", "Mass on the choices")
    return ["## How the modes agree", table_of(headers, rows, left=2) + f"\n\n{note}"]


def _divergence(result: dict[str, Any]) -> list[str]:
    rows = []
    for task in result["tasks"]:
        cell = task["divergence"]
        if cell:
            places = ("–" if cell[name] is None else f"{cell[name]:.0f}" for name in ("words", "characters"))
            rows.append((task["name"], str(task["n"]), percent(cell["same"]), *places))
    if not rows:
        return []
    note = (
        "Percent of items with the same reply from both models; of the others the median number of words, and of "
        "characters, before the first that differs. Descriptive, no interval."
    )
    headers = ("Task", "n", "Same reply", "Words in common", "Characters in common")
    return ["## Where the replies part", table_of(headers, rows) + f"\n\n{note}"]


def _permutations(result: dict[str, Any]) -> list[str]:
    rows = []
    for task in result["tasks"]:
        for mode, cell in task["modes"].items():
            for who, found in (cell["permutations"] or {}).items():
                same = f"{percent(found['same']['mean'])} [{_bounds(found['same'])}]"
                orders = ", ".join(percent(share) for share in found["accuracy"])
                rows.append((task["name"], SHORT[mode], who, str(found["items"]), same, orders))
    if not rows:
        return []
    note = (
        "Percent of items answered with the same text in every order of the options [95 % interval]; accuracy by order."
    )
    headers = ("Task", "Mode", "Model", "Items", "Same answer", "Accuracy by order")
    return ["## Orders of the options", table_of(headers, rows, left=3) + f"\n\n{note}"]
