"""The tables of `evalkit bench ttft`."""

from typing import Any

from models.bench.kda_tables import kernel_grid
from models.bench.render import NONE, Grid, median, size, times
from models.bench.ttft import SIDES

TITLE = "Time to first token: a teacher and its hybrid"


def grids(result: dict[str, Any]) -> list[Grid]:
    out = []
    for model in result["models"]:
        rows = [row for row in result["rows"] if row["model"] == model["name"]]
        out += [_times(model, rows), _caches(model, rows)]
    out += [kernel_grid(f"{p['model']}, {p['side']}, prefill of {p['tokens']} tokens", p) for p in result["kernels"]]
    return [grid for grid in out if grid.rows]


def _times(model: dict[str, Any], rows: list[dict[str, Any]]) -> Grid:
    kept, layers = model["kept"], model["layers"]
    millions = [f"{model['parameters'][side] / 1e6:.1f}M" for side in SIDES]
    title = (
        f"{model['name']} ({model['family']}, random weights): attention kept in {len(kept)} of {layers} layers "
        f"({', '.join(map(str, kept)) or 'none'}); parameters {' and '.join(millions)}"
    )
    lines: list[tuple[str, ...]] = []
    for row in rows:
        for side in SIDES:
            one, hybrid = row[side], side == "hybrid"
            known = (str(row["tokens"]), side)
            if one["status"] != "ok":
                lines.append((*known, one["status"], *[NONE] * 7))
                continue
            ratios = [times(row[name]) if hybrid else NONE for name in ("ttft_ratio", "decode_ratio")]
            more = size(one["peak_bytes"]), ", ".join(one["attention"]) or NONE
            lines.append((*known, *median(one["ttft_ms"]), ratios[0], *median(one["decode_ms"]), ratios[1], *more))
    header = ("tokens", "side", "TTFT ms", "IQR", "faster", "decode ms", "IQR", "faster", "peak", "attention")
    return Grid(title, header, tuple(lines), left=2)


def _caches(model: dict[str, Any], rows: list[dict[str, Any]]) -> Grid:
    lines: list[tuple[str, ...]] = []
    for row in rows:
        for side in SIDES:
            one = row[side]
            counted = [size(one[name]) for name in ("kv_cache_bytes", "kda_state_bytes")]
            formula = [size(one[name]) for name in ("kv_cache_formula_bytes", "kda_state_formula_bytes")]
            saved = [f"{-row[name]:+.1%}" if side == "hybrid" else NONE for name in ("kv_cache_saved", "cache_saved")]
            lines.append((str(row["tokens"]), side, counted[0], formula[0], saved[0], counted[1], formula[1], saved[1]))
    header = (
        "tokens",
        "side",
        "KV cache",
        "by formula",
        "less",
        "KDA states",
        "by formula",
        "both, less",
    )
    batch = rows[0]["batch"] if rows else 1
    return Grid(f"{model['name']}: cache after the prefill, batch {batch}", header, tuple(lines), left=2)
