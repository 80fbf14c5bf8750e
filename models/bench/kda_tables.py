"""The tables of `evalkit bench kda`."""

from typing import Any

from models.bench.kda import BOTH, DECODE, FORWARD
from models.bench.render import NONE, Grid, median, milliseconds, size, times

TITLE = "Kimi Delta Attention: implementations side by side"
GATE_PARAMETERS = ("dA_log", "ddt_bias")
SHOWN, WIDEST = 20, 60
"""Kernels in a table, and characters of a kernel's name."""
INPUT_GRADIENTS = ("dq", "dk", "dv", "dg", "dbeta", "dinitial_state")


def grids(result: dict[str, Any]) -> list[Grid]:
    gates = result["settings"]["gates"]
    out = [_times(result, name, gate) for name in (FORWARD, BOTH, DECODE) for gate in gates]
    out += [_errors(result), *_kernels(result)]
    return [grid for grid in out if grid.rows]


def _times(result: dict[str, Any], name: str, gate: str) -> Grid:
    asked = result["settings"]
    rows: list[tuple[str, ...]] = []
    for row in result["rows"]:
        if (row["pass"], row["gate"]) != (name, gate):
            continue
        known = (str(row["batch"] if name == DECODE else row["tokens"]), row["impl"])
        floor = milliseconds(row["floor"]["ms"])
        if row["status"] != "ok":
            rows.append((*known, row["status"], NONE, floor, *[NONE] * 5))
            continue
        ratios = times(row["times_floor"]), times(row["times_fla"], 3)
        first = f"{row['first_call_s']:.2f}" + ("*" if row["first_in_process"] else " ")
        more = milliseconds(row["host_ms"]), size(row["peak_bytes"]), first
        rows.append((*known, *median(row["ms"]), floor, *ratios, *more))
    heads = f"{asked['heads']} heads" + (
        "" if asked["kv_heads"] == asked["heads"] else f" ({asked['kv_heads']} of k and v)"
    )
    batch = "" if name == DECODE else f", batch {asked['batch']}"
    title = f"{name}, {gate} gate, {heads} of {asked['head_dim']}{batch}, {asked['dtype']}"
    per = "batch" if name == DECODE else "tokens"
    header = (per, "impl", "ms", "IQR", "floor ms", "/floor", "/fla", "host ms", "peak", "first call s")
    return Grid(title, header, tuple(rows), left=2)


def _errors(result: dict[str, Any]) -> Grid:
    rows: list[tuple[str, ...]] = []
    for row in result["errors"]:
        rms = row["rms"]
        cells = [_worst(rms, names) for names in (("o",), ("state",), INPUT_GRADIENTS, GATE_PARAMETERS)]
        cells += [_worst(rms, ("step_o",)), _worst(rms, ("step_state",))]
        rows.append((row["gate"], row["impl"], *cells))
    header = ("gate", "impl", "output", "state", "worst gradient", "gate's", "step", "its state")
    title = f"RMS error against float64, {result['errors'][0]['tokens']} tokens" if rows else ""
    return Grid(title, header, tuple(rows), left=2)


def _worst(rms: dict[str, float], names: tuple[str, ...]) -> str:
    """The largest of ``names``, said with its name where there are several."""
    found = [(rms[name], name) for name in names if name in rms]
    if not found:
        return NONE
    value, name = max(found)
    return f"{value:.1e}" + (f" {name}" if len(names) > 1 else "")


def kernel_grid(what: str, profile: dict[str, Any]) -> Grid:
    """The slowest kernels of one profiled call; the JSON has them all."""
    shown = profile["kernels"][:SHOWN]
    rows = [
        (
            _name(kernel["kernel"]),
            f"{kernel['launches']:g}",
            milliseconds(kernel["ms"]),
            f"{kernel['share']:.1%}",
            *(_shape(kernel[name]) for name in ("grid", "block")),
            *(_number(kernel[name]) for name in ("registers", "shared_bytes", "occupancy_percent")),
        )
        for kernel in shown
    ]
    if len(shown) < len(profile["kernels"]):
        rest = profile["kernels"][SHOWN:]
        rest_ms, share = sum(kernel["ms"] for kernel in rest), sum(kernel["share"] for kernel in rest)
        rows.append((f"{len(rest)} more", NONE, milliseconds(rest_ms), f"{share:.1%}", *[NONE] * 5))
    if profile["reason"]:
        rows = [(f"not profiled: {profile['reason']}", *[NONE] * 8)]
    total = sum(kernel["ms"] for kernel in profile["kernels"])
    header = ("kernel", "launches", "ms", "share", "grid", "block", "registers", "shared", "occupancy %")
    return Grid(f"Kernels of {what}: {milliseconds(total)} ms", header, tuple(rows))


def _kernels(result: dict[str, Any]) -> list[Grid]:
    return [
        kernel_grid(f"{p['impl']}, {p['pass']}, {p['gate']}, {p['batch']} x {p['tokens']} tokens", p)
        for p in result["kernels"]
    ]


def _name(kernel: str) -> str:
    """A C++ template's name can fill a screen."""
    return kernel if len(kernel) <= WIDEST else kernel[: WIDEST - 3] + "..."


def _shape(value: list[int] | None) -> str:
    return "x".join(map(str, value)) if value else NONE


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"
