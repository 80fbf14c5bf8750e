"""The kernels joined: tensors in, tensors out. `models.kda.api` has checked the arguments."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kda.kernels.forward import combine_kernel, prepare_kernel, scan_kernel
from models.kda.kernels.layout import CHUNK, sum_matrices
from models.kda.kernels.plan import CONFIGS, Plan, make_plan
from models.kda.reference import L2_EPS


def triton_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    gate: str,
    lower_bound: float,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: list[int] | None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `models.kda.api.kda`; returns o [B, T, H, V] and the final states [N, H, K, V].

    ``segments``: how many parts of a sequence are scanned at the same time; None: what fills the device.
    """
    B, T = q.shape[:2]
    plan = make_plan(
        q, k, v, gate=gate, lower_bound=lower_bound, scale=scale, cu_seqlens=cu_seqlens, segments=segments
    )
    tokens = [_rows(x.reshape(B * T, *x.shape[2:])) for x in (q, k, v, g, beta)]
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    o, state = _KDA.apply(*tokens, A_log.contiguous(), dt_bias.contiguous(), initial_state, plan)
    return o.view(B, T, *o.shape[1:]), state


def _rows(x: Tensor) -> Tensor:
    """A token's numbers lie side by side; tokens may be apart."""
    return x if x[:1].is_contiguous() else x.contiguous()


class Prepared(NamedTuple):
    """What prepare_kernel writes, [chunks, H, ...]."""

    qd: Tensor
    kd: Tensor
    kt: Tensor
    A: Tensor
    T: Tensor
    L: Tensor | None
    decay: Tensor


def prepare(
    plan: Plan, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor, keep_L: bool = False
) -> Prepared:
    count = len(plan.layout.chunks)
    wide = [q.new_empty(count, plan.H, CHUNK, plan.K) for _ in range(3)]
    square = [q.new_empty(count, plan.H, CHUNK, CHUNK) for _ in range(3 if keep_L else 2)]
    decay = q.new_empty(count, plan.H, plan.K, dtype=torch.float32)
    sums = sum_matrices(torch.float16 if plan.low else torch.float32, q.device)
    config = dict(CONFIGS["prepare"])
    config["BK"] = min(config["BK"], plan.K)
    prepare_kernel[(plan.H, count)](
        q, k, g, beta, A_log, dt_bias, plan.layout.chunks, sums,
        *wide, *square[:2], square[-1], decay,
        q.stride(0), k.stride(0), g.stride(0), beta.stride(0), plan.scale,
        **plan.dims, **plan.gate, **plan.products, **config,
        EPS=L2_EPS, INV=tl.float16 if plan.low else tl.float32, KEEP_L=keep_L,
    )  # fmt: skip
    return Prepared(*wide, *square[:2], square[2] if keep_L else None, decay)


class Scanned(NamedTuple):
    """What scan_kernel writes; None where it was not asked."""

    o: Tensor | None
    last: Tensor
    new: Tensor | None
    states: Tensor | None


def scan(
    plan: Plan,
    parts: Prepared,
    v: Tensor,
    beta: Tensor,
    first: Tensor | None,
    *,
    kind: str = "scan",
    segmented: bool = False,
    output: bool = False,
    keep: bool = False,
) -> Scanned:
    """``kind`` "map": the segments' maps; "scan": every segment from ``first`` (by segment if ``segmented``)."""
    layout, H, K, V = plan.layout, plan.H, plan.K, plan.V
    count = len(layout.chunks)
    mapping = kind == "map"
    width = max(K, V) if mapping else V
    config = dict(CONFIGS[kind])
    config["BV"] = min(config["BV"], width)
    o = v.new_empty(len(v), H, V) if output else None
    new = v.new_empty(count, H, CHUNK, V) if keep else None
    states = v.new_empty(count, H, K, V) if keep else None
    shape = (len(layout.segments), H, 2, K, width) if mapping else (layout.sequences, H, K, V)
    last = v.new_empty(shape, dtype=torch.float32)
    units = len(layout.jobs) if mapping else len(layout.segments)
    scan_kernel[(triton.cdiv(width, config["BV"]), H, units)](
        parts.qd, parts.kd, parts.kt, parts.A, parts.T, parts.decay, v, beta,
        _or(o, v), _or(first, last), last, _or(new, v), _or(states, v),
        layout.chunks, layout.segments, layout.jobs,
        v.stride(0), beta.stride(0),
        **plan.dims, **plan.products, **config, V=V,
        MAP=mapping, SEGMENTED=segmented, HAS_FIRST=first is not None, OUTPUT=output, KEEP=keep,
    )  # fmt: skip
    return Scanned(o, last, new, states)


def first_states(plan: Plan, parts: Prepared, v: Tensor, beta: Tensor, initial: Tensor | None) -> Tensor:
    """Every segment's first state [segments, H, K, V], float32."""
    maps = scan(plan, parts, v, beta, initial, kind="map").last
    states = maps.new_empty(len(plan.layout.segments), plan.H, plan.K, plan.V)
    config = dict(CONFIGS["combine"])
    config["BV"] = min(config["BV"], plan.V)
    combine_kernel[(triton.cdiv(plan.V, config["BV"]), plan.H, plan.layout.sequences)](
        maps, _or(initial, maps), states, plan.layout.spans,
        H=plan.H, K=plan.K, V=plan.V, HAS_FIRST=initial is not None, **config,
        PRECISION="tf32x3" if plan.low else "ieee",
    )  # fmt: skip
    return states


def _or(x: Tensor | None, instead: Tensor) -> Tensor:
    """A pointer for an argument that the kernel was told not to touch."""
    return instead if x is None else x


class _KDA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        initial: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        parts = prepare(plan, q, k, g, beta, A_log, dt_bias)
        segmented = plan.layout.segmented
        first = first_states(plan, parts, v, beta, initial) if segmented else initial
        done = scan(plan, parts, v, beta, first, segmented=segmented, output=True)
        assert done.o is not None
        return done.o, done.last
