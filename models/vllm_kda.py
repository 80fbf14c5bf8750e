"""KDA as a layer of vLLM: the mixer of models/kda/layer.py over a batch of requests whose states vLLM keeps.

vLLM hands over the tokens of all requests as one long row [tokens, hidden]; of each request it says where its tokens
begin, whether it is new, and which block of the cache holds its state: the last inputs of the convolution
[taps - 1, channels] and the recurrent state [H, K, V] (float32).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend, LinearAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from models.hybrid_config import HybridKDAConfig
from models.kda.api import kda, kda_step
from models.kda.layer import KimiDeltaAttention, short_conv


@dataclass(frozen=True, slots=True)
class KDAMetadata:
    """Where the requests of a batch lie; made once a step, for all layers."""

    starts: Tensor
    """[requests + 1], on the CPU: where each begins in the row of tokens, and its end."""
    decodes: int
    """So many requests, the first ones, have one token."""
    blocks: Tensor
    """[requests]: the cache's block of each."""
    fresh: Tensor
    """[requests]: nothing of it was computed before."""
    tokens: Tensor
    """[tokens]: place of each token in a row in which taps - 1 earlier inputs stand before every request."""
    before: Tensor
    """[requests, taps - 1]: places of those."""
    after: Tensor
    """[requests, taps - 1]: places of the last inputs, kept for the next step."""

    @classmethod
    def of(cls, starts: Tensor, decodes: int, blocks: Tensor, fresh: Tensor, keep: int) -> "KDAMetadata":
        lengths = starts.diff()
        request = torch.arange(len(lengths))
        tokens = torch.arange(int(starts[-1])) + keep * (request.repeat_interleave(lengths) + 1)
        earlier = torch.arange(keep)
        before = (starts[:-1] + keep * request)[:, None] + earlier
        after = (starts[1:] + keep * request)[:, None] + earlier
        tokens, before, after = (x.to(blocks.device, non_blocking=True) for x in (tokens, before, after))
        return cls(starts, decodes, blocks, fresh, tokens, before, after)


class KDAMetadataBuilder(LinearAttentionMetadataBuilder):  # type: ignore[misc]
    # How tokens fall into requests decides what is launched, so nothing is captured.
    _cudagraph_support = AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KDAMetadata:
        plain = super().build(common_prefix_len, common_attn_metadata, fast_build)
        starts = common_attn_metadata.query_start_loc_cpu.long()
        keep = self.kv_cache_spec.shapes[0][0]
        fresh = plain.seq_lens == plain.query_start_loc.diff()
        return KDAMetadata.of(starts, plain.num_decodes, plain.state_indices_tensor.long(), fresh, keep)


class KDABackend(LinearAttentionBackend):  # type: ignore[misc]
    @staticmethod
    def get_name() -> str:
        return "HYBRID_KDA"

    @staticmethod
    def get_builder_cls() -> type[KDAMetadataBuilder]:
        return KDAMetadataBuilder


