"""HybridKDAForCausalLM in vLLM: its decoder layers where attention is kept, ours (models/vllm_kda.py) elsewhere.

Runs eagerly. Weights are read by the names of the transformers model (models/hybrid.py).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaMLP
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from models.hybrid import FAMILIES
from models.hybrid_config import LINEAR, HybridKDAConfig
from models.vllm_kda import VLLMKimiDeltaAttention, split_config, state_dtypes, state_shapes


class KDADecoderLayer(nn.Module):  # type: ignore[misc]
    """The teacher's decoder layer with KDA in the place of attention."""

    def __init__(self, config: HybridKDAConfig, layer_idx: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.kda = VLLMKimiDeltaAttention(config, layer_idx, vllm_config, f"{prefix}.kda")
        self.mlp = LlamaMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=vllm_config.quant_config,
            bias=getattr(config, "mlp_bias", False),
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, hidden_states = hidden_states, self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.kda(hidden_states, position_embeddings=position_embeddings)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class HybridKDAModel(nn.Module):  # type: ignore[misc]
    """Embedding, layers, last norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: HybridKDAConfig = vllm_config.model_config.hf_config
        self.kinds = list(config.layer_types or ())
        if other := set(self.kinds) - {LINEAR, "full_attention"}:
            raise ValueError(f"vLLM runs hybrids with full attention in kept layers, this one has {other.pop()!r}")
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            KDADecoderLayer(config, i, vllm_config, f"{prefix}.layers.{i}")
            if kind == LINEAR
            else _kept_layer(config, vllm_config, f"{prefix}.layers.{i}")
            for i, kind in enumerate(self.kinds)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = FAMILIES[config.teacher_type]["RotaryEmbedding"](config) if config.kda_rope else None

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotation = None if self.rotary_emb is None else self.rotary_emb(hidden_states[None], positions[None])
        residual = None
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            if kind == LINEAR:
                hidden_states, residual = layer(hidden_states, residual, rotation)
            else:
                hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class HybridKDAForCausalLM(nn.Module, HasInnerState, IsHybrid):  # type: ignore[misc]
    """The student: `HybridKDAModel` and the output head."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            **{f".self_attn.{part}_proj": (".self_attn.qkv_proj", part) for part in "qkv"},
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: HybridKDAConfig = vllm_config.model_config.hf_config
        self.model = HybridKDAModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        ranks = vllm_config.parallel_config.tensor_parallel_size
        return state_shapes(split_config(vllm_config.model_config.hf_config, ranks))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return MambaStateCopyFuncCalculator.kda_state_copy_func()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded


def _kept_layer(config: HybridKDAConfig, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    if config.teacher_type == "llama":
        return LlamaDecoderLayer(vllm_config, prefix, config)
    kind = Qwen2DecoderLayer if config.teacher_type == "qwen2" else Qwen3DecoderLayer
    return kind(config, vllm_config.cache_config, vllm_config.quant_config, prefix)
