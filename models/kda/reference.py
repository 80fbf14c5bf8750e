"""The mathematics of KDA in plain PyTorch: the recurrence token by token, and the chunkwise form.

One head, state S [K, V] in float32 (float64 for float64 inputs), t the token:

    q, k  = L2-normalised (eps 1e-6);  g = log-decay <= 0 a channel, natural log;  b = sigmoid(beta)
    S     = diag(exp g) S
    u     = b (v - S^T k)
    S     = S + k u^T
    o     = scale * S^T q

Every function takes q, k, v, g, beta with the shapes of `models.kda.api.kda`, already checked.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

L2_EPS = 1e-6
CHUNK = 64


def log_decay(g: Tensor, A_log: Tensor, dt_bias: Tensor, gate: str, lower_bound: float) -> Tensor:
    """The gate: log-decay (natural log, <= 0) of the gate input ``g`` [..., H, K].

    "bounded": lower_bound * sigmoid(exp(A_log) * (g + dt_bias)); "softplus": -exp(A_log) * softplus(g + dt_bias).
    """
    dtype = compute_dtype(g)
    # Past exp(30) every gate is saturated; unclamped, exp overflows and the backward multiplies 0 by inf.
    rate = A_log.to(dtype).clamp(max=30.0).exp()[:, None]
    x = g.to(dtype) + dt_bias.to(dtype)
    if gate == "bounded":
        return lower_bound * torch.sigmoid(rate * x)
    return -rate * F.softplus(x)


def gate_bias(half_life: Tensor, gate: str, lower_bound: float) -> Tensor:
    """dt_bias with which a state halves after ``half_life`` tokens, where A_log and the gate input are 0: the inverse
    of `log_decay`. Infinite or NaN for a half-life that a bounded gate can't reach."""
    rate = math.log(2.0) / half_life
    return torch.logit(rate / -lower_bound) if gate == "bounded" else rate.expm1().log()


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def l2norm(x: Tensor) -> Tensor:
    x = x.to(compute_dtype(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scaled q, k, v, sigmoid of beta) in the compute dtype, with one k and v head for every q head."""
    groups = q.shape[-2] // k.shape[-2]
    k, v = l2norm(k), v.to(compute_dtype(v))
    if groups > 1:
        k, v = k.repeat_interleave(groups, -2), v.repeat_interleave(groups, -2)
    return l2norm(q) * scale, k, v, torch.sigmoid(beta.to(compute_dtype(beta)))


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: q, k, g [..., K] and v [..., V] prepared, b [...]; returns (o, new state)."""
    state = state * g.exp()[..., None]
    u = b[..., None] * (v - (state * k[..., None]).sum(-2))
    state = state + k[..., None] * u[..., None, :]
    return (state * q[..., None]).sum(-2), state


def recurrent_kda(
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
) -> tuple[Tensor, Tensor]:
    """Token by token: the oracle of every other implementation. Returns o [B, T, H, V] and the states [N, H, K, V]."""
    with _no_autocast(q.device.type):
        decay = log_decay(g, A_log, dt_bias, gate, lower_bound)
        q_, k_, v_, b = _prepared(q, k, v, g, beta, scale)
        outputs, states = [], []
        for rows, start, end, n in _sequences(q, cu_seqlens):
            state = _first_state(initial_state, n, rows, k_, v_)
            tokens = []
            for t in range(start, end):
                o, state = step(q_[rows, t], k_[rows, t], v_[rows, t], decay[rows, t], b[rows, t], state)
                tokens.append(o)
            outputs.append(torch.stack(tokens, 1) if tokens else v_[rows, start:end])
            states.append(state)
        return torch.cat(outputs, 1).to(v.dtype), torch.cat(states)


def chunk_kda(
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
) -> tuple[Tensor, Tensor]:
    """The chunkwise form: matrix products inside chunks of 64 tokens, one small step from chunk to chunk."""
    with _no_autocast(q.device.type):
        decay = log_decay(g, A_log, dt_bias, gate, lower_bound)
        q_, k_, v_, b = _prepared(q, k, v, g, beta, scale)
        outputs, states = [], []
        for rows, start, end, n in _sequences(q, cu_seqlens):
            state = _first_state(initial_state, n, rows, k_, v_)
            at = (rows, slice(start, end))
            o, state = _chunks(q_[at], k_[at], v_[at], decay[at], b[at], state)
            outputs.append(o)
            states.append(state)
        return torch.cat(outputs, 1).to(v.dtype), torch.cat(states)


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast would round what a matrix product takes, and with it the state, to 16 bits."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def _sequences(q: Tensor, cu_seqlens: list[int] | None) -> Iterator[tuple[slice, int, int, slice]]:
    """(rows of the batch, first token, end, entries of the state): the whole batch, or one packed sequence a time."""
    if cu_seqlens is None:
        yield slice(None), 0, q.shape[1], slice(None)
        return
    for n in range(len(cu_seqlens) - 1):
        yield slice(0, 1), cu_seqlens[n], cu_seqlens[n + 1], slice(n, n + 1)


def _first_state(initial: Tensor | None, n: slice, rows: slice, k: Tensor, v: Tensor) -> Tensor:
    if initial is not None:
        return initial[n].to(k.dtype)
    return k.new_zeros(k[rows].shape[0], k.shape[-2], k.shape[-1], v.shape[-1])


def _chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, g [B, T, H, K], v [B, T, H, V] and b [B, T, H] prepared; state [B, H, K, V]."""
    T = q.shape[1]
    if T == 0:
        return v, state
    C = min(CHUNK, 1 << (T - 1).bit_length())
    pad = -T % C
    # Padding tokens write nothing (b = 0) and forget nothing (g = 0).
    q, k, v, g, b = (_split(x, pad, C) for x in (q, k, v, g, b[..., None]))
    A_qk, A_kk = decayed_products((q, k), k, g)
    A_qk = A_qk + torch.diag_embed((q * k).sum(-1))
    G = g.cumsum(-2)
    in_, out = G.exp(), _after(g).exp()
    # (I + diag(b) A_kk)^-1 diag(b) [V | K], the UT transform: Kimi Linear, eq. 6-8.
    solved = torch.linalg.solve_triangular(b * A_kk, b * torch.cat([v, in_ * k], -1), upper=False, unitriangular=True)
    U, W = solved.split([v.shape[-1], k.shape[-1]], -1)
    inside = []
    for c in range(q.shape[2]):
        new = U[:, :, c] - W[:, :, c] @ state
        inside.append((in_[:, :, c] * q[:, :, c]) @ state + A_qk[:, :, c] @ new)
        state = in_[:, :, c, -1, :, None] * state + (out[:, :, c] * k[:, :, c]).mT @ new
    o = torch.stack(inside, 2).flatten(2, 3).transpose(1, 2)
    return o[:, :T], state


def _split(x: Tensor, pad: int, C: int) -> Tensor:
    """[B, T, H, D] -> [B, H, chunks, C, D]"""
    x = F.pad(x, (0, 0, 0, 0, 0, pad)).transpose(1, 2)
    return x.unflatten(2, (-1, C))


def _after(g: Tensor) -> Tensor:
    """Sum of the later tokens' log-decay inside the chunk, without the token's own: cumsum from the end."""
    later = F.pad(g[..., 1:, :], (0, 0, 0, 1))
    return later.flip(-2).cumsum(-2).flip(-2)


def decayed_products(rows: tuple[Tensor, ...], k: Tensor, g: Tensor) -> list[Tensor]:
    """For each of ``rows`` [..., C, K] the strictly lower part of A[i, j] = sum_d row_i[d] k_j[d] exp(G_i - G_j)[d].

    G is the cumulative log-decay g [..., C, K] along C, a power of two. Built from 1x1 blocks up: the block of later
    rows and earlier columns of two neighbours factors through the later neighbour's first row, so both exponents are
    sums of log-decays, never positive: no gate overflows, and nothing is cancelled.
    """
    C, K = k.shape[-2:]
    out = [x.new_zeros(*x.shape[:-2], C, 1, 1) for x in rows]
    h = 1
    while h < C:
        pairs = [x.unflatten(-2, (-1, 2, h)) for x in (*rows, k, g)]
        first, later = pairs[-1].unbind(-3)
        # Row i: from the anchor (without its own decay) to i. Column j: from j (without) to the anchor (with).
        down = F.pad(later[..., 1:, :], (0, 0, 1, 0)).cumsum(-2).exp()
        up = torch.cat([first[..., 1:, :], later[..., :1, :]], -2).flip(-2).cumsum(-2).flip(-2).exp()
        columns = (pairs[-2][..., 0, :, :] * up).mT
        for n, A in enumerate(out):
            block = (pairs[n][..., 1, :, :] * down) @ columns
            a, d = A.unflatten(-3, (-1, 2)).unbind(-3)
            out[n] = torch.cat([torch.cat([a, torch.zeros_like(a)], -1), torch.cat([block, d], -1)], -2)
        h *= 2
    return [A.squeeze(-3) for A in out]
