"""What a launch needs to know: dimensions, dtypes, the table of fixed configurations, and the number of segments."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

from models.kda.kernels.layout import CHUNK, Layout, cut, dense

DIMS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16)
GRID = 65_535
"""CUDA's limit of a grid's second and third dimension, along which chunks and segments lie."""

CONFIGS: dict[str, dict[str, int]] = {
    "rows": {"BK": 64, "num_warps": 4, "num_stages": 1},
    "products": {"BK": 64, "num_warps": 4, "num_stages": 2},
    "solve": {"num_warps": 1, "num_stages": 1},
    "map": {"BV": 64, "num_warps": 4, "STAGES": 2},
    "combine": {"BV": 32, "num_warps": 4},
    "scan": {"BV": 128, "num_warps": 8, "STAGES": 2},
    "map_back": {"BV": 64, "num_warps": 4, "STAGES": 2},
    "scan_back": {"BV": 64, "num_warps": 4, "STAGES": 1},
    "products_back": {"num_warps": 4, "num_stages": 1},
    "states_back": {"BK": 64, "num_warps": 4, "num_stages": 1},
    "rows_back": {"BK": 32, "num_warps": 4, "num_stages": 1},
    "columns_back": {"BK": 32, "num_warps": 4, "num_stages": 1},
    "norms_back": {"BT": 16, "num_warps": 4},
    "step": {"BV": 32, "num_warps": 4},
}
"""Fixed, so that a first call costs seconds. Chosen on an H100; the figures are in models/README.md."""


def config(kernel: str, **limits: int) -> dict[str, int]:
    """The kernel's configuration, no block wider than the dimension that it cuts."""
    return {name: min(value, limits.get(name, value)) for name, value in CONFIGS[kernel].items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One call's dimensions; ``layout`` is on the inputs' device."""

    H: int
    HK: int
    K: int
    V: int
    lower: float
    """The bounded gate's lower bound; 0 stands for the softplus gate."""
    scale: float
    low: bool
    """bfloat16 inputs; else float32."""
    fast: bool
    """Use NVIDIA's own instructions for 2^x and 1/x."""
    layout: Layout

    @property
    def dims(self) -> dict[str, Any]:
        return {"H": self.H, "GROUP": self.H // self.HK, "K": self.K, "C": CHUNK}

    @property
    def gate(self) -> dict[str, Any]:
        return {"LOWER": self.lower, "SUM": tl.float16 if self.low else tl.float32, "FAST": self.fast}

    @property
    def products(self) -> dict[str, Any]:
        """What matrix products take: bfloat16 as it comes, or float32 without the shortcut of tf32."""
        return {
            "OP": tl.bfloat16 if self.low else tl.float32,
            "PRECISION": "tf32" if self.low else "ieee",
        }


def make_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: str,
    lower_bound: float,
    scale: float,
    cu_seqlens: list[int] | None,
    segments: int | None,
) -> Plan:
    """q [B, T, H, K], k [B, T, HK, K], v [B, T, HK, V]; ValueError for what the kernels can't do."""
    check_kernels(q, v, gate, lower_bound)
    B, T, H, K = q.shape
    starts = tuple(cu_seqlens) if cu_seqlens is not None else dense(B, T)
    layout = cut(starts, segments or pick_segments(starts, H, q.device), q.device)
    most = max(len(layout.chunks), len(layout.segments))
    if most > GRID:
        raise ValueError(
            f"q has {B * T:,} tokens in {layout.sequences:,} sequences, {most:,} chunks of {CHUNK}: "
            f"impl='triton' takes {GRID:,} a call; split the batch"
        )
    return Plan(
        H=H,
        HK=k.shape[2],
        K=K,
        V=v.shape[3],
        lower=lower_bound if gate == "bounded" else 0.0,
        scale=scale,
        low=q.dtype == torch.bfloat16,
        fast=fast(q),
        layout=layout,
    )


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def fast(x: Tensor) -> bool:
    return x.is_cuda and torch.version.cuda is not None


def check_kernels(q: Tensor, v: Tensor, gate: str, lower_bound: float) -> None:
    """ValueError for dtypes, dimensions, gates and places that the kernels can't do."""
    if q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype}: impl='triton' takes float32 or bfloat16; use impl='reference'")
    for name, dim in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if dim not in DIMS:
            raise ValueError(
                f"{name}'s last dimension is {dim}: impl='triton' takes {', '.join(map(str, DIMS))}; "
                f"use impl='reference'"
            )
    if gate == "bounded" and lower_bound < -5.0:
        raise ValueError(
            f"lower_bound is {lower_bound}: impl='triton' takes -5 to 0, since over 16 tokens "
            f"exp({-16 * lower_bound:g}) leaves float32's range; use impl='reference'"
        )
    check_place("q", q)


def check_place(name: str, x: Tensor) -> None:
    """ValueError where no kernel runs, or none that can be believed."""
    if not x.is_cuda and not interpreted():
        raise ValueError(
            f"{name} is on {x.device}: impl='triton' needs a GPU, or TRITON_INTERPRET=1 in the environment before the "
            f"start; use impl='reference'"
        )
    if x.dtype == torch.bfloat16 and interpreted():
        raise ValueError(
            f"{name} is torch.bfloat16, in which Triton's interpreter is silently wrong: use float32, or "
            f"impl='reference'"
        )


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: Triton asks when it is imported, and again with every kernel."""
    return bool(knobs.runtime.interpret) and not isinstance(tl.sum, JITFunction)


@lru_cache(maxsize=256)
def pick_segments(starts: tuple[int, ...], heads: int, device: torch.device) -> int:
    """As many segments as fill the device's multiprocessors, none shorter than 8 chunks."""
    if device.type != "cuda":
        return 1
    units: int = torch.cuda.get_device_properties(device).multi_processor_count
    longest = max(b - a for a, b in zip(starts, starts[1:], strict=False))
    return max(1, min(units // (heads * (len(starts) - 1)), longest // (8 * CHUNK)))
