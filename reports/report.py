"""`evalkit report`: a comparison, several checkpoints, or one run -> Markdown with SVG charts, and one HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit.store import MANIFEST, Run, read_run, write_text
from reports import export
from reports.browse import Prompts, prompts_of, run_rows
from reports.cells import inline, table_of
from reports.chart_style import Figure, svg
from reports.charts import comparison_figures
from reports.checkpoints import checkpoints
from reports.explain import explain_sections, read_comparison
from reports.explain import title as comparison_title
from reports.markdown import compare_sections, sentence
from reports.markup import plain
from reports.rank import Ranks
from reports.rank_charts import rank_figures, run_figures
from reports.rank_markdown import rank_sections
from reports.rank_markdown import sentence as rank_sentence
from reports.rank_markdown import title as rank_title
from reports.show import run_behind
from reports.summary import run_summary
from reports.table import HEADERS, NAMES, lines, percent
from reports.validity import Check, checks, read_calibration

FORMATS = ("md", "html")
CHARTS = "report-charts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What both formats tell."""

    title: str
    lead: str
    """The result in a sentence or two."""
    figures: tuple[Figure, ...]
    sections: tuple[str, ...]
    """Plain sentences under headings, as Markdown."""
    tables: tuple[str, ...]
    """Every table, as Markdown."""
    checks: tuple[Check, ...]
    """How far the figures can be believed."""
    who: tuple[str, ...]
    """The models, as the keys of ``items`` name them."""
    names: tuple[str, ...]
    items: tuple[dict[str, Any], ...]
    prompts: Prompts
    text: bool
    """Benchmark text may be shown."""
    csv: str
    latex: str
    citation: str


