"""KDA as its users call it: arguments checked, one implementation chosen, nothing falls back in silence.

implementations: "triton" (our kernels; a GPU, or a CPU under TRITON_INTERPRET=1), "reference" (plain PyTorch,
chunkwise, any device), "recurrent" (token by token; the oracle), "fla" (flash-linear-attention, for comparison).
The default goes by the tensors' device: "triton" on CUDA, "reference" elsewhere.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from models.kda import reference

Gate = Literal["bounded", "softplus"]
Impl = Literal["triton", "reference", "recurrent", "fla"]
IMPLS = ("triton", "reference", "recurrent", "fla")
GATES = ("bounded", "softplus")

PAD_LOGIT = -1e20
"""Gate input and beta of a padding token: its log-decay and its beta are then exactly 0, and so are the gradients."""


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    gate: Gate = "bounded",
    lower_bound: float = -5.0,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention over whole sequences (arXiv:2510.26692); the formula is in models/kda/reference.py.

    q: [B, T, H, K]; k: [B, T, HK, K] and v: [B, T, HK, V], where HK divides H and head h uses k/v head h // (H / HK).
    g: [B, T, H, K] gate input; beta: [B, T, H], before its sigmoid. q and k are normalised inside.
    A_log: [H] and dt_bias: [H, K], float32. gate: "bounded", g = lower_bound * sigmoid(exp(A_log) (g + dt_bias)), or
    "softplus", g = -exp(A_log) softplus(g + dt_bias); natural log. scale: of q, K^-1/2 by default.
    initial_state: [N, H, K, V] float32; N = B, or the number of packed sequences.
    cu_seqlens: [N + 1] int, where each packed sequence of a batch of one begins, and T at its end.

    Returns o [B, T, H, V] in v's dtype, and the final state [N, H, K, V] (float32) or None.
    Raises ValueError naming the argument, what was found, and what is expected.
    """
    given = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias}
    if initial_state is not None:
        given["initial_state"] = initial_state
    starts = _check(given, ("batch", "tokens"), gate, lower_bound, scale, cu_seqlens, impl)
    impl = impl or default_impl(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options: dict[str, Any] = {"gate": gate, "lower_bound": lower_bound, "scale": scale, "initial_state": initial_state}
    if impl == "triton":
        from models.kda.kernels.autograd import triton_kda

        o, state = triton_kda(q, k, v, g, beta, A_log, dt_bias, cu_seqlens=starts, **options)
    elif impl == "fla":
        from models.kda.fla import fla_kda

        o, state = fla_kda(q, k, v, g, beta, A_log, dt_bias, cu_seqlens=cu_seqlens, **options)
    else:
        run = reference.chunk_kda if impl == "reference" else reference.recurrent_kda
        o, state = run(q, k, v, g, beta, A_log, dt_bias, cu_seqlens=starts, **options)
    return o, state if output_final_state else None


def kda_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    gate: Gate = "bounded",
    lower_bound: float = -5.0,
    scale: float | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """One token of each sequence: q, g [B, H, K], k [B, HK, K], v [B, HK, V], beta [B, H]; no gradients.

    ``state`` [B, H, K, V] float32 is updated in place. Returns o [B, H, V] in v's dtype. Otherwise as `kda`.
    """
    given = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias, "state": state}
    _check(given, ("batch",), gate, lower_bound, scale, None, impl)
    if not state.is_contiguous():
        raise ValueError(
            "state is not contiguous, so it can't be updated in place: pass state.contiguous() and keep it"
        )
    impl = impl or default_impl(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options: dict[str, Any] = {"gate": gate, "lower_bound": lower_bound, "scale": scale}
    with torch.no_grad():
        if impl == "triton":
            from models.kda.kernels.decode import triton_step

            return triton_step(q, k, v, g, beta, A_log, dt_bias, state, **options)
        one = {name: x.unsqueeze(1) if name in ("q", "k", "v", "g", "beta") else x for name, x in given.items()}
        if impl == "fla":
            from models.kda.fla import fla_step

            return fla_step(**one, **options)
        one["initial_state"] = one.pop("state")
        o, new = reference.recurrent_kda(**one, cu_seqlens=None, **options)
        state.copy_(new)
        return o[:, 0]


def default_impl(x: Tensor) -> Impl:
    return "triton" if x.is_cuda else "reference"


def _check(
    given: dict[str, Tensor],
    axes: Sequence[str],
    gate: str,
    lower_bound: float,
    scale: float | None,
    cu_seqlens: Tensor | None,
    impl: str | None,
) -> list[int] | None:
    """The starts of the packed sequences as a list, None without ``cu_seqlens``; ValueError for what can't be run.

    given: the tensors by their arguments' names; axes: what comes before the heads.
    """
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}: expected one of {', '.join(IMPLS)}, or None to go by the device")
    if gate not in GATES:
        raise ValueError(f"gate is {gate!r}: expected {' or '.join(GATES)}")
    if gate == "bounded" and not -math.inf < lower_bound < 0:
        raise ValueError(f"lower_bound is {lower_bound}: expected a bounded gate's least log-decay, finite and below 0")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}: expected a finite number, or None for (key dim)^-1/2")
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is of type {type(x).__name__}: expected a tensor")
    starts = _check_shapes(given, axes, cu_seqlens)
    q = given["q"]
    for name in ("k", "v", "g", "beta"):
        if given[name].dtype != q.dtype:
            raise ValueError(
                f"{name} is {given[name].dtype}, q is {q.dtype}: expected one dtype for q, k, v, g and beta"
            )
    wide = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
    for name in ("A_log", "dt_bias", "initial_state", "state"):
        if name in given and given[name].dtype not in wide:
            raise ValueError(
                f"{name} is {given[name].dtype}: expected float32, since bfloat16 rounds away what it learns"
            )
    for name, x in given.items():
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q is on {q.device}: expected one device")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q is {q.dtype}: expected a floating-point dtype")
    return starts


