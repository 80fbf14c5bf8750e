"""One run's accuracy in each mode, for `evalkit run`."""

from collections import Counter
from typing import Any

from rich import box
from rich.table import Table

from evalkit.records import MODES, VERDICTS
from evalkit.stats.intervals import wilson
from evalkit.store import Run
from reports.table import SHORT, percent


def run_summary(run: Run) -> dict[str, Any]:
    """Per task and mode: view, accuracy, its 95 % interval, and how often each outcome came; ``cut`` counts the items
    whose prompt was cut on the left because the model's window is too short."""
    tasks = []
    for name in run.tasks:
        entry, records = run.manifest.entry(name), list(run.records(name).values())
        modes = {}
        for mode in run.manifest.settings.modes:
            view = entry.view(mode)
            if not any(record.outcome(mode, view) for record in records):
                continue  # imported: another harness scores a task in one mode only
            counts = Counter(o.outcome for record in records if (o := record.outcome(mode, view)))
            interval = wilson(counts["correct"], len(records))
            modes[mode] = {
                "view": view,
                "accuracy": interval.mean,
                "ci95": [interval.low, interval.high],
                "outcomes": {verdict: counts[verdict] for verdict in VERDICTS},
            }
        cut = sum(record.cut > 0 for record in records)
        tasks.append({"name": name, "version": entry.version, "n": len(records), "cut": cut, "modes": modes})
    model = run.manifest.model
    return {"model": {"name": model.name, "fingerprint": model.fingerprint}, "tasks": tasks}


def run_table(run: Run) -> Table:
    summary = run_summary(run)
    table = Table(
        "Task",
        "n",
        "Mode",
        "View",
        "Accuracy",
        "Outcomes",
        title=summary["model"]["name"],
        box=box.SIMPLE_HEAD,
    )
    for task in summary["tasks"]:
        for mode in MODES:
            cell = task["modes"].get(mode)
            if cell is None:
                continue
            low, high = cell["ci95"]
            told = ", ".join(f"{count} {verdict}" for verdict, count in cell["outcomes"].items() if count)
            figure = f"{percent(cell['accuracy'])} [{percent(low)}, {percent(high)}]"
            table.add_row(task["name"], str(task["n"]), SHORT[mode], cell["view"], figure, told)
    cut = [f"{task['name']} {task['cut']}" for task in summary["tasks"] if task["cut"]]
    if cut:
        table.caption = f"Prompts cut on the left, because the model's window is too short: {', '.join(cut)}."
    return table
