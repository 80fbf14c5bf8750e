"""What all charts share: a figure, the palette, and Vega-Altair, imported only where a chart is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

INK, MUTED, GRID = "#222222", "#6b6b6b", "#dcdcdc"
LL, GEN, ALARM, REST = "#0072B2", "#D55E00", "#CC3311", "#8a8a8a"
MODE_COLOURS = {"log-likelihood": LL, "generation": GEN}
WHO_COLOURS = {"teacher": "#444444", "student": "#009E73"}
FLOW_COLOURS = {
    "wrong": "#D55E00",
    "unparsed": "#CC79A7",
    "ambiguous": "#E69F00",
    "truncated": "#56B4E9",
    "empty": "#999999",
}
"""After Okabe and Ito (2008): told apart with any colour vision. those that need it have a dark one in report.css."""

WIDTH = 460
"""Pixels of a panel in an SVG; in HTML a panel is as wide as its place."""
PADDING = {"left": 0, "right": 12, "top": 5, "bottom": 5}
"""On the page: an axis' last label reaches over its end."""
NARROW = "containerSize()[0] < 420"
"""A Vega expression: the place is a phone's. False in an SVG, which has no place."""

CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": "Helvetica, Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK,
        "titleColor": INK,
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "domainColor": MUTED,
        "tickColor": MUTED,
        "gridColor": GRID,
        "labelLimit": 240,
        "labelSeparation": 4,
    },
    "axisX": {"labelFlush": False},
    "axisY": {"labelPadding": 6},
    "legend": {
        "labelColor": INK,
        "titleColor": INK,
        "orient": "top",
        "title": None,
        "labelFontSize": 12,
        "symbolSize": 70,
        "symbolOpacity": 1,
        "offset": 6,
    },
    "title": {
        "color": INK,
        "fontSize": 13,
        "fontWeight": 600,
        "anchor": "start",
        "offset": 8,
        "frame": "bounds",
        "limit": {"expr": "containerSize()[0] - 5"},
        "subtitleColor": INK,
        "subtitleFontSize": 12,
    },
    "text": {"color": INK, "fontSize": 11},
    "rule": {"color": MUTED},
}

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart and what it must say."""

    name: str
    """Of its file, and its anchor on the page."""
    title: str
    caption: str
    """What is drawn, of how many items, and what the intervals are."""
    panels: tuple[dict[str, Any], ...]
    """Vega-Lite: a view each, side by side where there is room."""

    @property
    def data(self) -> list[dict[str, Any]]:
        """Every row that is drawn."""
        return [row for panel in self.panels for row in panel["data"]["values"]]


def altair() -> Any:
    """Vega-Altair; ValueError where it is missing."""
    try:
        import altair as alt
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise ValueError(f"a report needs {error.name}: pip install 'evalkit[report]'") from error
    return alt


def points(value: float) -> float:
    """A fraction as percentage points."""
    return 100 * value


def panel(*layers: Any, title: str = "", note: str = "", rows: Rows, height: Any = None) -> dict[str, Any]:
    """One view of ``layers`` over ``rows`` as Vega-Lite; ``note`` stands below the title."""
    alt = altair()
    chart = alt.layer(*layers)
    head = {"title": alt.Title(title, subtitle=note) if note else title} if title else {}
    chart = chart.properties(width=WIDTH, **head, **({"height": height} if height else {}))
    spec: dict[str, Any] = chart.to_dict()
    for unused in ("config", "$schema", "datasets"):
        spec.pop(unused, None)
    for layer in spec["layer"]:
        layer.pop("data", None)  # a chart without data names an empty set; the rows are the view's
    return {**spec, "data": {"values": list(rows)}}


def in_page(spec: dict[str, Any], figure: Figure) -> dict[str, Any]:
    """As wide as its place on the page, with the figure's words for whoever can't see it."""
    fit = {"type": "fit-x", "contains": "padding"}
    told = f"{figure.title}. {figure.caption}"
    return {
        "$schema": schema(),
        "description": told,
        **spec,
        "width": "container",
        "autosize": fit,
        "config": CONFIG,
        "padding": PADDING,
    }


def svg(figure: Figure) -> str:
    """The figure as one SVG on white, so that it reads on a dark page as well."""
    import vl_convert

    whole: dict[str, Any] = {"$schema": schema(), "config": {**CONFIG, "background": "white"}, "spacing": 28}
    whole["resolve"] = {"scale": dict.fromkeys(("color", "shape", "opacity", "x", "y", "yOffset"), "independent")}
    whole["concat"], whole["columns"] = list(figure.panels), min(2, len(figure.panels))
    whole["padding"] = 12
    drawn: str = vl_convert.vegalite_to_svg(whole)
    return drawn


def schema() -> str:
    address: str = altair().SCHEMA_URL
    return address


def library() -> str:
    """Vega, Vega-Lite and vega-embed as one script that asks the network for nothing."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script
