"""The charts of a ranking of checkpoints, drawn from rank.json; and of one run alone."""

from itertools import combinations
from typing import Any

from scipy.stats import rankdata

from evalkit.records import GENERATION, LOGLIKELIHOOD, MODES, Mode
from reports.chart_style import ALARM, INK, LL, MODE_COLOURS, MUTED, REST, Figure, altair, panel, points
from reports.charts import dots, interval
from reports.table import NAMES, NO_SIGNAL

LABELLED = 12
"""Of more checkpoints than this only the reversed ones are named in the charts."""
OF_CHECKPOINTS = "95 % intervals, of this checkpoint (over items)"


def rank_figures(result: dict[str, Any]) -> list[Figure]:
    """The first is the one to begin with."""
    found = [scatter(result), slopes(result), training(result)]
    return [figure for figure in found if figure is not None]


def _cells(result: dict[str, Any]) -> list[tuple[str, int, dict[str, Any]]]:
    """(name, items, ranking): the tasks with signal together, then each task."""
    tasks = [(task["name"] + ("" if task["signal"] else f" {NO_SIGNAL}"), task["n"], task) for task in result["tasks"]]
    if len(tasks) == 1 or not result["overall"]:
        return tasks
    used = [task["n"] for task in result["tasks"] if task["name"] in result["overall"]["tasks"]]
    return [(f"overall ({len(used)} task{'s' if len(used) > 1 else ''})", sum(used), result["overall"]), *tasks]


def _accuracy(point: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"checkpoint": point["label"], "tokens": point["tokens"]}
    for mode in MODES:
        row[mode] = points(found[mode]["mean"])
        row[f"{mode}_low"], row[f"{mode}_high"] = (points(bound) for bound in found[mode]["ci95"])
    return row


def scatter(result: dict[str, Any]) -> Figure:
    """Accuracy by log-likelihood against accuracy by generation, a point a checkpoint."""
    alt, panels = altair(), []
    cells = _cells(result)
    for at, (name, n, cell) in enumerate(cells):
        rows = [_accuracy(p, found) for p, found in zip(result["checkpoints"], cell["accuracy"], strict=True)]
        told = ["checkpoint:N", *(alt.Tooltip(f"{mode}:Q", format=".1f", title=NAMES[mode]) for mode in MODES)]
        base = alt.Chart().encode(tooltip=told)

        def axis(mode: Mode, kind: Any, tail: str = "") -> Any:
            title = f"accuracy by {NAMES[mode]} (percent)"
            return kind(
                f"{mode}{tail}:Q", title=title, scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=8)
            )

        x, y = axis(LOGLIKELIHOOD, alt.X), axis(GENERATION, alt.Y)
        layers = [
            base.mark_rule(color=REST, opacity=0.6).encode(
                x=axis(LOGLIKELIHOOD, alt.X, "_low"), x2="loglikelihood_high:Q", y=y
            ),
            base.mark_rule(color=REST, opacity=0.6).encode(
                y=axis(GENERATION, alt.Y, "_low"), y2="generation_high:Q", x=x
            ),
            base.mark_circle(size=80, color=LL, opacity=1).encode(x=x, y=y),
        ]
        if at == 0 and len(rows) <= LABELLED:
            text = alt.Chart().mark_text(align="left", dx=7, dy=-7, color=INK)
            layers.append(text.encode(x=x, y=y, text="checkpoint:N"))
        found = cell["rankings"][cell["normalisation"]]
        tau = "" if found["tau"] is None else f", tau {found['tau']:.2f}"
        panels.append(panel(*layers, title=name, note=f"n = {n:,}{tau}", rows=rows, height=300 if at == 0 else 220))
    return Figure(
        name="scatter",
        title="Log-likelihood against generation over checkpoints",
        caption=f"{len(result['checkpoints'])} checkpoints; n: items that all of them answered; {OF_CHECKPOINTS} "
        "(Wilson, or t with CR2 where items are clustered; overall: equal-weight average). Tau: Kendall’s tau-b.",
        panels=tuple(panels),
    )


