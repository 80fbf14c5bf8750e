"""The losses of distill/losses.py from hidden states, a chunk of tokens at a time: [tokens, V] logits are never whole.

With a vocabulary of 151,936 the logits of both models and their gradients, of 8,192 tokens, are 20 GB in float32. Here
a chunk's logits become its loss and its gradients of hidden states and head, and are gone; the backward only scales
those gradients. So forward and backward both happen in the forward, at the price of 2 d numbers a token.

implementations: "torch", any device and any loss; "triton" (distill/kernels.py), forward-kl, kl-ce and ce on a GPU, or
on a CPU under TRITON_INTERPRET=1. The default is "triton" for those three on CUDA unless in float64, else "torch".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.losses import WITH_TARGETS, WITH_TEACHER, bins, check_loss, check_options
from models.kda.reference import compute_dtype

Impl = Literal["triton", "torch"]
IMPLS = ("triton", "torch")
FUSED = ("forward-kl", "kl-ce", "ce")
"""The losses that distill/kernels.py computes."""
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
CHUNK_BYTES = 256 * 2**20
"""Of one model's logits: large enough for full matrix products, small beside a model's activations."""


def chunked_loss(
    name: str,
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    targets: Tensor | None,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 0.0,
    beta: float = 0.5,
    k: int = 64,
    chunk: int | None = None,
    rows: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """sum over n of weights[n] * loss[n], a scalar in nats; ``loss`` is distill.losses.token_loss of hidden @ head^T.

    Not divided by anything: the caller divides by the number of targets over all micro-batches and processes.

    student_hidden: [N, d_s] and student_head: [V, d_s], of one dtype; what requires a gradient gets one, in its dtype.
    teacher_hidden: [N, d_t] and teacher_head: [V, d_t], of one dtype; constants. None for "ce".
    targets: [N] int64, read where the weight isn't 0, by "kl-ce" and "ce". weights: [N], constants.
    chunk: tokens at a time; by default what `default_chunk` gives.
    rows: the n to look at, ascending int64 on the CPU; all others are taken for weight 0. By default those whose
    weight isn't 0, for which a GPU must first finish its work: pass rows to let it run on.

    Logits, losses and their sums are float32 (float64 for a float64 student). bfloat16 products are summed in float32,
    and on a GPU the gradient of the logits is rounded to bfloat16 before it is multiplied. Autocast has no effect.
    Raises ValueError naming the argument, what was found, and what is expected.
    """
    check_loss(name, teacher_hidden is not None and teacher_head is not None, targets is not None)
    check_options(temperature=temperature, alpha=alpha, beta=beta, k=k)
    given = {"student_hidden": student_hidden, "student_head": student_head, "weights": weights}
    if name in WITH_TEACHER:
        assert teacher_hidden is not None and teacher_head is not None
        given |= {"teacher_hidden": teacher_hidden.detach(), "teacher_head": teacher_head.detach()}
    if name in WITH_TARGETS:
        assert targets is not None
        given["targets"] = targets
    _check_tensors(given, rows)
    if name == "top-k-kl":
        check_options(k=k, vocabulary=student_head.shape[0])
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}: expected a number of tokens, 1 or more, or None")
    weights = weights.detach()
    job = _Job(
        name=name,
        teacher=given.get("teacher_hidden"),
        teacher_head=given.get("teacher_head"),
        targets=given.get("targets"),
        weights=weights,
        rows=_on_device(weights.nonzero()[:, 0] if rows is None else rows, weights.device),
        options=_Options(temperature=temperature, alpha=alpha, beta=beta, k=k),
        chunk=chunk or default_chunk(student_head.shape[0], compute_dtype(student_hidden).itemsize),
        impl=_choose(name, student_hidden, impl),
    )
    job.check_targets(student_head.shape[0])
    if torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad):
        total: Tensor = _ChunkedLoss.apply(student_hidden, student_head, job)
        return total
    with torch.no_grad():
        return _run(job, student_hidden, student_head, False, False)[0]


def default_chunk(vocabulary: int, itemsize: int = 4) -> int:
    """Tokens whose logits take at most `CHUNK_BYTES`, in multiples of 128, and 128 at least."""
    return max(128, CHUNK_BYTES // (itemsize * vocabulary) // 128 * 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    temperature: float
    alpha: float
    beta: float
    k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """All that gets no gradient."""

    name: str
    teacher: Tensor | None
    teacher_head: Tensor | None
    targets: Tensor | None
    weights: Tensor
    rows: Tensor
    options: _Options
    chunk: int
    impl: Impl

    def check_targets(self, vocabulary: int) -> None:
        """On the CPU alone: on a GPU it would wait, and there an id out of range gives NaN or a CUDA assertion."""
        if self.targets is None or self.targets.is_cuda or not len(self.rows):
            return
        low, high = (int(x) for x in self.targets[self.rows].aminmax())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(f"targets has the id {wrong} at a weight that isn't 0: expected 0 to {vocabulary - 1}")


class _ChunkedLoss(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, job: _Job) -> Tensor:
        total, d_hidden, d_head = _run(job, hidden, head, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_hidden, d_head = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_total,
            None if d_head is None else (d_head * d_total).to(ctx.head_dtype),
            None,
        )


def _run(
    job: _Job, hidden: Tensor, head: Tensor, to_hidden: bool, to_head: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss; its gradient of ``hidden`` in its dtype; that of ``head`` in the dtype of logits."""
    wide = compute_dtype(hidden)
    losses = torch.empty(len(job.rows), dtype=wide, device=hidden.device)
    d_hidden = torch.zeros_like(hidden) if to_hidden else None
    d_head = torch.zeros_like(head, dtype=wide) if to_head else None
    # Autocast would round the logits to bfloat16.
    with torch.autocast(hidden.device.type, enabled=False):
        head = _factor(head, wide)
        teacher_head = None if job.teacher_head is None else _factor(job.teacher_head, wide)
        low = head.dtype if to_hidden or to_head else None
        for at in range(0, len(job.rows), job.chunk):
            rows = job.rows[at : at + job.chunk]
            h = hidden[rows].to(head.dtype)
            teacher_logits = None
            if job.teacher is not None and teacher_head is not None:
                teacher_logits = _product(job.teacher[rows].to(teacher_head.dtype), teacher_head.T, wide)
            logits = _product(h, head.T, wide)
            targets = None if job.targets is None else job.targets[rows]
            weights = job.weights[rows].to(wide)
            loss, d_logits = _loss_and_gradient(job, teacher_logits, logits, targets, weights, low)
            losses[at : at + job.chunk] = loss * weights
            del teacher_logits, logits  # so that their memory is free for the products and the next chunk
            if d_hidden is not None and d_logits is not None:
                d_hidden.index_copy_(0, rows, _product(d_logits, head, wide).to(hidden.dtype))
            if d_head is not None and d_logits is not None:
                d_head.add_(_product(d_logits.T, h, wide))
            del d_logits
    return losses.sum(), d_hidden, d_head


