"""Where the time goes: each kernel's share of a call, with its registers, shared memory and occupancy."""

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

CALLS = 5
"""Profiled after one that warms the profiler up."""


def kernels(call: Callable[[], object], calls: int = CALLS) -> list[dict[str, Any]]:
    """The kernels of one ``call`` (already compiled) on this CUDA device, the slowest first.

    Kernels run one after another here; their sum leaves out the gaps between them. ValueError where the profiler sees
    no kernel (CUPTI is not to be had).
    """
    call()
    torch.cuda.synchronize()
    for count in (1, calls):  # the first use of CUPTI is slow, and its first kernels are sometimes lost
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            for _ in range(count):
                call()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory(prefix="evalkit-") as folder:
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    found = by_kernel(events, calls)
    if not found:
        raise ValueError("the profiler saw no kernel: CUPTI, which torch.profiler reads, does not work on this machine")
    return found


def by_kernel(events: Iterable[Mapping[str, Any]], calls: int) -> list[dict[str, Any]]:
    """Sum a Chrome trace's device events by kernel and launch shape, for one of ``calls`` equal calls.

    The trace's "dur" is in microseconds. Copies and fills count as kernels, since they take the device's time too.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        if event.get("ph") != "X" or event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        args = event.get("args", {})
        key = (event["name"], json.dumps(args.get("grid")))
        row = rows.setdefault(key, {"kernel": event["name"], "launches": 0.0, "ms": 0.0} | _resources(args))
        row["launches"] += 1 / calls
        row["ms"] += event["dur"] / 1e3 / calls
    total = sum(row["ms"] for row in rows.values())
    found = sorted(rows.values(), key=lambda row: -row["ms"])
    return [
        row | {"launches": round(row["launches"], 3), "share": row["ms"] / total if total else 0.0} for row in found
    ]


def _resources(args: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "grid": args.get("grid"),
        "block": args.get("block"),
        "registers": args.get("registers per thread"),
        "shared_bytes": args.get("shared memory"),
        "occupancy_percent": args.get("est. achieved occupancy %"),
    }
