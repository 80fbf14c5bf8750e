"""The HTML report: one file that asks the network for nothing.

Scripts run only where their hash is in the page's Content-Security-Policy, and charts by Vega's interpreter (``ast``)
instead of eval, so nothing that a model wrote can run; our script writes model text as text nodes only.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evalkit import __version__
from evalkit.records import VERDICTS
from reports.browse import packed
from reports.chart_style import in_page, library
from reports.markup import plain, to_html
from reports.report import Report

TEMPLATES = Path(__file__).parent / "templates"


def page(report: Report) -> str:
    scripts = [_inline(library()), _inline((TEMPLATES / "report.js").read_text(encoding="utf-8"))]
    items, limit = packed(report.items, report.who, report.prompts, report.text)
    charts = {
        f"{figure.name}-{at}": in_page(panel, figure)
        for figure in report.figures
        for at, panel in enumerate(figure.panels)
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        title=plain(report.title),
        policy=_policy(scripts),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        charts=Markup(_json(charts)),
        about=Markup(_json({"names": dict(zip(report.who, report.names, strict=True)), "copy": _copies(report)})),
        items=Markup(items),
        limit=limit,
        verdicts=VERDICTS,
        lead=Markup(to_html(report.lead)),
        checks=[
            (check, Markup(to_html(check.told).removeprefix("<p>").removesuffix("</p>"))) for check in report.checks
        ],
        sections=Markup(to_html("\n\n".join(report.sections))),
        tables=Markup(to_html("\n\n".join(report.tables), level=1)),
        version=__version__,
    )


def _copies(report: Report) -> dict[str, str]:
    return {"LaTeX": report.latex, "CSV": report.csv, "citation": report.citation}


def _inline(script: str) -> str:
    """As a script element may hold it; ``<\\/`` is the same to JavaScript."""
    return script.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _json(value: Any) -> str:
    """JSON that can't end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _policy(scripts: list[str]) -> str:
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