def _factor(head: Tensor, wide: torch.dtype) -> Tensor:
    """``head`` as matrix products take it: bfloat16 where they can be summed in float32, otherwise converted once."""
    sums_wide = head.is_cuda and wide == torch.float32 and "dtype" in torch.ops.aten.mm.overloads()
    return head if head.dtype == torch.bfloat16 and sums_wide else head.to(wide)


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b in ``wide``; both factors are of `_factor`'s dtype."""
    return a @ b if a.dtype == wide else torch.mm(a, b, out_dtype=wide)


def _loss_and_gradient(
    job: _Job,
    teacher: Tensor | None,
    student: Tensor,
    targets: Tensor | None,
    weights: Tensor,
    low: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """A chunk's losses [n], and weights * d loss / d student logits [n, V] in ``low`` unless that is None.

    The logits are the callee's to overwrite.
    """
    if job.impl == "triton":
        from distill.kernels import triton_kl_ce

        return triton_kl_ce(
            teacher, student, targets, weights, temperature=job.options.temperature,
            alpha=1.0 if job.name == "ce" else job.options.alpha, gradient=low,
        )  # fmt: skip
    loss, gradients = LOSS_AND_GRADIENT[job.name](_Logits(teacher, student, targets), job.options)
    if low is None:
        return loss, None
    return loss, gradients().mul_(weights[:, None]).to(low)


class _Logits(NamedTuple):
    """A chunk's logits [n, V] and targets [n], where the loss takes them."""

    teacher: Tensor | None
    student: Tensor
    targets: Tensor | None

    def log_probs(self, temperature: float) -> tuple[Tensor, Tensor]:
        """log p and log q, both free to be overwritten."""
        assert self.teacher is not None
        return _log_softmax(self.teacher, temperature), _log_softmax(self.student, temperature)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


LossAndGradient = tuple[Tensor, Callable[[], Tensor]]
"""Losses [n], and what makes their gradient of the student's logits [n, V]: not called in an evaluation."""


def _forward_kl(x: _Logits, o: _Options) -> LossAndGradient:
    """d loss / d logits = T (q - p)."""
    log_p, log_q = x.log_probs(o.temperature)
    p = log_p.exp()
    loss = o.temperature**2 * log_p.sub_(log_q).mul_(p).sum(-1)
    return loss, lambda: log_q.exp_().sub_(p).mul_(o.temperature)


def _reverse_kl(x: _Logits, o: _Options) -> LossAndGradient:
    """d loss / d logits = T q (log q - log p - KL)."""
    log_p, log_q = x.log_probs(o.temperature)
    gap = log_p.neg_().add_(log_q)
    q = log_q.exp_()
    kl = (q * gap).sum(-1, keepdim=True)
    return o.temperature**2 * kl[:, 0], lambda: gap.sub_(kl).mul_(q).mul_(o.temperature)


def _jensen_shannon(x: _Logits, o: _Options) -> LossAndGradient:
    """d loss / d logits = T (1 - beta) q (log q - log m - KL(q || m)): all other terms of the chain rule cancel."""
    log_p, log_q = x.log_probs(o.temperature)
    log_m = torch.logaddexp(log_p + math.log(o.beta), log_q + math.log1p(-o.beta))
    p_kl = log_p.exp().mul_(log_p.sub_(log_m)).sum(-1)
    q = log_q.exp()
    gap = log_q.sub_(log_m)
    q_kl = (q * gap).sum(-1, keepdim=True)
    loss = o.temperature**2 * (o.beta * p_kl + (1 - o.beta) * q_kl[:, 0])
    return loss, lambda: gap.sub_(q_kl).mul_(q).mul_(o.temperature * (1 - o.beta))


def _top_k_kl(x: _Logits, o: _Options) -> LossAndGradient:
    """d loss / d logits = T (q - r); r is P of a token told apart, else P's rest times the token's share in q's."""
    log_p, log_q = x.log_probs(o.temperature)
    top = log_p.topk(o.k, -1).indices
    log_P, log_Q = bins(log_p, top), bins(log_q, top)
    P = log_P.exp()
    loss = o.temperature**2 * (P * (log_P - log_Q)).sum(-1)

    def gradient() -> Tensor:
        r = (log_q + (log_P[:, -1:] - log_Q[:, -1:])).exp_().scatter_(-1, top, P[:, : o.k])
        return log_q.exp_().sub_(r).mul_(o.temperature)

    return loss, gradient


def _ce(x: _Logits, o: _Options) -> LossAndGradient:
    """d loss / d logits = q - one-hot of the target, at temperature 1."""
    assert x.targets is not None
    log_q, target = _log_softmax(x.student, 1.0), x.targets[:, None]
    loss = -log_q.gather(-1, target)[:, 0]
    return loss, lambda: log_q.exp_().scatter_add_(-1, target, log_q.new_full(target.shape, -1.0))


def _kl_ce(x: _Logits, o: _Options) -> LossAndGradient:
    kl, kl_gradient = _forward_kl(x, o)
    ce, ce_gradient = _ce(x, o)
    return kl + o.alpha * ce, lambda: kl_gradient().add_(ce_gradient(), alpha=o.alpha)


LOSS_AND_GRADIENT: dict[str, Callable[[_Logits, _Options], LossAndGradient]] = {
    "forward-kl": _forward_kl,
    "reverse-kl": _reverse_kl,
    "jensen-shannon": _jensen_shannon,
    "top-k-kl": _top_k_kl,
    "kl-ce": _kl_ce,
    "ce": _ce,
}


def _choose(name: str, student: Tensor, impl: Impl | None) -> Impl:
    if impl is None:
        return "triton" if student.is_cuda and name in FUSED and student.dtype != torch.float64 else "torch"
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}: expected one of {', '.join(IMPLS)}, or None to go by device and loss")
    if impl == "triton":
        if name not in FUSED:
            raise ValueError(f"impl='triton' computes {', '.join(FUSED)}, not {name}: use impl='torch'")
        from distill.kernels import check_kernel

        check_kernel("student_hidden", student)
    return impl


