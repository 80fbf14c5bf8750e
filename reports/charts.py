"""The charts of a comparison, drawn from compare.json."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from evalkit.records import GENERATION, LOGLIKELIHOOD, MODES, VERDICTS
from reports.chart_style import (
    FLOW_COLOURS,
    INK,
    MODE_COLOURS,
    MUTED,
    NARROW,
    WHO_COLOURS,
    Figure,
    altair,
    panel,
    points,
)
from reports.explain import overall_flows
from reports.table import NAMES, NO_SIGNAL

OVER_ITEMS = "95 % intervals, of these checkpoints over new items"


def comparison_figures(result: dict[str, Any], items: Sequence[dict[str, Any]]) -> list[Figure]:
    """The first is the one to begin with."""
    found = [losses(result), accuracies(result), flows(result), flips(result, items)]
    return [figure for figure in found if figure is not None]


def interval(cell: dict[str, Any]) -> dict[str, float]:
    """mean, low and high of a cell of compare.json, in points."""
    return {"mean": points(cell["mean"]), "low": points(cell["ci95"][0]), "high": points(cell["ci95"][1])}


def _whole(result: dict[str, Any]) -> str:
    """The label of all tasks with signal together; empty where that is one task or none."""
    used = len(result["overall"]["tasks"])
    return f"overall ({used} tasks)" if used > 1 else ""


def _label(task: dict[str, Any], signal: bool) -> str:
    return f"{task['name']} (n = {task['n']:,})" + ("" if signal else f" {NO_SIGNAL}")


def _sizes(tasks: Sequence[dict[str, Any]]) -> str:
    return f"n = {sum(task['n'] for task in tasks):,} items in {len(tasks)} task{'s' if len(tasks) != 1 else ''}"


def _clustered(tasks: Sequence[dict[str, Any]]) -> bool:
    return any(task["clusters"] < task["n"] for task in tasks)


def _names(labels: Sequence[str]) -> Any:
    """A row's axis. Of a long name the middle is left out, so that its end, with n, is read on a phone as well."""
    alt = altair()
    shown = f"truncate(datum.label, {NARROW} ? 24 : 30, 'center')"
    axis = alt.Axis(grid=False, domain=False, ticks=False, labelExpr=shown)
    return alt.Y("row:N", sort=list(labels), title=None, axis=axis)