def slopes(result: dict[str, Any]) -> Figure | None:
    """Each checkpoint's rank by log-likelihood and by generation; where two lines cross, the modes disagree."""
    name, n, cell = _cells(result)[0]
    labels = [point["label"] for point in result["checkpoints"]]
    means = {LOGLIKELIHOOD: cell["rankings"][cell["normalisation"]]["loglikelihood"]}
    means[GENERATION] = [found[GENERATION]["mean"] for found in cell["accuracy"]]
    ranks = {mode: [float(r) for r in rankdata([-value for value in values])] for mode, values in means.items()}
    reversed_ = {frozenset((row["first"], row["second"])) for row in cell["pairs"]["reversals"]}
    alt = altair()
    rows: list[dict[str, Any]] = []
    for at, label in enumerate(labels):
        kind = "in a reversal that is resolved" if any(label in pair for pair in reversed_) else "other"
        for x, mode in enumerate(MODES):
            row = {"what": "line", "checkpoint": label, "kind": kind, "x": x, "mode": NAMES[mode]}
            rows.append({**row, "rank": ranks[mode][at], "accuracy": points(means[mode][at])})
    ll, gen = ranks[LOGLIKELIHOOD], ranks[GENERATION]
    for i, j in combinations(range(len(labels)), 2):
        before, after = ll[i] - ll[j], gen[i] - gen[j]
        if before * after < 0:
            share = before / (before - after)
            marked = frozenset((labels[i], labels[j])) in reversed_
            pair = " and ".join((labels[i], labels[j]))
            kind = "reversal, resolved in both modes" if marked else "crossing within noise"
            rows.append(
                {"what": "cross", "pair": pair, "kind": kind, "x": share, "rank": ll[i] + share * (gen[i] - ll[i])}
            )
    named, room = len(labels) <= LABELLED, alt.expr("width * 0.22")
    axis = alt.Axis(
        values=[0, 1],
        labelExpr="datum.value < 0.5 ? 'log-likelihood' : 'generation'",
        grid=False,
        orient="top",
        domain=False,
        ticks=False,
    )
    x = alt.X("x:Q", title=None, scale=alt.Scale(domain=[-0.45, 1.45], nice=False), axis=axis)
    y = alt.Y(
        "rank:Q",
        title="rank (1: best)",
        scale=alt.Scale(domain=[len(labels) + 0.5, 0.5], nice=False),
        axis=alt.Axis(grid=False, values=list(range(1, len(labels) + 1)), domain=False, ticks=False),
    )
    line = alt.Chart().transform_filter("datum.what == 'line'")
    cross = alt.Chart().transform_filter("datum.what == 'cross'")
    kinds = ["reversal, resolved in both modes", "crossing within noise"]
    mark = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=kinds, range=[ALARM, REST]),
        legend=alt.Legend(symbolType="diamond", columns=1, labelLimit=240),
    )
    strong = alt.condition("datum.kind != 'other'", alt.value(ALARM), alt.value(MUTED))
    told = ["checkpoint:N", "mode:N", "rank:Q", alt.Tooltip("accuracy:Q", format=".1f", title="accuracy (percent)")]
    layers = [
        line.mark_line(strokeWidth=1.8).encode(x=x, y=y, detail="checkpoint:N", color=strong, tooltip=told),
        line.mark_circle(size=60, opacity=1).encode(x=x, y=y, color=strong, tooltip=told),
        cross.mark_point(shape="diamond", size=70, filled=True, opacity=1).encode(
            x=x, y=y, color=mark, tooltip=["pair:N", "kind:N"]
        ),
    ]
    for side, align, shift in ((0, "right", -9), (1, "left", 9)):
        shown = line.transform_filter(f"datum.x == {side}" + ("" if named else " && datum.kind != 'other'"))
        layers.append(
            shown.mark_text(align=align, dx=shift, color=INK, limit=room).encode(x=x, y=y, text="checkpoint:N")
        )
    pairs = cell["pairs"]
    height = max(180, 26 * len(labels))
    return Figure(
        name="slopes",
        title="The two rankings",
        caption=f"{name}, n = {n:,} items. Of {pairs['all']} pairs {pairs['resolved']} are told apart by both "
        f"modes and {len(pairs['reversals'])} of those are reversed (paired tests, Holm over all pairs and modes). "
        "Ranks have no interval of their own: see tau’s ceiling.",
        panels=(panel(*layers, rows=rows, height=height),),
    )