def _on_device(rows: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or rows.is_cuda:
        return rows.to(device)
    return rows.pin_memory().to(device, non_blocking=True)


def _check_tensors(given: dict[str, Tensor], rows: Tensor | None) -> None:
    """ValueError for shapes, dtypes and devices that don't fit together."""
    N, V = len(given["student_hidden"]), len(given["student_head"])
    for who in ("student", "teacher"):
        if f"{who}_hidden" not in given:
            continue
        hidden, head = given[f"{who}_hidden"], given[f"{who}_head"]
        if hidden.ndim != 2 or len(hidden) != N:
            tokens = "tokens" if who == "student" else N
            raise ValueError(f"{who}_hidden has shape {tuple(hidden.shape)}: expected [{tokens}, width]")
        if head.ndim != 2 or head.shape[1] != hidden.shape[1]:
            raise ValueError(f"{who}_head has shape {tuple(head.shape)}: expected [vocabulary, {hidden.shape[1]}]")
        if hidden.dtype not in DTYPES:
            raise ValueError(f"{who}_hidden is {hidden.dtype}: expected bfloat16, float32 or float64")
        if head.dtype != hidden.dtype:
            raise ValueError(
                f"{who}_head is {head.dtype}, {who}_hidden {hidden.dtype}: expected one dtype; "
                f"pass {who}_head.to({who}_hidden.dtype)"
            )
    if "teacher_head" in given and len(given["teacher_head"]) != V:
        raise ValueError(
            f"teacher_head has a vocabulary of {len(given['teacher_head']):,}, student_head of {V:,}: expected the same"
        )
    for name in ("weights", "targets"):
        if name in given and given[name].shape != (N,):
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}: expected [{N}], one a token")
    if not given["weights"].dtype.is_floating_point:
        raise ValueError(f"weights is {given['weights'].dtype}: expected float32")
    if "targets" in given and given["targets"].dtype != torch.int64:
        raise ValueError(f"targets is {given['targets'].dtype}: expected int64")
    for name, x in given.items():
        if x.device != given["student_hidden"].device:
            raise ValueError(f"{name} is on {x.device}, student_hidden on {given['student_hidden'].device}: move one")
    if rows is None:
        return
    if rows.ndim != 1 or rows.dtype != torch.int64 or rows.device.type != "cpu":
        raise ValueError(f"rows is {rows.dtype} {list(rows.shape)} on {rows.device}: expected 1-D int64 on the CPU")
    # A row named twice would lose one of its gradients.
    if len(rows) and (rows[0] < 0 or rows[-1] >= N or bool((rows.diff() <= 0).any())):
        raise ValueError(f"rows is {rows.tolist()[:8]}...: expected ascending numbers from 0 to {N - 1}, each once")
