"""The kernels joined: tensors in, tensors out. `models.kda.api` has checked the arguments."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kda.kernels.launch import Tokens, chunk_gradients, combine, prepare, reverse, scan
from models.kda.kernels.plan import Plan, device_of, make_plan


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
    plan = make_plan(q, k, v, gate=gate, lower_bound=lower_bound, scale=scale, cu_seqlens=cu_seqlens, segments=segments)
    tokens = [_rows(x.reshape(B * T, *x.shape[2:])) for x in (q, k, v, g, beta)]
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    o, state = _KDA.apply(*tokens, A_log.contiguous(), dt_bias.contiguous(), initial_state, plan)
    return o.view(B, T, *o.shape[1:]), state


def _rows(x: Tensor) -> Tensor:
    """A token's numbers lie side by side; tokens may be apart."""
    return x if x[:1].is_contiguous() else x.contiguous()


class _KDA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, initial, plan = args
        x = Tokens(*tensors)
        with device_of(x.q):
            parts = prepare(plan, x)
            first = initial
            if plan.layout.segmented:
                first = combine(plan, scan(plan, parts, x.v, initial, mapping=True).last, initial)
            done = scan(plan, parts, x.v, first, output=True)
        ctx.save_for_backward(*x, first)
        ctx.plan = plan
        ctx.has_initial = initial is not None
        return done.out, done.last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, first = ctx.saved_tensors
        x = Tokens(*tensors)
        plan: Plan = ctx.plan
        with device_of(x.q):
            do, behind = do.contiguous(), dlast.contiguous()
            # Made again, not kept: between forward and backward a layer holds little more than its inputs.
            parts = prepare(plan, x, keep=True)
            kept = scan(plan, parts, x.v, first, keep=True)
            if plan.layout.segmented:
                behind = combine(plan, reverse(plan, parts, do, behind, mapping=True).last, behind, reverse=True)
            back = reverse(plan, parts, do, behind)
            found = chunk_gradients(plan, x, parts, kept, back, do)
        return *found, back.last if ctx.has_initial else None, None
