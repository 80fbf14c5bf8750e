"""One function a step: outputs made, configurations looked up, kernels launched."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from models.kda.kernels.backward import (
    columns_back_kernel,
    norms_back_kernel,
    products_back_kernel,
    rows_back_kernel,
    scan_back_kernel,
    states_back_kernel,
)
from models.kda.kernels.forward import combine_kernel, products_kernel, rows_kernel, scan_kernel, solve_kernel
from models.kda.kernels.layout import CHUNK, sum_matrices
from models.kda.kernels.plan import Plan, config
from models.kda.reference import L2_EPS


class Tokens(NamedTuple):
    """The inputs, one row a token: q, g [tokens, H, K], k [tokens, HK, K], v [tokens, HK, V], beta [tokens, H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor
    dt_bias: Tensor


class Prepared(NamedTuple):
    """What no state enters, [chunks, H, ...]; T and b only where they were asked to keep them."""

    qd: Tensor
    kd: Tensor
    kt: Tensor
    A: Tensor
    M: Tensor
    T: Tensor
    b: Tensor
    decay: Tensor
    norms: Tensor


class Scanned(NamedTuple):
    """What a scan writes; ``new`` is W where it ran in reverse."""

    out: Tensor
    last: Tensor
    new: Tensor
    states: Tensor


def prepare(plan: Plan, x: Tokens, *, keep: bool = False) -> Prepared:
    """``keep``: also T and b, which the backward reads."""
    count, H, K = len(plan.layout.chunks), plan.H, plan.K
    narrow = torch.float16 if plan.low else torch.float32
    qd, kd, kt = (x.q.new_empty(count, H, CHUNK, K) for _ in range(3))
    A, M = (x.q.new_empty(count, H, CHUNK, CHUNK) for _ in range(2))
    L = torch.empty_like(M, dtype=narrow)
    decay = x.A_log.new_empty(count, H, K)
    norms = decay.new_empty(count, H, 2, CHUNK)
    sums = sum_matrices(narrow, x.q.device)
    strides = x.q.stride(0), x.k.stride(0), x.g.stride(0)
    shared = {**plan.dims, **plan.gate, **plan.products}
    rows_kernel[(H, count)](
        x.q, x.k, x.g, x.A_log, x.dt_bias, plan.layout.chunks, sums, qd, kd, kt, norms, decay, *strides, plan.scale,
        **shared, **config("rows", BK=K), EPS=L2_EPS,
    )  # fmt: skip
    products_kernel[(H, count)](
        x.q, x.k, x.g, x.beta, x.A_log, x.dt_bias, plan.layout.chunks, sums, norms, A, L, *strides, x.beta.stride(0),
        **shared, **config("products", BK=K),
    )  # fmt: skip
    T = torch.empty_like(M) if keep else M
    b = decay.new_empty(count, H, CHUNK) if keep else decay
    solve_kernel[(H, count)](
        L, x.beta, plan.layout.chunks, M, T, b, x.beta.stride(0),
        H=H, C=CHUNK, FAST=plan.fast, KEEP=keep, **plan.products, **config("solve"),
    )  # fmt: skip
    return Prepared(qd, kd, kt, A, M, T, b, decay, norms)


def scan(
    plan: Plan,
    parts: Prepared,
    v: Tensor,
    first: Tensor | None,
    *,
    mapping: bool = False,
    output: bool = False,
    keep: bool = False,
) -> Scanned:
    """Every segment from ``first``, or the segments' maps; ``keep``: V' and each chunk's first state."""
    layout, H, K, V = plan.layout, plan.H, plan.K, plan.V
    count = len(layout.chunks)
    last = _last(plan, mapping)
    o = v.new_empty(len(v), H, V) if output else v
    new = v.new_empty(count, H, CHUNK, V) if keep else v
    states = v.new_empty(count, H, K, V) if keep else v
    options = config("map" if mapping else "scan", BV=last.shape[-1])
    units = len(layout.jobs) if mapping else len(layout.segments)
    scan_kernel[(last.shape[-1] // options["BV"], H, units)](
        parts.qd, parts.kd, parts.kt, parts.A, parts.M, parts.decay, v, o,
        last if first is None else first, last, new, states,
        layout.segments, layout.jobs, v.stride(0),
        **plan.dims, **plan.products, **options, V=V,
        MAP=mapping, SEGMENTED=layout.segmented, HAS_FIRST=first is not None, OUTPUT=output, KEEP=keep,
    )  # fmt: skip
    return Scanned(o, last, new, states)


def reverse(plan: Plan, parts: Prepared, do: Tensor, first: Tensor | None, *, mapping: bool = False) -> Scanned:
    """The scan from the end; ``first`` is the gradient behind every segment, or behind every sequence."""
    layout, H, K, V = plan.layout, plan.H, plan.K, plan.V
    count = len(layout.chunks)
    last = _last(plan, mapping)
    dv = do if mapping else torch.empty_like(do)
    w = do if mapping else do.new_empty(count, H, CHUNK, V)
    states = do if mapping else do.new_empty(count, H, K, V)
    options = config("map_back" if mapping else "scan_back", BV=last.shape[-1])
    units = len(layout.jobs_back) if mapping else len(layout.segments)
    scan_back_kernel[(last.shape[-1] // options["BV"], H, units)](
        parts.qd, parts.kd, parts.kt, parts.A, parts.T, parts.decay, parts.b, do,
        last if first is None else first, last, dv, w, states,
        layout.segments, layout.jobs_back,
        H=H, K=K, C=CHUNK, **plan.products, **options, V=V,
        MAP=mapping, SEGMENTED=layout.segmented, HAS_FIRST=first is not None,
    )  # fmt: skip
    return Scanned(dv, last, w, states)


def _last(plan: Plan, mapping: bool) -> Tensor:
    """Maps [segments, H, 2, K, max(K, V)], or the sequences' last states [sequences, H, K, V]; float32."""
    layout, H, K, V = plan.layout, plan.H, plan.K, plan.V
    shape = (len(layout.segments), H, 2, K, max(K, V)) if mapping else (layout.sequences, H, K, V)
    return torch.empty(shape, dtype=torch.float32, device=layout.chunks.device)


def combine(plan: Plan, maps: Tensor, first: Tensor | None, *, reverse: bool = False) -> Tensor:
    """Every segment's first state [segments, H, K, V], float32, from the sequences' and the maps."""
    states = maps.new_empty(len(plan.layout.segments), plan.H, plan.K, plan.V)
    options = config("combine", BV=plan.V)
    combine_kernel[(plan.V // options["BV"], plan.H, plan.layout.sequences)](
        maps, maps if first is None else first, states, plan.layout.spans,
        H=plan.H, K=plan.K, V=plan.V, HAS_FIRST=first is not None, REVERSE=reverse, **options,
        PRECISION="tf32" if plan.low else "ieee",
    )  # fmt: skip
    return states


def chunk_gradients(
    plan: Plan, x: Tokens, parts: Prepared, kept: Scanned, back: Scanned, do: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, g, beta, A_log and dt_bias, shaped like them, from both scans."""
    chunks, H, HK, K, V = plan.layout.chunks, plan.H, plan.HK, plan.K, plan.V
    count = len(chunks)
    squares = do.new_empty(count, H, 4, CHUNK, CHUNK)
    dbeta = do.new_empty(len(do), H)
    products_back_kernel[(H, count)](
        do, kept.new, back.new, parts.b, chunks, squares, dbeta,
        H=H, V=V, C=CHUNK, **plan.products, **config("products_back"),
    )  # fmt: skip
    dqd, dkd, dkt = (torch.empty_like(parts.qd) for _ in range(3))
    dlast, drate, dbias = (torch.empty_like(parts.decay) for _ in range(3))
    options = config("states_back", BK=K)
    states_back_kernel[(K // options["BK"], H, count)](
        do, kept.new, back.new, parts.b, kept.states, back.states, parts.decay, chunks, dqd, dkd, dkt, dlast,
        H=H, K=K, V=V, C=CHUNK, **plan.products, **options,
    )  # fmt: skip
    dq, dk, dg = (do.new_empty(len(do), H, K) for _ in range(3))
    inputs = x.q, x.k, x.g, x.A_log, x.dt_bias, chunks
    narrow = torch.float16 if plan.low else torch.float32
    sums = sum_matrices(narrow, do.device), sum_matrices(do.dtype, do.device, transposed=True)
    strides = x.q.stride(0), x.k.stride(0), x.g.stride(0)
    shared = {**plan.dims, **plan.gate, **plan.products}
    options = config("rows_back", BK=K)
    rows_back_kernel[(K // options["BK"], H, count)](
        *inputs, *sums, parts.norms, squares, dqd, dkd, dq, dk, dg, *strides, plan.scale, **shared, **options
    )  # fmt: skip
    options = config("columns_back", BK=K)
    columns_back_kernel[(K // options["BK"], H, count)](
        *inputs, *sums, parts.norms, squares, dkt, dlast, dk, dg, drate, dbias, *strides, **shared, **options
    )  # fmt: skip
    to_q, to_k = torch.empty_like(dq), do.new_empty(len(do), HK, K)
    options = config("norms_back")
    norms_back_kernel[(triton.cdiv(len(do), options["BT"]), HK)](
        x.q, x.k, dq, dk, to_q, to_k, len(do), x.q.stride(0), x.k.stride(0),
        H=H, GROUP=H // HK, K=K, EPS=L2_EPS, **options,
    )  # fmt: skip
    dv = back.out if H == HK else back.out.view(-1, HK, H // HK, V).sum(2)
    return to_q, to_k, dv, dg, dbeta, drate.sum((0, 2)), dbias.sum(0)
