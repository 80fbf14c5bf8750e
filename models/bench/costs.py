"""What the work must cost at least, by formula: bytes moved once, multiply-adds of the chunkwise form, cache bytes."""

from collections.abc import Callable
from dataclasses import dataclass

CHUNK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The least that a computation needs of a device."""

    bytes: int
    """Every input read once and every output written once, nothing between them."""
    flops: int
    """Two a multiply-add; products of matrices and vectors alone."""

    def __add__(self, other: "Work") -> "Work":
        return Work(bytes=self.bytes + other.bytes, flops=self.flops + other.flops)

    def floor_ms(self, bytes_per_s: float, flop_per_s: float) -> dict[str, float]:
        """The larger of two times is the floor: no version of this computation is faster on such a device."""
        by_bytes, by_flops = 1e3 * self.bytes / bytes_per_s, 1e3 * self.flops / flop_per_s
        return {"bytes_ms": by_bytes, "flops_ms": by_flops, "ms": max(by_bytes, by_flops)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of one KDA call: q, g [batch, tokens, heads, key_dim], k and v with kv_heads, v's width value_dim."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int
    """Bytes an element of q, k, v, g, beta and o."""

    def _elements(self) -> int:
        """q, k, v, g and beta."""
        a_token = self.heads * (2 * self.key_dim + 1) + self.kv_heads * (self.key_dim + self.value_dim)
        return self.batch * self.tokens * a_token

    def _outputs(self) -> int:
        return self.batch * self.tokens * self.heads * self.value_dim

    def _gate_bytes(self) -> int:
        """A_log and dt_bias, float32."""
        return 4 * self.heads * (1 + self.key_dim)

    def forward(self) -> Work:
        moved = self.itemsize * (self._elements() + self._outputs()) + self._gate_bytes()
        return Work(bytes=moved, flops=2 * self._chunked(forward_products))

    def backward(self) -> Work:
        """Inputs and the output's gradient read, the inputs' gradients written; the chunk-start states, which the
        forward may leave in memory or the backward recompute, are not counted."""
        moved = self.itemsize * (2 * self._elements() + self._outputs()) + 2 * self._gate_bytes()
        return Work(bytes=moved, flops=2 * self._chunked(backward_products))

    def decode(self) -> Work:
        """One token of each of ``batch`` sequences (``tokens`` is 1): the float32 state is read and written."""
        state = self.batch * self.heads * self.key_dim * self.value_dim
        moved = self.itemsize * (self._elements() + self._outputs()) + self._gate_bytes() + 2 * 4 * state
        return Work(bytes=moved, flops=2 * 3 * state)

    def _chunked(self, products: Callable[[int, int, int], int]) -> int:
        whole, rest = divmod(self.tokens, CHUNK)
        a_head = whole * products(CHUNK, self.key_dim, self.value_dim) + products(rest, self.key_dim, self.value_dim)
        return self.batch * self.heads * a_head


def forward_products(C: int, K: int, V: int) -> int:
    """Multiply-adds of one chunk of C tokens and one head, in the notation of models/kda/reference.py's chunkwise form.

    Triangular matrices are counted by their entries, and what parallel segments repeat is not counted: a lower bound.
    """
    strict, lower = C * (C - 1) // 2, C * (C + 1) // 2
    scores = K * strict + K * lower  # A_kk, A_qk
    solve = (K + V) * strict  # (I + A_kk)^-1 of [V | K], by substitution
    inside = V * lower  # A_qk V'
    through_state = 3 * C * K * V  # W S, Q S, K^T V'
    return scores + solve + inside + through_state


def backward_products(C: int, K: int, V: int) -> int:
    """As `forward_products`, of the gradients from the chunk-start states: A_kk, A_qk, W, U and V' are recomputed."""
    strict, lower = C * (C - 1) // 2, C * (C + 1) // 2
    again = K * strict + K * lower + (K + V) * strict + C * K * V  # A_kk, A_qk, the solve, W S
    values = V * lower + C * K * V  # dV' = A_qk^T dO + K dS
    state = 2 * C * K * V  # Q^T dO, W^T dV'
    scores = V * lower  # dA_qk = lower(dO V'^T)
    solved = (
        C * K * V + 2 * (K + V) * strict
    )  # dW = -dV' S^T; the transposed solve of [dU | dW]; its product with [U | W]
    queries = K * lower + C * K * V  # dA_qk K, dO S^T
    keys = 2 * K * strict + K * lower + C * K * V  # dA_kk K, dA_kk^T K, dA_qk^T Q, V' dS^T
    return again + values + state + scores + solved + queries + keys


def kv_cache_bytes(*, layers: int, batch: int, tokens: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Keys and values of ``layers`` attention layers."""
    return 2 * layers * batch * tokens * kv_heads * head_dim * itemsize


def kda_state_bytes(
    *, layers: int, batch: int, heads: int, kv_heads: int, head_dim: int, taps: int, itemsize: int
) -> int:
    """Float32 states [heads, head_dim, head_dim], and the short convolutions' last ``taps`` inputs of q, k and v."""
    recurrent = 4 * heads * head_dim * head_dim
    convolution = itemsize * taps * (heads + 2 * kv_heads) * head_dim
    return layers * batch * (recurrent + convolution)
