"""The formulas of models/bench/costs.py against loops that count every multiply-add, and against tensors' bytes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.bench.costs import CHUNK, Sizes, Work, backward_products, forward_products
from models.bench.inputs import random_inputs
from models.kda.reference import step

C, K, V = 6, 4, 3


class Counter:
    """Matrix products by scalar loops; ``count`` is how many multiply-adds they took."""

    def __init__(self) -> None:
        self.count = 0

    def product(self, a: Tensor, b: Tensor, *, left: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """a @ b. left: which entries of a are not zero by structure; out: which entries of the product are needed."""
        c = a.new_zeros(a.shape[0], b.shape[1])
        for i in range(a.shape[0]):
            for j in range(b.shape[1]):
                for n in range(a.shape[1]):
                    if (left is None or left[i, n]) and (out is None or out[i, j]):
                        c[i, j] += a[i, n] * b[n, j]
                        self.count += 1
        return c

    def decayed(self, x: Tensor, k: Tensor, G: Tensor, needed: Tensor) -> Tensor:
        """sum_d x_i k_j exp(G_i - G_j) for the needed i, j."""
        c = x.new_zeros(len(x), len(x))
        for i, j in needed.nonzero().tolist():
            for d in range(x.shape[1]):
                c[i, j] += x[i, d] * k[j, d] * (G[i, d] - G[j, d]).exp()
                self.count += 1
        return c

    def spread(self, a: Tensor, k: Tensor, G: Tensor, needed: Tensor, *, transposed: bool = False) -> Tensor:
        """sum_j a_ij k_j exp(G_i - G_j) for each i; transposed: sum_i a_ij k_i exp(G_i - G_j) for each j."""
        c = torch.zeros_like(k)
        for i, j in needed.nonzero().tolist():
            to, source = (j, i) if transposed else (i, j)
            for d in range(k.shape[1]):
                c[to, d] += a[i, j] * k[source, d] * (G[i, d] - G[j, d]).exp()
                self.count += 1
        return c

    def solve(self, L: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
        """(I + L)^-1 x by substitution, L strictly lower; transposed: (I + L^T)^-1 x."""
        x = x.clone()
        order = range(len(L) - 1, -1, -1) if transposed else range(len(L))
        for i in order:
            for j in range(i + 1, len(L)) if transposed else range(i):
                for d in range(x.shape[1]):
                    x[i, d] -= (L[j, i] if transposed else L[i, j]) * x[j, d]
                    self.count += 1
        return x


class Chunk:
    """One random chunk with its initial state, in float64; everything prepared (no gate, no norm)."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        normal: Callable[..., Tensor] = torch.randn
        self.q, self.k, self.v = (normal(C, n, dtype=torch.float64) for n in (K, K, V))
        self.g, self.b = -torch.rand(C, K, dtype=torch.float64), torch.rand(C, dtype=torch.float64)
        self.S, self.dO, self.dS = (normal(*n, dtype=torch.float64) for n in ((K, V), (C, V), (K, V)))

    def recurrence(self) -> tuple[Tensor, Tensor]:
        state, outputs = self.S, []
        for t in range(C):
            o, state = step(self.q[t], self.k[t], self.v[t], self.g[t], self.b[t], state)
            outputs.append(o)
        return torch.stack(outputs), state


STRICT = torch.ones(C, C).tril(-1).bool()
LOWER = torch.ones(C, C).tril().bool()


def test_forward_products_are_those_of_a_chunk_that_gives_the_recurrences_output() -> None:
    x, n = Chunk(), Counter()
    G = x.g.cumsum(0)
    E, tail = G.exp(), (G[-1] - G).exp()
    A_qk, A_kk = n.decayed(x.q, x.k, G, LOWER), n.decayed(x.k, x.k, G, STRICT)
    U, W = n.solve(x.b[:, None] * A_kk, x.b[:, None] * torch.cat([x.v, E * x.k], 1)).split([V, K], 1)
    new = U - n.product(W, x.S)
    o = n.product(E * x.q, x.S) + n.product(A_qk, new, left=LOWER)
    state = E[-1][:, None] * x.S + n.product((tail * x.k).T, new)
    for found, wanted in zip((o, state), x.recurrence(), strict=True):
        torch.testing.assert_close(found, wanted)
    assert n.count == forward_products(C, K, V)


