"""What several kernels compute: the gate, write strengths, constant matrices, levels, norms."""

import triton
import triton.language as tl


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """2^x. FAST: one instruction on an NVIDIA GPU, subnormal results are 0; else five, or the interpreter's."""
    if FAST:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.exp2(x)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + exp(-x)) for x in units of ln 2."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + exp2(-x, FAST)], tl.float32, True, 1
        )
    return 1.0 / (1.0 + exp2(-x, FAST))


@triton.jit
def write_strength(beta_ptr, valid, FAST: tl.constexpr):
    """b = sigmoid(beta) of a chunk's rows, 0 where there is no token."""
    beta = tl.load(beta_ptr, mask=valid, other=0.0).to(tl.float32)
    return tl.where(valid, sigmoid(1.4426950408889634 * beta, FAST), 0.0)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), natural; exact to float32 on both sides."""
    t = tl.exp(-tl.abs(x))
    # log(1 + t) for a small t: what rounding took from 1 + t, it gives back (Kahan).
    u = 1.0 + t
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, t, tl.log(u) * (t / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def log2_decay(x, rate, LOWER: tl.constexpr, FAST: tl.constexpr):
    """log2 of the decay, float32; x = gate input + dt_bias, LOWER 0 stands for the softplus gate."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if LOWER != 0:
        return (LOWER * LOG2E) * sigmoid(rate * LOG2E * x, FAST)
    return -rate * LOG2E * softplus(x)


@triton.jit
def gate_slice(g_ptr, offsets, mask, bias, rate, LOWER: tl.constexpr, SUM: tl.constexpr, FAST: tl.constexpr):
    """A tile of log2 decays, 0 outside ``mask``, in the dtype SUM in which they are summed."""
    x = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    g = tl.where(mask, log2_decay(x, rate, LOWER, FAST), 0.0)
    if LOWER == 0:
        # 2^-3000 is 0 in float32; float16 would turn a still stronger decay into -inf, and 0 * inf into NaN.
        g = tl.maximum(g, -3000.0)
    return g.to(SUM)


@triton.jit
def sum_matrix(sums_ptr, N: tl.constexpr, C: tl.constexpr):
    """The N-th 0/1 matrix [C, C] of `layout.sum_matrices`; times log2 decays [C, BK] it gives exponents."""
    at = tl.arange(0, C)
    return tl.load(sums_ptr + N * C * C + at[:, None] * C + at[None, :])


@triton.jit
def level_mask(i, j, H: tl.constexpr):
    """Whether i lies in the later and j in the earlier of two neighbouring half-blocks of H tokens."""
    return (i // H == j // H + 1) & ((i // H) % 2 == 1)


@triton.jit
def inverse_norm(x_ptr, stride, tokens, valid, K: tl.constexpr, EPS: tl.constexpr):
    """1 / L2 norm of the rows ``tokens`` of x, float32."""
    cols = tl.arange(0, K)
    x = tl.load(x_ptr + tokens[:, None] * stride + cols[None, :], mask=valid[:, None] & (cols < K)[None, :], other=0.0)
    x = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 1) + EPS)