def read_report(folders: Sequence[Path], text: bool = True) -> Report:
    """One comparison, one run, or two and more runs; ValueError says what is wrong with a folder."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; give a comparison's, or those of finished runs")
    if twice := [folder for at, folder in enumerate(folders) if folder in folders[:at]]:
        raise ValueError(f"{twice[0]} is given twice; give each run once")
    if len(folders) == 1 and not (folders[0] / MANIFEST).is_file():
        if not (folders[0] / "compare.json").is_file():
            raise ValueError(
                f"{folders[0]} has no compare.json and no {MANIFEST}; give the folder of a comparison or of a run"
            )
        return of_comparison(folders[0], text)
    compared = [folder for folder in folders if (folder / "compare.json").is_file()]
    if compared:
        raise ValueError(f"{compared[0]} is a comparison; report takes one comparison, or runs, and not both")
    runs = [read_run(folder) for folder in folders]
    return of_run(runs[0], text) if len(runs) == 1 else of_checkpoints(runs, text)


def of_comparison(folder: Path, text: bool) -> Report:
    result, items = read_comparison(folder)
    names = (result["teacher"]["name"], result["student"]["name"])
    rows = [line.cells for line in lines(result)]
    caption = f"{plain(comparison_title(result))}. {sentence(result)}"
    return Report(
        title=comparison_title(result),
        lead=inline(sentence(result)),
        figures=tuple(comparison_figures(result, items)),
        sections=tuple(explain_sections(result, items if text else [], str(folder))),
        tables=tuple(compare_sections(result)),
        checks=tuple(checks(result, items, read_calibration(folder, result))),
        who=("teacher", "student"),
        names=names,
        items=tuple(items),
        prompts=_asked(folder, result) if text else {},
        text=text,
        csv=export.csv_table(export.comparison_rows(result)),
        latex=export.latex_table(HEADERS, rows, caption, left=3),
        citation=export.citation([result["teacher"], result["student"]], [task["name"] for task in result["tasks"]]),
    )


def _asked(folder: Path, result: dict[str, Any]) -> Prompts:
    """The prompts, from the runs that were compared; none where those are no longer there, or were made anew."""
    runs = {}
    for who in ("teacher", "student"):
        place = run_behind(folder, who, result[who])
        if place is None:
            return {}
        runs[who] = read_run(place)
        told = runs[who].manifest.settings.model_dump(mode="json")
        if any(value != told.get(name) for name, value in result["settings"].items() if name != "normalisation"):
            return {}
    return prompts_of(runs)


def of_checkpoints(runs: Sequence[Run], text: bool) -> Report:
    result = Ranks(runs).result
    labels = [point.label for point in checkpoints(runs)]
    named = dict(zip(labels, runs, strict=True))
    rows = export.rank_rows(result)
    told = [(row["task"], row["checkpoint"], row["mode"], percent(row["accuracy"]), _bounds(row)) for row in rows]
    return Report(
        title=rank_title(result),
        lead=rank_sentence(result),
        figures=tuple(rank_figures(result)),
        sections=(),
        tables=tuple(rank_sections(result)),
        checks=(),
        who=tuple(labels),
        names=tuple(run.manifest.model.name for run in runs),
        items=tuple(run_rows(named)),
        prompts=prompts_of(named) if text else {},
        text=text,
        csv=export.csv_table(rows),
        latex=export.latex_table(("Task", "Checkpoint", "Mode", *ACCURACY), told, rank_sentence(result), left=3),
        citation=export.citation(
            [run.manifest.model.model_dump() for run in runs], [task["name"] for task in result["tasks"]]
        ),
    )


ACCURACY = ("Accuracy", "95 % interval")


def _bounds(row: dict[str, Any]) -> str:
    return f"[{percent(row['accuracy_low'])}, {percent(row['accuracy_high'])}]"


def of_run(run: Run, text: bool) -> Report:
    summary, who = run_summary(run), "model"
    rows = export.run_rows(summary)
    told = [
        (row["task"], str(row["n"]), row["mode"], row["view"], percent(row["accuracy"]), _bounds(row)) for row in rows
    ]
    headers = ("Task", "n", "Mode", "View", *ACCURACY)
    model = run.manifest.model
    lead = "; ".join(
        f"{inline(task['name'])} (n = {task['n']:,}): "
        + ", ".join(
            f"{percent(row['accuracy'])} % {_bounds(row)} by {NAMES[row['mode']]}"
            for row in rows
            if row["task"] == task["name"]
        )
        for task in summary["tasks"]
    )
    return Report(
        title=f"Accuracy of {inline(model.name)}",
        lead=f"{lead}.",
        figures=tuple(run_figures(summary)),
        sections=(),
        tables=(
            table_of(headers, told),
            "Accuracy in percent with 95 % Wilson intervals (this checkpoint, new items).",
        ),
        checks=(),
        who=(who,),
        names=(model.name,),
        items=tuple(run_rows({who: run})),
        prompts=prompts_of({who: run}) if text else {},
        text=text,
        csv=export.csv_table(rows),
        latex=export.latex_table(headers, told, f"Accuracy of {model.name}", left=4),
        citation=export.citation([model.model_dump()], list(run.tasks)),
    )


def report_markdown(report: Report) -> str:
    """Charts lie beside it, in the folder ``CHARTS``."""
    charts = [
        f"## {figure.title}\n\n![{figure.title}]({CHARTS}/{figure.name}.svg)\n\n{inline(figure.caption)}"
        for figure in report.figures
    ]
    strip = [f"* {check.name}: {check.told}{' ⚠' if check.fine is False else ''}" for check in report.checks]
    held = ["## How far to believe it", "\n".join(strip)] if strip else []
    parts = [
        f"# {report.title}",
        report.lead,
        *charts[:1],
        *held,
        *report.sections,
        *charts[1:],
        "## Tables",
        *report.tables,
    ]
    return "\n\n".join(parts) + "\n"


def save_report(report: Report, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write what ``formats`` name, each file whole or not at all; everything is made before anything is written."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"unknown format {', '.join(unknown) or 'none'!r}: expected {' or '.join(FORMATS)}, or both")
    made: dict[Path, str] = {}
    if "md" in formats:
        made |= {folder / CHARTS / f"{figure.name}.svg": svg(figure) for figure in report.figures}
        made[folder / "report.md"] = report_markdown(report)
    if "html" in formats:
        from reports.page import page

        made[folder / "report.html"] = page(report)
    for path, content in made.items():
        write_text(path, content)
    return [path for path in made if path.parent == folder]