def test_backward_products_are_those_of_a_chunk_that_gives_autograds_gradients() -> None:
    x, n = Chunk(), Counter()
    leaves = [y.requires_grad_() for y in (x.q, x.k, x.v, x.S)]
    wanted = torch.autograd.grad(x.recurrence(), leaves, (x.dO, x.dS))
    for leaf in leaves:
        leaf.requires_grad_(False)
    G, b = x.g.cumsum(0), x.b[:, None]
    E, tail = G.exp(), (G[-1] - G).exp()
    A_qk, P = n.decayed(x.q, x.k, G, LOWER), n.decayed(x.k, x.k, G, STRICT)
    UW = n.solve(b * P, b * torch.cat([x.v, E * x.k], 1))
    U, W = UW.split([V, K], 1)
    new = U - n.product(W, x.S)
    d_new = n.product(A_qk.T, x.dO, left=LOWER.T) + n.product(tail * x.k, x.dS)
    dS = E[-1][:, None] * x.dS + n.product((E * x.q).T, x.dO) - n.product(W.T, d_new)
    dA_qk = n.product(x.dO, new.T, out=LOWER)
    dUW = torch.cat([d_new, -n.product(d_new, x.S.T)], 1)
    inner = n.solve(b * P, dUW, transposed=True)
    dP = -b * n.product(inner, UW.T, out=STRICT)
    dv, X = (b * inner).split([V, K], 1)
    dq = n.spread(dA_qk, x.k, G, LOWER) + E * n.product(x.dO, x.S.T)
    dk = n.spread(dP, x.k, G, STRICT) + E * X + n.spread(dP, x.k, G, STRICT, transposed=True)
    dk += n.spread(dA_qk, x.q, G, LOWER, transposed=True) + tail * n.product(new, x.dS.T)
    for found, one in zip((dq, dk, dv, dS), wanted, strict=True):
        torch.testing.assert_close(found, one)
    assert n.count == backward_products(C, K, V)


def test_a_length_is_its_whole_chunks_and_the_rest() -> None:
    def flops(tokens: int) -> int:
        sizes = Sizes(batch=3, tokens=tokens, heads=4, kv_heads=2, key_dim=K, value_dim=V, itemsize=2)
        return sizes.forward().flops

    assert flops(2 * CHUNK + 6) == 2 * 3 * 4 * (2 * forward_products(CHUNK, K, V) + forward_products(6, K, V))


def test_bytes_are_those_of_the_tensors() -> None:
    sizes = Sizes(batch=3, tokens=10, heads=4, kv_heads=2, key_dim=8, value_dim=6, itemsize=2)
    x = random_inputs(sizes, "bounded", torch.bfloat16, torch.Generator().manual_seed(0), state=True, gradient=True)
    read = sum(tensor.nbytes for tensor in x.arguments())
    assert sizes.forward().bytes == read + x.do.nbytes  # the output is as large as its gradient
    assert sizes.backward().bytes == 2 * read + x.do.nbytes
    one = Sizes(batch=3, tokens=1, heads=4, kv_heads=2, key_dim=8, value_dim=6, itemsize=2)
    x = random_inputs(one, "bounded", torch.bfloat16, torch.Generator().manual_seed(0), state=True, gradient=True)
    read = sum(tensor.nbytes for tensor in x.arguments())
    assert one.decode().bytes == read + x.do.nbytes + 2 * x.state.nbytes


def test_the_floor_is_the_slower_of_bytes_and_flops() -> None:
    work = Work(bytes=4_000_000_000, flops=1_000_000_000_000)
    assert work.floor_ms(4e12, 1e15) == pytest.approx({"bytes_ms": 1.0, "flops_ms": 1.0, "ms": 1.0})
    assert work.floor_ms(4e12, 2e14)["ms"] == pytest.approx(5.0)
    assert (work + work).bytes == 8_000_000_000


def test_floors_at_known_sizes() -> None:
    """16 heads of 128 in bfloat16 at 4.3 TB/s: 0.039 and 0.63 ms at 8K and 128K; decode of 64 sequences 0.031 ms."""

    def ms(batch: int, tokens: int) -> float:
        sizes = Sizes(batch=batch, tokens=tokens, heads=16, kv_heads=16, key_dim=128, value_dim=128, itemsize=2)
        work = sizes.decode() if tokens == 1 else sizes.forward()
        return work.floor_ms(4.3e12, math.inf)["ms"]

    assert ms(1, 8192) == pytest.approx(0.039, abs=1e-3)
    assert ms(1, 131072) == pytest.approx(0.63, abs=1e-2)
    assert ms(64, 1) == pytest.approx(0.031, abs=1e-3)