def training(result: dict[str, Any]) -> Figure | None:
    """Accuracy in both modes against the tokens trained on, a line a training run."""
    alt, panels = altair(), []
    for at, (name, n, cell) in enumerate(_cells(result)):
        rows = [
            {
                "tokens": point["tokens"],
                "checkpoint": point["label"],
                "line": f"{point['recipe']} {point['seed']} {mode}",
                "mode": NAMES[mode],
                "accuracy": points(found[mode]["mean"]),
                "low": points(found[mode]["ci95"][0]),
                "high": points(found[mode]["ci95"][1]),
            }
            for point, found in zip(result["checkpoints"], cell["accuracy"], strict=True)
            if point["tokens"] is not None
            for mode in MODES
        ]
        if len({row["tokens"] for row in rows}) < 2:
            return None
        colour = alt.Color("mode:N", scale=alt.Scale(domain=list(MODE_COLOURS), range=list(MODE_COLOURS.values())))
        shape = alt.Shape("mode:N", scale=alt.Scale(domain=list(MODE_COLOURS), range=["circle", "diamond"]))
        numbers = [alt.Tooltip(f"{key}:Q", format=".1f") for key in ("accuracy", "low", "high")]
        told = ["checkpoint:N", "mode:N", alt.Tooltip("tokens:Q", format=",")]
        x = alt.X("tokens:Q", title="tokens trained on", axis=alt.Axis(format="~s", tickCount=5))
        scale = alt.Scale(zero=False)
        y = alt.Y("accuracy:Q", title="accuracy (percent)", scale=scale)
        base = alt.Chart().encode(x=x, color=colour, tooltip=[*told, *numbers])
        layers = [
            base.mark_rule(opacity=0.55).encode(y=alt.Y("low:Q", title="accuracy (percent)", scale=scale), y2="high:Q"),
            base.mark_line(strokeWidth=1.8).encode(y=y, detail="line:N"),
            base.mark_point(filled=True, size=55, opacity=1).encode(y=y, shape=shape),
        ]
        panels.append(panel(*layers, title=name, note=f"n = {n:,}", rows=rows, height=260 if at == 0 else 200))
    return Figure(
        name="training",
        title="Along training",
        caption=f"n: items that all checkpoints answered; a line a training run; {OF_CHECKPOINTS} (Wilson, or t with "
        "CR2 where items are clustered). Points of one run are not independent.",
        panels=tuple(panels),
    )


def run_figures(summary: dict[str, Any]) -> list[Figure]:
    """One run: accuracy in both modes, from ``reports.summary``."""
    rows = [
        {
            "row": f"{task['name']} (n = {task['n']:,})",
            "series": NAMES[mode],
            "signal": True,
            **interval({**cell, "mean": cell["accuracy"]}),
        }
        for task in summary["tasks"]
        for mode, cell in task["modes"].items()
    ]
    total = sum(task["n"] for task in summary["tasks"])
    chart = dots(rows, MODE_COLOURS, axis="accuracy (percent)", title="", zero=False)
    caption = f"n = {total:,} items in {len(summary['tasks'])} tasks; {OF_CHECKPOINTS} (Wilson)."
    return [Figure(name="accuracy", title="Accuracy in both modes", caption=caption, panels=(chart,))]
