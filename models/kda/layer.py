"""Kimi Delta Attention as a layer: projections, a short convolution, the recurrence, a gated norm.

    q, k, v = conv(W_q x), conv(W_k x), conv(W_v x)            causal, depthwise, no bias, no activation
    o       = kda(q, k, v, g = W_fb W_fa x, beta = W_b x)      models/kda/reference.py
    y       = W_o (RMSNorm(o) * sigmoid(W_gb W_ga x + b))      the norm a head, its weight [heads, head_dim]

q, k, v and o have the shapes and biases of the teacher's attention, so they can be copied from it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models.hybrid_config import HybridKDAConfig
from models.kda.api import PAD_LOGIT, Impl, default_impl, kda, kda_step
from models.kda.reference import gate_bias

SHORTEST_TOKENS, LONGEST_TOKENS = 2.0, 2048.0
"""Half-lives of the channels of a new layer."""
OPEN_LOGIT = 3.0
"""Bias of a new output gate: sigmoid(3) = 0.95, nearly open."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Several documents in a row, or in each row of a batch, which is read as one long row."""

    cu_seqlens: Tensor
    """[documents + 1], on the CPU: where each begins in the long row, and its end."""
    position: Tensor
    """[1, batch * tokens]: of each token in its document, from 0."""


class KimiDeltaAttention(nn.Module):  # type: ignore[misc]
    """The mixer of one layer. ``impl`` forces one implementation of `models.kda.api.kda`; None goes by the device."""

    def __init__(self, config: HybridKDAConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.kda_heads and config.kda_kv_heads and config.kda_head_dim
        self.config = config
        self.layer_idx = layer_idx
        self.impl: Impl | None = None
        self.heads, self.kv_heads, self.head_dim = config.kda_heads, config.kda_kv_heads, config.kda_head_dim
        self.conv_size = config.kda_conv_size
        hidden, wide, narrow = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        in_bias, out_bias = projection_biases(config)
        self.q_proj = nn.Linear(hidden, wide, bias=in_bias)
        self.k_proj = nn.Linear(hidden, narrow, bias=in_bias)
        self.v_proj = nn.Linear(hidden, narrow, bias=in_bias)
        self.o_proj = nn.Linear(wide, hidden, bias=out_bias)
        self.q_conv = nn.Parameter(torch.empty(wide, self.conv_size))
        self.k_conv = nn.Parameter(torch.empty(narrow, self.conv_size))
        self.v_conv = nn.Parameter(torch.empty(narrow, self.conv_size))
        self.f_a_proj = nn.Linear(hidden, self.head_dim, bias=False)
        self.f_b_proj = nn.Linear(self.head_dim, wide, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(self.heads, self.head_dim, dtype=torch.float32))
        self.b_proj = nn.Linear(hidden, self.heads, bias=False)
        if config.kda_output_gate:
            self.g_a_proj = nn.Linear(hidden, self.head_dim, bias=False)
            self.g_b_proj = nn.Linear(self.head_dim, wide, bias=True)
        self.o_norm = nn.Parameter(torch.empty(self.heads, self.head_dim, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def reset_parameters(self) -> None:
        """All but the plain projections; what a checkpoint has filled is left alone.

        The convolutions pass the newest token on, and the decay is what dt_bias says, whatever the input.
        """
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            newest = torch.zeros_like(conv)
            newest[:, -1] = 1.0
            init.copy_(conv, newest)
        init.zeros_(self.A_log)
        init.copy_(self.dt_bias, half_life_bias(self.config, self.head_dim).expand(self.heads, -1))
        init.zeros_(self.f_b_proj.weight)
        init.ones_(self.o_norm)
        if self.config.kda_output_gate:
            init.constant_(self.g_b_proj.bias, OPEN_LOGIT)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        packed: Packed | None = None,
        cache: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden].

        mask: [B, T], 0 at padding, which neither writes nor forgets. cache: transformers' DynamicCache made with the
        model's config; its layer's float32 state [B, H, K, V] and last inputs of the convolution are updated in place.
        """
        memory = linear_layer(cache, self.layer_idx)
        padding = None if mask is None else ~mask.to(x.device, torch.bool)[..., None]
        if padding is not None:
            x = x.masked_fill(padding, 0)
        streams = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        g, beta = self.f_b_proj(self.f_a_proj(x)), self.b_proj(x)
        if padding is not None:
            # A projection's bias would let pads into the convolution.
            streams = [s.masked_fill(padding, 0) for s in streams]
            off = max(PAD_LOGIT, torch.finfo(g.dtype).min)
            g, beta = g.masked_fill(padding, off), beta.masked_fill(padding, off)
        goes_on = memory is not None and memory.has_previous_state[0]
        q, k, v = self._convolve(streams, memory, packed, padding)
        q, k, v, g = (s.unflatten(-1, (-1, self.head_dim)) for s in (q, k, v, g))
        if self.config.kda_rope and position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        o = self._recur(q, k, v, g, beta, memory, goes_on, packed)
        return self.o_proj(self._norm(o, x))

    def queries_keys(
        self, x: Tensor, packed: Packed | None = None, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """q [B, T, H, K] and k [B, T, HK, K] of x [B, T, hidden], as the recurrence takes them (before its L2 norm)."""
        streams = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        q, k = (s.unflatten(-1, (-1, self.head_dim)) for s in self._convolve(streams, None, packed)[:2])
        if self.config.kda_rope and position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        return q, k

    def _convolve(
        self, streams: list[Tensor], memory: Any, packed: Packed | None, padding: Tensor | None = None
    ) -> list[Tensor]:
        """Each of q, k, v [B, T, channels]; the cache holds their last inputs as one [B, all channels, taps - 1], those
        before the ``padding`` [B, T, 1] on the right of a row, if there is any."""
        weights = [self.q_conv, self.k_conv, self.v_conv]
        sizes = [s.shape[-1] for s in streams]
        keep = self.conv_size - 1
        goes_on = memory is not None and memory.has_previous_state[0]
        if goes_on and streams[0].shape[1] == 1:
            # One token: launches are what costs, so the three convolutions are one.
            window = memory.update_conv_state(torch.cat(streams, -1).mT, conv_kernel_size=keep)
            y = (window * torch.cat(weights).to(window.dtype)).sum(-1)
            return list(y[:, None].split(sizes, -1))
        before = memory.conv_states[0].mT.split(sizes, -1) if goes_on else (None, None, None)
        position = None if packed is None else packed.position.to(streams[0].device)
        conv = short_conv
        # The kernel has no gradient for what stands before.
        if self._fused(streams[0]) and not (goes_on and torch.is_grad_enabled()):
            from models.kda.kernels.mixer import triton_conv as conv
        outputs = [conv(s, w, b, position) for s, w, b in zip(streams, weights, before, strict=True)]
        if memory is not None:
            if padding is None:
                newest = torch.cat([s[:, -keep:] for s in streams], -1)
            else:
                newest = last_inputs(torch.cat(streams, -1), padding, memory.conv_states[0] if goes_on else None, keep)
            memory.update_conv_state(newest.mT, conv_kernel_size=keep)
        return outputs

    def _recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        memory: Any,
        goes_on: bool,
        packed: Packed | None,
    ) -> Tensor:
        gates = (self.A_log, self.dt_bias)
        options: dict[str, Any] = {
            "gate": self.config.kda_gate,
            "lower_bound": self.config.kda_lower_bound,
            "impl": self.impl,
        }
        state = memory.recurrent_states[0] if goes_on else None
        if state is not None and q.shape[1] == 1 and not torch.is_grad_enabled():
            return kda_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], *gates, state, **options)[:, None]
        if state is not None and torch.is_grad_enabled():
            state = state.clone()  # the cache's own is overwritten below, before a backward pass could read it
        B = q.shape[0]
        if packed is not None:
            q, k, v, g, beta = (s.flatten(0, 1)[None] for s in (q, k, v, g, beta))
            options["cu_seqlens"] = packed.cu_seqlens
        o, last = kda(q, k, v, g, beta, *gates, initial_state=state, output_final_state=memory is not None, **options)
        if memory is not None:
            memory.update_recurrent_state(last)
        return o if packed is None else o[0].unflatten(0, (B, -1))

    def _norm(self, o: Tensor, x: Tensor) -> Tensor:
        """[B, T, H, V] -> [B, T, H * V]."""
        z = self.g_b_proj(self.g_a_proj(x)).view_as(o) if self.config.kda_output_gate else None
        norm = gated_norm
        if self._fused(o):
            from models.kda.kernels.mixer import triton_norm as norm
        return norm(o, z, self.o_norm, self.config.rms_norm_eps).flatten(-2)

    def _fused(self, x: Tensor) -> bool:
        """Whether the kernels run beside the recurrence too; fla's comparison is of the recurrence alone."""
        return (self.impl or default_impl(x)) in ("triton", "fla")


def short_conv(x: Tensor, weight: Tensor, before: Tensor | None = None, position: Tensor | None = None) -> Tensor:
    """Causal depthwise convolution: y_t = sum over i of weight[:, i] * x_(t - taps + 1 + i).

    x: [B, T, C]; weight: [C, taps]. before: the taps - 1 inputs before x [B, taps - 1, C], zeros by default.
    position: [1, B * T], each token's place in its packed document; earlier documents are not read.
    """
    taps, T = weight.shape[1], x.shape[1]
    weight = weight.to(x.dtype)
    past = F.pad(x, (0, 0, taps - 1, 0)) if before is None else torch.cat([before.to(x.dtype), x], 1)
    y = weight[:, -1] * x
    for lag in range(1, taps):
        earlier = past[:, taps - 1 - lag : taps - 1 - lag + T]
        if position is not None:
            earlier = earlier.masked_fill(position.view(-1, T, 1) < lag, 0)
        y = torch.addcmul(y, weight[:, -1 - lag], earlier)
    return y


def last_inputs(x: Tensor, padding: Tensor, before: Tensor | None, keep: int) -> Tensor:
    """The ``keep`` inputs up to each row's last token [B, keep, C]: of x [B, T, C], and of those before it [B, C, keep]
    (zeros by default). padding: [B, T, 1], True at padding; columns to the left of a row's last token stay as they are.
    """
    past = F.pad(x, (0, 0, keep, 0)) if before is None else torch.cat([before.mT.to(x.dtype), x], 1)
    behind = padding[..., 0].flip(1).int().cumprod(1).sum(1)  # padding to the right of the last token
    columns = x.shape[1] - behind[:, None] + torch.arange(keep, device=x.device)
    return past.gather(1, columns[..., None].expand(-1, -1, x.shape[2]))


def gated_norm(o: Tensor, z: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm a head times an output gate: o / rms(o) * weight * sigmoid(z), in float32 or wider, in o's dtype.

    o, z: [..., H, V], z None without a gate; weight: [H, V]; the root mean square is over V.
    """
    wide = o.to(torch.promote_types(o.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
    if z is not None:
        wide = wide * torch.sigmoid(z.to(wide.dtype))
    return wide.to(o.dtype)


def half_life_bias(config: HybridKDAConfig, channels: int) -> Tensor:
    """dt_bias [channels], float32, whose decay (with A_log = 0 and a gate input of 0) halves the state after 2 to 2048
    tokens, log-spaced over the channels."""
    tokens = torch.logspace(math.log2(SHORTEST_TOKENS), math.log2(LONGEST_TOKENS), channels, base=2.0, device="cpu")
    if config.kda_gate == "bounded":
        tokens = tokens.clamp(min=math.log(2.0) / (-0.999 * config.kda_lower_bound))  # a weak bound forgets no faster
    return gate_bias(tokens.double(), config.kda_gate, config.kda_lower_bound).float()


def projection_biases(config: HybridKDAConfig) -> tuple[bool, bool]:
    """Whether the teacher's attention has a bias in (q, k, v) and in o."""
    if config.teacher_type == "qwen2":
        return True, False
    return bool(config.attention_bias), bool(config.attention_bias)


def linear_layer(cache: Any, layer_idx: int) -> Any:
    """The cache's entry for a KDA layer, None without a cache."""
    if cache is None:
        return None
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not hasattr(layer, "recurrent_states"):
        raise ValueError(
            f"the cache has no recurrent state for layer {layer_idx}: make it with DynamicCache(config=model.config)"
        )
    return layer
