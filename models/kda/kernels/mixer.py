# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""What surrounds the recurrence in a layer, in one launch each: the short convolution and the gated norm.

In plain PyTorch (models/kda/layer.py) each is some ten passes over memory, together more than the recurrence itself.
Sums are float32; gradients of weights are summed block by block and then over blocks, so three runs are bitwise equal.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kda.kernels.plan import check_place, device_of

CONV = {"BT": 32, "BC": 128, "num_warps": 4}
CONV_BACKWARD = {"BT": 64, "BC": 128, "num_warps": 8}
NORM_ELEMENTS = 2048
"""A tile of the norm: tokens times the padded head dimension. All three chosen on an H100."""


@triton.jit
def conv_kernel(
    x_ptr, w_ptr, before_ptr, position_ptr, y_ptr, T, C, blocks, before_b, before_t, before_c,
    TAPS: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y_t = sum over lag of w[:, TAPS - 1 - lag] x_(t - lag), summed in float32.

    x, y: [B, T, C]; w: [C, TAPS]; before: [B, TAPS - 1, C], any strides, what stands before x (BEFORE; else zeros);
    position: [B * T], a token's place in its document, whose first token reads nothing earlier (PACKED).
    One program a (block of BT tokens of a row, block of BC channels).
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (t < T)[:, None] & (c < C)[None, :]
    y = tl.zeros([BT, BC], dtype=tl.float32)
    if PACKED:
        place = tl.load(position_ptr + b * T + t, mask=t < T, other=0)
    for lag in tl.static_range(TAPS):
        at = t - lag
        there = at >= 0
        if PACKED:
            there = there & (place >= lag)
        x = tl.load(x_ptr + (b * T + at)[:, None] * C + c[None, :], mask=inside & there[:, None], other=0.0)
        x = x.to(tl.float32)
        if BEFORE:
            early = before_ptr + b * before_b + (at + TAPS - 1)[:, None] * before_t + c[None, :] * before_c
            x += tl.load(early, mask=inside & (at < 0)[:, None], other=0.0).to(tl.float32)
        w = tl.load(w_ptr + c * TAPS + (TAPS - 1 - lag), mask=c < C, other=0.0).to(tl.float32)
        y += w[None, :] * x
    tl.store(y_ptr + (b * T + t)[:, None] * C + c[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def conv_backward_kernel(
    x_ptr, w_ptr, position_ptr, dy_ptr, dx_ptr, dw_ptr, T, C, blocks,
    TAPS: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx_t = sum over lag of w[:, i] dy_(t + lag);  dw[:, i] = sum over t of dy_t x_(t - lag);  i = TAPS - 1 - lag.

    Shapes and grid as in `conv_kernel`, without anything before x; dw: [programs of the first axis, TAPS, C] float32.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (t < T)[:, None] & (c < C)[None, :]
    dx = tl.zeros([BT, BC], dtype=tl.float32)
    dy = tl.load(dy_ptr + (b * T + t)[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if PACKED:
        place = tl.load(position_ptr + b * T + t, mask=t < T, other=0)
    for lag in tl.static_range(TAPS):
        at = t - lag
        there = at >= 0
        after = t + lag
        reads = after < T
        if PACKED:
            there = there & (place >= lag)
            reads = reads & (tl.load(position_ptr + b * T + after, mask=after < T, other=0) >= lag)
        x = tl.load(x_ptr + (b * T + at)[:, None] * C + c[None, :], mask=inside & there[:, None], other=0.0)
        later = dy_ptr + (b * T + after)[:, None] * C + c[None, :]
        later = tl.load(later, mask=inside & reads[:, None], other=0.0).to(tl.float32)
        w = tl.load(w_ptr + c * TAPS + (TAPS - 1 - lag), mask=c < C, other=0.0).to(tl.float32)
        dx += w[None, :] * later
        dw = tl.sum(dy * x.to(tl.float32), 0)
        tl.store(dw_ptr + (tl.program_id(0).to(tl.int64) * TAPS + (TAPS - 1 - lag)) * C + c, dw, mask=c < C)
    tl.store(dx_ptr + (b * T + t)[:, None] * C + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_kernel(
    o_ptr, z_ptr, w_ptr, y_ptr, tokens, eps,
    H: tl.constexpr, V: tl.constexpr, GATED: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """y = o / rms(o) * w * sigmoid(z), the root mean square over a head's V channels, in float32.

    o, z, y: [tokens, H, V]; w: [H, V]. One program a (block of BR tokens, head).
    """
    t = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    h = tl.program_id(1)
    d = tl.arange(0, BV)
    inside = (t < tokens)[:, None] & (d < V)[None, :]
    at = (t * H + h)[:, None] * V + d[None, :]
    o = tl.load(o_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + h * V + d, mask=d < V, other=0.0).to(tl.float32)
    y = o * tl.rsqrt(tl.sum(o * o, 1) / V + eps)[:, None] * w[None, :]
    if GATED:
        y *= tl.sigmoid(tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    o_ptr, z_ptr, w_ptr, dy_ptr, do_ptr, dz_ptr, dw_ptr, tokens, eps,
    H: tl.constexpr, V: tl.constexpr, GATED: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """With n = o / rms(o), s = sigmoid(z), dn = dy w s:  do = (dn - n mean(dn n)) / rms(o);  dz = dy n w s (1 - s);
    dw = sum over tokens of dy n s.

    Shapes and grid as in `norm_kernel`; dw: [programs of the first axis, H, V] float32.
    """
    t = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    h = tl.program_id(1)
    d = tl.arange(0, BV)
    inside = (t < tokens)[:, None] & (d < V)[None, :]
    at = (t * H + h)[:, None] * V + d[None, :]
    o = tl.load(o_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + h * V + d, mask=d < V, other=0.0).to(tl.float32)[None, :]
    r = tl.rsqrt(tl.sum(o * o, 1) / V + eps)[:, None]
    n = o * r
    if GATED:
        s = tl.sigmoid(tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32))
        tl.store(dz_ptr + at, (dy * n * w * s * (1.0 - s)).to(dz_ptr.dtype.element_ty), mask=inside)
        dy *= s
    dn = dy * w
    do = r * (dn - n * (tl.sum(dn * n, 1) / V)[:, None])
    tl.store(do_ptr + at, do.to(do_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_ptr + (tl.program_id(0).to(tl.int64) * H + h) * V + d, tl.sum(dy * n, 0), mask=d < V)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, before: Tensor | None, position: Tensor | None) -> Tensor:
        B, T, C = x.shape
        taps = weight.shape[1]
        y = torch.empty_like(x)
        blocks = triton.cdiv(T, CONV["BT"])
        early = x if before is None else before
        with device_of(x):
            conv_kernel[(B * blocks, triton.cdiv(C, CONV["BC"]))](
                x, weight, early, x if position is None else position, y, T, C, blocks, *early.stride(),
                TAPS=taps, BEFORE=before is not None, PACKED=position is not None, **CONV,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, position)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, position = ctx.saved_tensors
        B, T, C = x.shape
        taps = weight.shape[1]
        blocks = triton.cdiv(T, CONV_BACKWARD["BT"])
        dx = torch.empty_like(x)
        parts = x.new_empty(B * blocks, taps, C, dtype=torch.float32)
        with device_of(x):
            conv_backward_kernel[(B * blocks, triton.cdiv(C, CONV_BACKWARD["BC"]))](
                x, weight, x if position is None else position, dy.contiguous(), dx, parts, T, C, blocks,
                TAPS=taps, PACKED=position is not None, **CONV_BACKWARD,
            )  # fmt: skip
        return dx, parts.sum(0).T.to(weight.dtype), None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, z: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(o)
        grid, shape = _norm_launch(o)
        with device_of(o):
            norm_kernel[grid](
                o, o if z is None else z, weight, y, o.numel() // weight.numel(), eps, GATED=z is not None, **shape
            )
        ctx.save_for_backward(o, z, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        o, z, weight = ctx.saved_tensors
        do, dz = torch.empty_like(o), None if z is None else torch.empty_like(z)
        grid, shape = _norm_launch(o)
        parts = o.new_empty(grid[0], *weight.shape, dtype=torch.float32)
        with device_of(o):
            norm_backward_kernel[grid](
                o, o if z is None else z, weight, dy.contiguous(), do, do if dz is None else dz, parts,
                o.numel() // weight.numel(), ctx.eps, GATED=z is not None, **shape,
            )  # fmt: skip
        return do, dz, parts.sum(0).to(weight.dtype), None


def _norm_launch(o: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    H, V = o.shape[-2:]
    BV = triton.next_power_of_2(V)
    BR = max(1, NORM_ELEMENTS // BV)
    return (triton.cdiv(o.numel() // (H * V), BR), H), {"H": H, "V": V, "BR": BR, "BV": BV, "num_warps": 4}


def triton_conv(x: Tensor, weight: Tensor, before: Tensor | None = None, position: Tensor | None = None) -> Tensor:
    """As `models.kda.layer.short_conv`; no gradient flows into ``before``."""
    check_place("x", x)
    if x.numel() == 0:
        return torch.empty_like(x)
    return _Conv.apply(x.contiguous(), weight.contiguous(), before, position)


def triton_norm(o: Tensor, z: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """As `models.kda.layer.gated_norm`."""
    check_place("o", o)
    if o.numel() == 0:
        return torch.empty_like(o)
    z = None if z is None else z.contiguous()
    return _Norm.apply(o.contiguous(), z, weight.contiguous(), eps)
