# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Forward KL, cross-entropy and their sum, with the gradient of the student's logits, in one Triton launch.

In plain PyTorch (distill/chunked.py) these are some ten passes over [tokens, V] float32; here each row is read twice,
and its gradient is written once, in the dtype that the next matrix products take.
"""

import importlib.util

if importlib.util.find_spec("triton") is None:
    raise ValueError(
        "impl='triton' needs triton, which is not installed: pip install 'evalkit[kda]', or use impl='torch'"
    )

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kda.kernels.plan import device_of, interpreted

BLOCK = 4096
"""Logits of a row at once: 16 a thread and tensor, which stay in registers."""
NUM_WARPS = 8
DTYPES = (torch.float32, torch.bfloat16)


@triton.jit
def kl_ce_kernel(
    t_ptr, s_ptr, target_ptr, weight_ptr, loss_ptr, d_ptr, V, temperature, alpha,
    KL: tl.constexpr, CE: tl.constexpr, WARM: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = T^2 sum p (log p - log q) [KL] - alpha log q1[target] [CE];  d = weight (T (q - p) + alpha (q1 - onehot)).

    p = softmax(t / T), q = softmax(s / T), q1 = softmax(s), natural logarithms; T = temperature, and T != 1 is WARM.
    t, s: [n, V] float32, teacher's and student's logits; target: [n] int64; weight: [n] float32.
    loss: [n] float32, without weight; d: [n, V] float32 or bfloat16 (GRADIENT), which may be s itself.
    One program a row: maxima and sums first, then loss and gradient. V need not divide by BLOCK. A target outside
    0 .. V - 1 makes the loss NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    t_ptr += row * V
    s_ptr += row * V
    d_ptr += row * V
    inverse = 1.0 / temperature
    lowest = -1e30  # not -inf: a block of -inf alone would give -inf - -inf
    t_max = lowest
    s_max = lowest
    t_sum = 0.0
    s_sum = 0.0
    s1_sum = 0.0
    if CE:
        # Before anything is written, since d may be s; the reductions below hold all warps until it is read.
        target = tl.load(target_ptr + row)
        right = tl.load(s_ptr + target, mask=(target >= 0) & (target < V), other=float("nan"))
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        s = tl.load(s_ptr + v, mask=v < V, other=-float("inf"))
        new = tl.maximum(s_max, tl.max(s, 0))
        if CE:
            s1_sum = s1_sum * tl.exp(s_max - new) + tl.sum(tl.exp(s - new), 0)
        if KL and (WARM or not CE):
            s_sum = s_sum * tl.exp((s_max - new) * inverse) + tl.sum(tl.exp((s - new) * inverse), 0)
        s_max = new
        if KL:
            t = tl.load(t_ptr + v, mask=v < V, other=-float("inf"))
            new = tl.maximum(t_max, tl.max(t, 0))
            t_sum = t_sum * tl.exp((t_max - new) * inverse) + tl.sum(tl.exp((t - new) * inverse), 0)
            t_max = new
    if KL and CE and not WARM:
        s_sum = s1_sum
    if KL:
        t_log = tl.log(t_sum)
        s_log = tl.log(s_sum)
    if CE:
        s1_log = tl.log(s1_sum)
    loss = 0.0
    if KL or GRADIENT:
        weight = tl.load(weight_ptr + row)
        kl = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            s = tl.load(s_ptr + v, mask=v < V, other=s_max) - s_max
            d = tl.zeros([BLOCK], dtype=tl.float32)
            if KL:
                t = tl.load(t_ptr + v, mask=v < V, other=t_max) - t_max
                log_p = t * inverse - t_log
                log_q = s * inverse - s_log
                p = tl.exp(log_p)
                kl += tl.where(v < V, p * (log_p - log_q), 0.0)
                d += temperature * (tl.exp(log_q) - p)
            if CE:
                d += alpha * (tl.exp(s - s1_log) - tl.where(v == target, 1.0, 0.0))
            if GRADIENT:
                tl.store(d_ptr + v, (d * weight).to(d_ptr.dtype.element_ty), mask=v < V)
        loss += temperature * temperature * tl.sum(kl, 0)
    if CE:
        loss += alpha * (s1_log - (right - s_max))
    tl.store(loss_ptr + row, loss)


def triton_kl_ce(
    teacher: Tensor | None,
    student: Tensor,
    targets: Tensor | None,
    weights: Tensor,
    *,
    temperature: float,
    alpha: float,
    gradient: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Losses [n] without weights, and weights * d loss / d student logits [n, V] in the dtype ``gradient``, or None.

    teacher, student: [n, V] float32, contiguous; the student's are overwritten by a float32 gradient. Without a
    teacher, alpha times the cross-entropy; without targets, or at alpha 0, the forward KL alone.
    """
    check_kernel("student", student)
    n, V = student.shape
    ce = targets is not None and (alpha > 0 or teacher is None)
    loss = student.new_empty(n)
    d = None
    if gradient is not None:
        d = student if gradient == student.dtype else torch.empty_like(student, dtype=gradient)
    if n:
        with device_of(student):
            kl_ce_kernel[(n,)](
                student if teacher is None else teacher, student, targets if ce else student, weights, loss,
                student if d is None else d, V, float(temperature), float(alpha),
                KL=teacher is not None, CE=ce, WARM=temperature != 1, GRADIENT=d is not None, BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return loss, d


def check_kernel(name: str, x: Tensor) -> None:
    """ValueError where the kernel doesn't run, or can't be believed."""
    if not x.is_cuda and not interpreted():
        raise ValueError(
            f"{name} is on {x.device}: impl='triton' needs a GPU, or TRITON_INTERPRET=1 in the environment before the "
            f"start; use impl='torch'"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}: impl='triton' takes float32 or bfloat16; use impl='torch'")
    if x.dtype == torch.bfloat16 and interpreted():
        raise ValueError(
            f"{name} is torch.bfloat16, in which Triton's interpreter is silently wrong: use float32, or impl='torch'"
        )
