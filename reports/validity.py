"""Whether a comparison's figures can be believed: what was read of the replies, ties, truncation, prompts, floor."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit.records import GENERATION, LOGLIKELIHOOD
from evalkit.stats.intervals import wilson
from reports.cells import inline
from reports.gate_output import CALIBRATION
from reports.table import percent

FILE = "calibration.json"
"""Of `evalkit check --calibrate`, where it was put into the comparison's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    name: str
    told: str
    fine: bool | None
    """None: not known."""


def read_calibration(folder: Path, result: dict[str, Any]) -> dict[str, Any] | None:
    """None: it was not measured. ValueError: it is damaged, or of neither model."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run `evalkit check --calibrate` again") from error
    if found.get("schema") != CALIBRATION:
        raise ValueError(f"{path} has the schema {found.get('schema')!r}; this evalkit reads {CALIBRATION!r}")
    if found["model"]["fingerprint"] not in (result["teacher"]["fingerprint"], result["student"]["fingerprint"]):
        raise ValueError(f"{path} is of {found['model']['name']!r}, which was not compared here; remove it")
    return found


def checks(result: dict[str, Any], items: Sequence[dict[str, Any]], calibration: dict[str, Any] | None) -> list[Check]:
    """Over all tasks; rates in percent with 95 % Wilson intervals."""
    found = []
    for name, mode, kinds, most in (
        ("Replies read", GENERATION, ("correct", "wrong"), None),
        ("Replies truncated", GENERATION, ("truncated",), 0.02),
        ("Ties in log-likelihood", LOGLIKELIHOOD, ("ambiguous",), 0.01),
    ):
        cells = [task["modes"][mode] for task in result["tasks"] if mode in task["modes"]]
        if not cells:
            continue
        rates = {who: _rate([cell[who]["outcomes"] for cell in cells], kinds) for who in ("teacher", "student")}
        shares = [rate[0] for rate in rates.values()]
        fine = min(shares) >= 0.95 and abs(shares[0] - shares[1]) <= 0.02 if most is None else max(shares) <= most
        found.append(Check(name=name, told=", ".join(f"{who} {told}" for who, (_, told) in rates.items()), fine=fine))
    same = sum(bool(row["same_prompt"]) for row in items)
    told = f"{same:,} of {len(items):,} items asked both models in the same words"
    found.append(Check(name="Prompts and template", told=told, fine=same == len(items)))
    found.append(_floor(calibration))
    return found


def _rate(counts: Sequence[dict[str, int]], kinds: Sequence[str]) -> tuple[float, str]:
    n = sum(sum(one.values()) for one in counts)
    rate = wilson(sum(one[kind] for one in counts for kind in kinds), n)
    return rate.mean, f"{percent(rate.mean)} % [{percent(rate.low)}, {percent(rate.high)}] of {n:,}"


def _floor(calibration: dict[str, Any] | None) -> Check:
    name = "A/A floor"
    if calibration is None:
        told = (
            "how often a model differs from itself was not measured; `evalkit check --calibrate` does: put its "
            f"{FILE} beside compare.json"
        )
        return Check(name=name, told=told, fine=None)
    worst = max(calibration["cells"], key=lambda cell: float(cell["flips"]))
    low, high = (percent(bound) for bound in worst["ci95"])
    model, where = inline(calibration["model"]["name"]), f"{inline(worst['task'])} by {worst['mode']}"
    told = (
        f"{model} against itself flips at most {percent(worst['flips'])} % [{low}, {high}] of "
        f"{worst['n']:,} items ({where})"
    )
    return Check(name=name, told=told, fine=float(worst["flips"]) <= 0.01)