class VLLMKimiDeltaAttention(KimiDeltaAttention, MambaBase):  # type: ignore[misc]
    """The mixer of one layer, its heads split over tensor-parallel ranks."""

    def __init__(self, config: HybridKDAConfig, layer_idx: int, vllm_config: VllmConfig, prefix: str) -> None:
        self.ranks = get_tensor_model_parallel_world_size()
        super().__init__(split_config(config, self.ranks), layer_idx)
        self.vllm_config = vllm_config
        self.prefix = prefix
        self.kv_cache: tuple[Tensor, ...] = ()
        vllm_config.compilation_config.static_forward_context[prefix] = self
        for name, parameter in self.named_parameters():
            set_weight_attrs(parameter, {"weight_loader": _loader(name)})

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[KDABackend]:
        return KDABackend

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shapes(self.config)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.vllm_config)

    def forward(  # type: ignore[override]
        self, x: Tensor, *, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]; without metadata (vLLM measures memory) as one new request."""
        known = get_forward_context().attn_metadata
        if known is None:
            nothing = torch.zeros(1, dtype=torch.long, device=x.device)
            metadata = KDAMetadata.of(torch.tensor([0, len(x)]), 0, nothing, nothing == 0, self.conv_size - 1)
            kinds = zip(self.get_state_shape(), self.get_state_dtype(), strict=True)
            inputs, states = (x.new_zeros(1, *shape, dtype=dtype) for shape, dtype in kinds)
        else:
            metadata, (inputs, states) = known[self.prefix], self.kv_cache
        count = len(metadata.tokens)
        out = torch.zeros_like(x)  # behind the requests' tokens there may be padding
        rotation = None if position_embeddings is None else tuple(part[:, :count] for part in position_embeddings)
        out[:count] = self._mix(x[:count], metadata, inputs, states, rotation)
        return out

    def _mix(
        self, x: Tensor, metadata: KDAMetadata, inputs: Tensor, states: Tensor, rotation: tuple[Tensor, ...] | None
    ) -> Tensor:
        """``inputs`` [blocks, taps - 1, channels] and ``states`` [blocks, H, K, V] are read and written."""
        streams = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        g, beta = self.f_b_proj(self.f_a_proj(x)), self.b_proj(x)
        q, k, v = self._convolve_batch(streams, metadata, inputs)
        # [1, tokens, heads, head dim]
        q, k, v, g = (s.unflatten(-1, (-1, self.head_dim))[None] for s in (q, k, v, g))
        if rotation is not None:
            q, k = apply_rotary_pos_emb(q, k, *rotation, unsqueeze_dim=2)
        o = self._recur_batch((q, k, v, g, beta[None]), metadata, states)[0]
        y = self.o_proj(self._norm(o, x))
        return tensor_model_parallel_all_reduce(y) if self.ranks > 1 else y

    def _convolve_batch(self, streams: list[Tensor], metadata: KDAMetadata, inputs: Tensor) -> list[Tensor]:
        """q, k, v [tokens, channels]: one convolution over a row in which each request follows its earlier inputs."""
        x = torch.cat(streams, -1)
        earlier = inputs[metadata.blocks].to(x.dtype).masked_fill(metadata.fresh[:, None, None], 0)
        row = x.new_empty(len(x) + metadata.before.numel(), x.shape[-1])
        row[metadata.tokens] = x
        row[metadata.before] = earlier
        inputs[metadata.blocks] = row[metadata.after].to(inputs.dtype)
        conv = short_conv
        if self._fused(x):
            from models.kda.kernels.mixer import triton_conv as conv
        y = conv(row[None], torch.cat([self.q_conv, self.k_conv, self.v_conv]))[0]
        return list(y[metadata.tokens].split([s.shape[-1] for s in streams], -1))

    def _recur_batch(self, parts: tuple[Tensor, ...], metadata: KDAMetadata, states: Tensor) -> Tensor:
        """``parts``: q, k, v, g, beta [1, tokens, ...]; o [1, tokens, H, V]. Requests with one token come first."""
        gates = (self.A_log, self.dt_bias)
        options: dict[str, Any] = {"gate": self.config.kda_gate, "lower_bound": self.config.kda_lower_bound}
        options["impl"] = self.impl
        state = states[metadata.blocks].float().masked_fill(metadata.fresh[:, None, None, None], 0)
        d, outputs = metadata.decodes, []
        if d:
            q, k, v, g, beta = (x[0, :d] for x in parts)
            outputs.append(kda_step(q, k, v, g, beta, *gates, state[:d], **options)[None])
        if d < len(state):
            q, k, v, g, beta = (x[:, d:] for x in parts)
            options |= {"initial_state": state[d:], "cu_seqlens": metadata.starts[d:] - d}
            o, state[d:] = kda(q, k, v, g, beta, *gates, output_final_state=True, **options)
            outputs.append(o)
        states[metadata.blocks] = state.to(states.dtype)
        return torch.cat(outputs, 1)


def split_config(config: HybridKDAConfig, ranks: int) -> HybridKDAConfig:
    """The configuration of the heads that one of ``ranks`` tensor-parallel ranks has."""
    own = copy.copy(config)
    for name in ("kda_heads", "kda_kv_heads"):
        number = getattr(config, name)
        if number % ranks:
            raise ValueError(f"tensor_parallel_size is {ranks}: expected a divisor of {name} ({number})")
        setattr(own, name, number // ranks)
    return own


def state_shapes(config: HybridKDAConfig) -> tuple[tuple[int, ...], ...]:
    """Of the convolution's last inputs and of the recurrent state, for one request in one layer."""
    assert config.kda_heads and config.kda_kv_heads and config.kda_head_dim
    channels = (config.kda_heads + 2 * config.kda_kv_heads) * config.kda_head_dim
    return (
        (config.kda_conv_size - 1, channels),
        (config.kda_heads, config.kda_head_dim, config.kda_head_dim),
    )


def state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
    cache = vllm_config.cache_config
    dtypes: tuple[torch.dtype, ...] = MambaStateDtypeCalculator.kda_state_dtype(
        vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
    )
    return dtypes


def _loader(name: str) -> Callable[[Tensor, Tensor], None]:
    """Copies a rank's own heads of the checkpoint's tensor ``name``."""

    def load(parameter: Tensor, loaded: Tensor) -> None:
        rank = get_tensor_model_parallel_rank()
        if name == "o_proj.bias":  # added once to the ranks' sum
            loaded = loaded if rank == 0 else torch.zeros_like(loaded)
        elif name not in ("f_a_proj.weight", "g_a_proj.weight"):
            axis = 1 if name == "o_proj.weight" else 0
            size = parameter.shape[axis]
            loaded = loaded.narrow(axis, rank * size, size)
        assert parameter.shape == loaded.shape, f"{name} has shape {tuple(loaded.shape)}"
        parameter.data.copy_(loaded)

    return load
