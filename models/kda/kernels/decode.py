"""One token a sequence: the recurrence itself, its state [K, V] read and written once, in place."""

import triton
import triton.language as tl
from torch import Tensor

from models.kda.kernels.parts import exp2, log2_decay, sigmoid
from models.kda.kernels.plan import check_kernels, config, device_of, fast
from models.kda.reference import L2_EPS


@triton.jit
def step_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, A_log_ptr, dt_bias_ptr, state_ptr, o_ptr,
    q_stride, k_stride, v_stride, g_stride, beta_stride, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    LOWER: tl.constexpr, EPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """S~ = diag(exp g) S;  u = b (v - S~^T k);  S = S~ + k u^T;  o = scale S^T q; all in float32.

    q, g: [B, H, K]; k, v: [B, H / GROUP, K or V]; beta: [B, H]; strides of a sequence. state: [B, H, K, V] float32;
    o: [B, H, V]. One program a (block of BV columns, head, sequence).
    """
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    h = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    keys = tl.arange(0, K)
    q = tl.load(q_ptr + n * q_stride + h * K + keys).to(tl.float32)
    k = tl.load(k_ptr + n * k_stride + (h // GROUP) * K + keys).to(tl.float32)
    v = tl.load(v_ptr + n * v_stride + (h // GROUP) * V + cols).to(tl.float32)
    at = state_ptr + (n * H + h) * K * V + keys[:, None] * V + cols[None, :]
    S = tl.load(at)
    rate = tl.exp(tl.minimum(tl.load(A_log_ptr + h), 30.0))
    x = tl.load(g_ptr + n * g_stride + h * K + keys).to(tl.float32) + tl.load(dt_bias_ptr + h * K + keys)
    b = sigmoid(1.4426950408889634 * tl.load(beta_ptr + n * beta_stride + h).to(tl.float32), FAST)
    q *= tl.rsqrt(tl.sum(q * q) + EPS) * scale
    k *= tl.rsqrt(tl.sum(k * k) + EPS)
    S *= exp2(log2_decay(x, rate, LOWER, FAST), FAST)[:, None]
    u = b * (v - tl.sum(S * k[:, None], 0))
    S += k[:, None] * u[None, :]
    tl.store(at, S)
    tl.store(o_ptr + (n * H + h) * V + cols, tl.sum(S * q[:, None], 0).to(o_ptr.dtype.element_ty))


def triton_step(
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
    """As `models.kda.api.kda_step`: ``state`` [B, H, K, V] is updated in place; returns o [B, H, V]."""
    check_kernels(q, v, gate, lower_bound)
    B, H, K = q.shape
    HK, V = v.shape[1:]
    q, k, v, g, beta = (x if x[:1].is_contiguous() else x.contiguous() for x in (q, k, v, g, beta))
    o = v.new_empty(B, H, V)
    options = config("step", BV=V)
    with device_of(q):
        step_kernel[(V // options["BV"], H, B)](
            q, k, v, g, beta, A_log.contiguous(), dt_bias.contiguous(), state, o,
            q.stride(0), k.stride(0), v.stride(0), g.stride(0), beta.stride(0), scale,
            H=H, GROUP=H // HK, K=K, V=V, EPS=L2_EPS, FAST=fast(q), **options,
            LOWER=lower_bound if gate == "bounded" else 0.0,
        )  # fmt: skip
    return o