def _check_shapes(given: dict[str, Tensor], axes: Sequence[str], cu_seqlens: Tensor | None) -> list[int] | None:
    q, k, v = given["q"], given["k"], given["v"]
    if q.ndim != len(axes) + 2:
        raise ValueError(f"q has shape {tuple(q.shape)}: expected [{', '.join(axes)}, heads, key dim]")
    *lead, H, K = q.shape
    if K == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}: expected a key dim of 1 or more")
    before = ", ".join(map(str, lead))
    if k.ndim != q.ndim or [*k.shape[:-2], k.shape[-1]] != [*lead, K]:
        raise ValueError(f"k has shape {tuple(k.shape)}: expected [{before}, k/v heads, {K}], like q")
    HK = k.shape[-2]
    if HK == 0 or H % HK:
        raise ValueError(f"k has {HK} heads: expected a number that divides q's {H} heads")
    if v.ndim != q.ndim or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v has shape {tuple(v.shape)}: expected [{before}, {HK}, value dim], like k")
    starts = None if cu_seqlens is None else _starts(cu_seqlens, *lead)
    state = (lead[0] if starts is None else len(starts) - 1, H, K, v.shape[-1])
    for name, shape in (
        ("g", (*lead, H, K)),
        ("beta", (*lead, H)),
        ("A_log", (H,)),
        ("dt_bias", (H, K)),
        ("initial_state", state),
        ("state", state),
    ):
        if name in given and tuple(given[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}: expected {list(shape)}")
    return starts


def _starts(cu_seqlens: Tensor, B: int, T: int) -> list[int]:
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is of type {type(cu_seqlens).__name__}: expected a tensor of integers")
    dtype = cu_seqlens.dtype
    whole = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    if cu_seqlens.ndim != 1 or not whole or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {dtype}: expected [sequences + 1] integers"
        )
    if B != 1:
        raise ValueError(f"q has a batch of {B}: packed sequences (cu_seqlens) come in a batch of one")
    starts: list[int] = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != T or any(a > b for a, b in zip(starts, starts[1:], strict=False)):
        raise ValueError(
            f"cu_seqlens is {_short(starts)}: expected to begin with 0, never to fall, and to end at T = {T}"
        )
    return starts


def _short(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:4]))}, ..., {numbers[-1]}]"
