"""flash-linear-attention's KDA (0.6) under our conventions, for comparison: an optional extra, on a CUDA device.

theirs: q and k have one head for every value head; the gate's kind is told by ``lower_bound``; dt_bias is flat.
The state's layout [N, H, K, V], the gate's formulas, eps of the L2 norm and the recurrence are the same as ours.
"""

import importlib.util

import torch
from torch import Tensor

SAFE = -5.0
"""The lowest bound for which fla factors decays over 16 tokens (its ``safe_gate``); below it takes the slower way."""


def fla_kda(
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
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`models.kda.api.kda` by fla's chunk_kda: same arguments, already checked; returns o and the final states.

    Raises ValueError where fla is not installed, and for tensors that are not on a CUDA device.
    """
    _check_available(q)
    from fla.ops.kda import chunk_kda

    k, v = _one_head_each(q, k, v)
    bounded = gate == "bounded"
    starts: dict[str, Tensor] = {}
    if cu_seqlens is not None:
        starts["cu_seqlens"] = cu_seqlens.to(q.device, torch.int64)
        starts["cu_seqlens_cpu"] = cu_seqlens.to("cpu", torch.int64)
    o, state = chunk_kda(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        safe_gate=bounded and lower_bound >= SAFE,
        lower_bound=lower_bound if bounded else None,
        A_log=_clamped(A_log),
        dt_bias=dt_bias.reshape(-1),
        **starts,
    )
    return o, state


def fla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    gate: str,
    lower_bound: float,
    scale: float,
) -> Tensor:
    """One token (T = 1) by fla's fused_recurrent_kda; ``state`` [B, H, K, V] is updated in place.

    Returns o [B, H, V]. Raises ValueError as `fla_kda`.
    """
    _check_available(q)
    # Its public function writes the new state elsewhere, which would cost a copy; this one is behind it.
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

    k, v = _one_head_each(q, k, v)
    with torch.cuda.device(q.device):
        o, _ = fused_recurrent_kda_fwd(
            q=q.contiguous(),
            k=k.contiguous(),
            v=v.contiguous(),
            g=g.contiguous(),
            beta=beta.contiguous(),
            A_log=_clamped(A_log).contiguous(),
            dt_bias=dt_bias.reshape(-1).contiguous(),
            scale=scale,
            initial_state=state,
            inplace_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            lower_bound=lower_bound if gate == "bounded" else None,
        )
    return o[:, 0]


def _check_available(q: Tensor) -> None:
    if importlib.util.find_spec("fla") is None:
        raise ValueError("impl 'fla' needs flash-linear-attention, not installed here: pip install 'evalkit[fla]'")
    if not q.is_cuda:
        raise ValueError(f"impl 'fla' needs a CUDA device, and q is on {q.device}: use 'triton' or 'reference'")


def _one_head_each(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v repeated to q's heads: fla shares q and k among value heads, never k and v among q's."""
    groups = q.shape[2] // k.shape[2]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))


def _clamped(A_log: Tensor) -> Tensor:
    """As in models/kda/reference.py: past exp(30) every gate is saturated, and exp overflows."""
    return A_log.clamp(max=30.0)