def dots(
    rows: Sequence[dict[str, Any]], colours: dict[str, str], *, axis: str, title: str, zero: bool
) -> dict[str, Any]:
    """Estimates with their intervals, the series of one row side by side."""
    alt = altair()
    labels = list(dict.fromkeys(row["row"] for row in rows))
    series = [name for name in colours if any(row["series"] == name for row in rows)]
    y = _names(labels)
    offset = alt.YOffset("series:N", sort=series, scale=alt.Scale(paddingOuter=0.5))
    colour = alt.Color("series:N", scale=alt.Scale(domain=series, range=[colours[name] for name in series]))
    shape = alt.Shape("series:N", scale=alt.Scale(domain=series, range=["circle", "diamond", "square"][: len(series)]))
    told = [alt.Tooltip("row:N", title="Task"), alt.Tooltip("series:N", title="Series")]
    told += [alt.Tooltip(f"{key}:Q", format="+.1f" if zero else ".1f") for key in ("mean", "low", "high")]
    faint = alt.condition("datum.signal", alt.value(1), alt.value(0.4))
    scale, ruler = alt.Scale(zero=False, nice=True), alt.Axis(grid=True, tickCount=8)
    x = alt.X("low:Q", title=axis, scale=scale, axis=ruler)
    base = alt.Chart().encode(y=y, yOffset=offset, color=colour, opacity=faint, tooltip=told)
    layers = [
        base.mark_rule(strokeWidth=2).encode(x=x, x2="high:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(x=alt.X("mean:Q", scale=scale), shape=shape),
    ]
    if zero:
        layers.insert(0, alt.Chart().mark_rule(color=MUTED, strokeDash=[3, 3]).encode(x=alt.datum(0, axis=ruler)))
    if any("floor" in row for row in rows):
        once = alt.Chart().transform_filter(alt.datum.series == series[0])
        tick = once.mark_tick(color=INK, thickness=1.5, size=26)
        layers.append(tick.encode(x="floor:Q", y=y, tooltip=[alt.Tooltip("floor:Q", format=".1f")]))
    return panel(*layers, title=title, rows=rows, height=len(labels) * (16 + 13 * len(series)))


def losses(result: dict[str, Any]) -> Figure:
    """Loss by log-likelihood and by generation, side by side, and what lies between them in both units."""
    overall, rows, between = result["overall"], [], []
    whole = _whole(result)
    for mode, cell in overall["modes"].items() if whole else ():
        rows.append({"row": whole, "series": NAMES[mode], "signal": True, **interval(cell["gap"])})
    kind = "hidden_gap" if overall["hidden_gap"] or any(t["hidden_gap"] for t in result["tasks"]) else "protocol_gap"
    cells = [(whole, True, overall[kind])] if whole else []
    for task in result["tasks"]:
        for mode, cell in task["modes"].items():
            label = _label(task, all(task["signal"].values()))
            signal = task["signal"][mode]
            rows.append({"row": label, "series": NAMES[mode], "signal": signal, **interval(cell["gap"])})
        gap = task[kind] or (task["protocol_gap"] or {}).get("parts", {}).get("mode")  # a hidden gap in one view
        cells.append((_label(task, all(task["signal"].values())), all(task["signal"].values()), gap))
    for label, signal, gap in cells:
        if gap:
            between.append({"row": label, "series": "raw points", "signal": signal, **interval(gap)})
            between.append({"row": label, "series": "formula score", "signal": signal, **interval(gap["formula"])})
    axis = "points lost (teacher − student)"
    panels = [dots(rows, MODE_COLOURS, axis=axis, title="Loss in each mode", zero=True)]
    name = kind.replace("_", " ")
    if between:
        units = {"raw points": INK, "formula score": "#CC79A7"}
        title = f"{name.capitalize()}: generation’s loss − log-likelihood’s"
        panels.append(dots(between, units, axis=f"{name} (points; hundredths)", title=title, zero=True))
    how = (
        "t with CR2 where items are clustered, else Tango’s score interval" if _clustered(result["tasks"]) else "Tango"
    )
    marked = "" if all(all(t["signal"].values()) for t in result["tasks"]) else f" {NO_SIGNAL}, faint: without signal."
    return Figure(
        name="losses",
        title="Loss by log-likelihood and by generation",
        caption=f"{_sizes(result['tasks'])}; {OVER_ITEMS} (losses: {how}{f'; {name}: t' if between else ''}; "
        f"overall: equal-weight average).{marked}",
        panels=tuple(panels),
    )


def accuracies(result: dict[str, Any]) -> Figure:
    """Both models in each mode, with the floor."""
    panels = []
    for mode in MODES:
        rows = [
            {
                "row": _label(task, task["signal"][mode]),
                "series": who,
                "signal": task["signal"][mode],
                "floor": points(task["modes"][mode]["floor"]),
                **interval({**task["modes"][mode][who], "mean": task["modes"][mode][who]["accuracy"]}),
            }
            for task in result["tasks"]
            if mode in task["modes"]
            for who in ("teacher", "student")
        ]
        if rows:
            title = f"By {NAMES[mode]}"
            panels.append(dots(rows, WHO_COLOURS, axis="accuracy (percent)", title=title, zero=False))
    how = "t with CR2 where items are clustered, else Wilson" if _clustered(result["tasks"]) else "Wilson"
    return Figure(
        name="accuracy",
        title="Accuracy in both modes",
        caption=f"{_sizes(result['tasks'])}; {OVER_ITEMS} ({how}). Upright tick: the floor, the best of "
        "guessing, always the same answer, and ranking the choices without the question.",
        panels=tuple(panels),
    )


def flows(result: dict[str, Any]) -> Figure | None:
    """Generation's loss by what right answers became."""
    alt = altair()
    tasks = [task for task in result["tasks"] if task["flows"]]
    if not tasks:
        return None
    rows: list[dict[str, Any]] = []
    whole = _whole(result)
    cells = [(whole, kind, net, None, None) for kind, net in overall_flows(result) if whole]
    for task in tasks:
        label = _label(task, task["signal"][GENERATION])
        for row in task["flows"]:
            net = {"mean": row["net"], "ci95": row["ci95"]}
            cells.append((label, row["outcome"], net, row["lost"], row["gained"]))
    kinds = [kind for kind in FLOW_COLOURS if any(kind == cell[1] and cell[2]["mean"] for cell in cells)]
    for label, kind, net, lost, gained in cells:
        if kind in kinds:
            rows.append({"row": label, "outcome": kind, "lost": lost, "gained": gained, **interval(net)})
    scale = alt.Scale(domain=kinds, range=[FLOW_COLOURS[kind] for kind in kinds])
    colour = alt.Color("outcome:N", scale=scale, legend=alt.Legend(columns=alt.expr(f"{NARROW} ? 2 : 3")))
    zero = alt.Chart().mark_rule(color=MUTED).encode(x=alt.datum(0))
    told = [
        alt.Tooltip("row:N", title="task"),
        "outcome:N",
        *(alt.Tooltip(f"{key}:Q", format="+.1f") for key in ("mean", "low", "high")),
    ]
    labels = list(dict.fromkeys(row["row"] for row in rows))
    y = _names(labels)
    bars = (
        alt.Chart()
        .mark_bar(height=16)
        .encode(
            x=alt.X("mean:Q", title="net loss by generation (points)"),
            y=y,
            color=colour,
            tooltip=[*told, "lost:Q", "gained:Q"],
        )
    )
    panels = [panel(bars, zero, title="By task", rows=rows, height=26 * len(labels))] if rows else []
    first = [row for row in rows if row["row"] == rows[0]["row"]]
    if first:
        y = alt.Y("outcome:N", sort=kinds, title=None, axis=alt.Axis(grid=False, domain=False, ticks=False))
        base = alt.Chart().encode(y=y, tooltip=told)
        bar = base.mark_bar(height=16).encode(
            x=alt.X("mean:Q", title="net loss by generation (points)"),
            color=alt.Color("outcome:N", scale=scale, legend=None),
        )
        error = base.mark_rule(color=INK, strokeWidth=1.5).encode(x="low:Q", x2="high:Q")
        panels.insert(0, panel(zero, bar, error, title=rows[0]["row"], rows=first, height=26 * len(first)))
    if not panels:
        return None
    return Figure(
        name="flows",
        title="What generation’s loss is made of",
        caption=f"{_sizes(tasks)}; right answers that became each outcome, less the reverse; the parts of a bar add up "
        f"to its loss by generation. {OVER_ITEMS} (t).",
        panels=tuple(panels),
    )


def flips(result: dict[str, Any], items: Sequence[dict[str, Any]]) -> Figure | None:
    """How many items went from each outcome of the teacher to each of the student."""
    alt = altair()
    panels = []
    for mode in MODES:
        counts = Counter((row[f"teacher_{mode}"], row[f"student_{mode}"]) for row in items if f"teacher_{mode}" in row)
        if not counts:
            continue
        kinds = [kind for kind in VERDICTS if any(kind in pair for pair in counts)]
        n, most = counts.total(), max(counts.values())
        rows = [
            {
                "mode": mode,
                "teacher": t,
                "student": s,
                "items": counts[t, s],
                "share": points(counts[t, s] / n),
                "dark": counts[t, s] > most / 2,
            }
            for t in kinds
            for s in kinds
        ]
        base = alt.Chart().encode(
            x=alt.X(
                "student:N",
                sort=kinds,
                title="student",
                axis=alt.Axis(orient="top", labelAngle=0 if len(kinds) < 4 else -35, domain=False, ticks=False),
            ),
            y=alt.Y("teacher:N", sort=kinds, title="teacher", axis=alt.Axis(domain=False, ticks=False)),
            tooltip=["teacher:N", "student:N", "items:Q", alt.Tooltip("share:Q", format=".1f", title="percent")],
        )
        top = "#0072B2" if mode == LOGLIKELIHOOD else "#B34A00"
        fill = alt.Color("items:Q", scale=alt.Scale(domain=[0, most], range=["#f4f4f4", top]), legend=None)
        text = alt.condition("datum.dark", alt.value("#ffffff"), alt.value("#111111"))
        cells = base.mark_rect(stroke="#ffffff", strokeWidth=1).encode(color=fill)
        numbers = base.mark_text(fontSize=12).encode(text=alt.Text("items:Q", format=","), color=text)
        panels.append(
            panel(cells, numbers, title=f"By {NAMES[mode]}", note=f"n = {n:,}", rows=rows, height=38 * len(kinds))
        )
    if not panels:
        return None
    return Figure(
        name="flips",
        title="Flips: the outcome of each item in both models",
        caption=f"{_sizes(result['tasks'])}; counts of items, no interval. On the diagonal both models fared alike.",
        panels=tuple(panels),
    )
