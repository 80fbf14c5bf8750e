"""The layer probe of a student (models/probe.py), as a table for the terminal and for Markdown."""

from typing import Any

from rich import box
from rich.table import Table

HEADERS = ("Layer", "Cosine", "Relative error")


def probe_rows(probe: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(str(one["layer"]), f"{one['cosine']:.3f}", f"{one['relative_error']:.3f}") for one in probe["layers"]]


def probe_table(probe: dict[str, Any]) -> Table:
    table = Table(*HEADERS, box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.justify = "right"
    for row in probe_rows(probe):
        table.add_row(*row)
    return table


def probe_sentence(probe: dict[str, Any]) -> str:
    """What the figures mean, and the effect of all layers together."""
    layers = (
        "Output of each KDA layer against the teacher's attention, both given the teacher's own hidden states"
        if probe["layers"]
        else "Every layer keeps its attention"
    )
    return (
        f"{layers}. All together: KL from the teacher {probe['kl_nats']:.3f} nats a token, the same likeliest token "
        f"at {probe['top1_agreement']:.1%} of {probe['tokens']:,} tokens ({probe['text']})."
    )
