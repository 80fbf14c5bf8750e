"""HybridKDAForCausalLM: a Llama, Qwen2 or Qwen3 in which some layers' attention is Kimi Delta Attention.

A kept layer is the teacher's own decoder layer, a KDA layer has the teacher's norms and MLP around the mixer of
models/kda/layer.py; with every layer kept the model is its teacher bit for bit. Importing this file registers the
model with AutoConfig and AutoModelForCausalLM.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from models.hybrid_config import LINEAR, HybridKDAConfig
from models.kda.api import IMPLS, Impl
from models.kda.layer import KimiDeltaAttention, Packed
from models.remote import write_remote_file

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""transformers' name for the cache in its functions and outputs: past_key_values in 5.17, cache in 5.24."""


def _family(module: Any, name: str) -> dict[str, Any]:
    parts = ("DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
    return {part: getattr(module, name + part) for part in parts}


FAMILIES = {
    "llama": _family(modeling_llama, "Llama"),
    "qwen2": _family(modeling_qwen2, "Qwen2"),
    "qwen3": _family(modeling_qwen3, "Qwen3"),
}


class KDADecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """The teacher's decoder layer with KDA in the place of attention."""

    def __init__(self, config: HybridKDAConfig, layer_idx: int) -> None:
        super().__init__()
        family = FAMILIES[config.teacher_type]
        self.kda = KimiDeltaAttention(config, layer_idx)
        self.mlp = family["MLP"](config)
        self.input_layernorm = family["RMSNorm"](config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = family["RMSNorm"](config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed: Packed | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        hidden_states = hidden_states + self.kda(
            self.input_layernorm(hidden_states),
            mask=attention_mask,
            packed=packed,
            cache=kwargs.get(CACHE),
            position_embeddings=position_embeddings,
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HybridKDAPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    config_class = HybridKDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KDADecoderLayer", *(family["DecoderLayer"].__name__ for family in FAMILIES.values())]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _is_stateful = True
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "o_norm"]
    _can_record_outputs = {
        "hidden_states": GradientCheckpointingLayer,
        "attentions": [family["Attention"] for family in FAMILIES.values()],
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KimiDeltaAttention):
            module.reset_parameters()

    def set_kda_impl(self, impl: Impl | None) -> None:
        """Force one implementation of KDA in every layer; None goes by the tensors' device again."""
        if impl is not None and impl not in IMPLS:
            raise ValueError(f"impl is {impl!r}: expected one of {', '.join(IMPLS)}, or None to go by the device")
        for module in self.modules():
            if isinstance(module, KimiDeltaAttention):
                module.impl = impl


class HybridKDAModel(HybridKDAPreTrainedModel):
    """Embedding, layers, last norm."""

    def __init__(self, config: HybridKDAConfig) -> None:
        super().__init__(config)
        assert config.layer_types is not None
        family = FAMILIES[config.teacher_type]
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            (KDADecoderLayer if kind == LINEAR else family["DecoderLayer"])(config, i)
            for i, kind in enumerate(config.layer_types)
        )
        self.norm = family["RMSNorm"](config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = family["RotaryEmbedding"](config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the teacher's forward; ``cache`` and ``past_key_values`` are one thing under two names.

        Packed documents, told by ``cu_seqlens`` [documents + 1] (places in the batch read as one long row; every row
        begins a document) or by positions that begin anew where neither mask nor cache is given, see nothing of each
        other; no cache is made of them. Beside ``cu_seqlens`` a mask a kind of layer may be given, as `generate` does.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds: expected exactly one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache
        position_ids, packed = _unpack(inputs_embeds, attention_mask, position_ids, cache, cu_seqlens)
        if packed is not None:
            use_cache = False
            attention_mask = attention_mask if isinstance(attention_mask, dict) else None
        if not self.config.kept_layers:
            if cache is not None:
                raise ValueError(
                    "a cache was given, but no layer keeps attention, where transformers counts the tokens: pass none"
                )
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = _seen(cache)
            position_ids = torch.arange(seen, seen + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        masks = self._masks(inputs_embeds, attention_mask, position_ids, cache)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for kind, layer in zip(self.config.layer_types, self.layers, strict=True):
            own = {"packed": packed} if kind == LINEAR else kwargs
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **{CACHE: cache},
                **own,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE: cache if use_cache else None}
        )

    def _masks(
        self, inputs_embeds: Tensor, attention_mask: Any, position_ids: Tensor, cache: Any
    ) -> dict[str, Tensor | None]:
        """One mask a kind of layer; `generate` may have made them already."""
        if isinstance(attention_mask, dict):
            return attention_mask
        if attention_mask is not None and attention_mask.ndim != 2 and self.config.kda_layers:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: "
                f"expected [batch, tokens], since KDA layers can't follow any other mask"
            )
        makers = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
            LINEAR: create_recurrent_attention_mask,
        }
        inputs = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: cache,
        }
        return {kind: makers[kind](**inputs) for kind in set(self.config.layer_types)}


class HybridKDAForCausalLM(HybridKDAPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The student: `HybridKDAModel` and the output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridKDAConfig) -> None:
        super().__init__(config)
        self.model = HybridKDAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the teacher's forward; ``cu_seqlens`` as in `HybridKDAModel.forward`."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Without any kept layer it runs without a cache, whose tokens are counted in such layers."""
        if not self.config.kept_layers:
            kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As transformers', with the file that loads the folder where evalkit is not installed (trust_remote_code)."""
        # Before transformers' part: that may already upload the folder.
        if kwargs.get("is_main_process", True) and not Path(save_directory).is_file():
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_remote_file(save_directory)
        super().save_pretrained(save_directory, **kwargs)


def _seen(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _unpack(
    x: Tensor, attention_mask: Any, position_ids: Tensor | None, cache: Any, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, Packed | None]:
    """(position_ids, where the documents of a packed input lie, None if it isn't packed); x is [B, T, hidden]."""
    if cu_seqlens is not None:
        plain = attention_mask is not None and not isinstance(attention_mask, dict)
        if plain and not bool(torch.as_tensor(attention_mask).all()):
            raise ValueError("attention_mask has padding: expected none beside cu_seqlens, which packs without any")
        if cache is not None:
            raise ValueError("a cache was given beside cu_seqlens: packed documents can't go on from one")
        starts = _document_starts(cu_seqlens, *x.shape[:2])
        # A batch of rows comes from a packer, which knows; comparing would make the GPU wait.
        if x.shape[0] == 1 and position_ids is not None and (found := _boundaries(position_ids, 1)) != starts:
            raise ValueError(
                f"position_ids begin anew at {found[:-1]}: expected the starts of cu_seqlens {starts[:-1]}"
            )
    elif (
        position_ids is not None
        and attention_mask is None
        and cache is None
        and find_packed_sequence_indices(position_ids) is not None
    ):
        starts = _boundaries(position_ids, x.shape[0])
    else:
        return position_ids, None
    begins = torch.tensor(starts)
    position = torch.arange(starts[-1]) - begins[:-1].repeat_interleave(begins.diff())
    packed = Packed(begins, position[None].to(x.device, non_blocking=True))
    return packed.position.view(x.shape[:2]) if position_ids is None else position_ids, packed


def _document_starts(cu_seqlens: Tensor, B: int, T: int) -> list[int]:
    if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}: "
            f"expected [documents + 1] integers"
        )
    starts: list[int] = cu_seqlens.tolist()
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != B * T or starts != sorted(starts):
        raise ValueError(f"cu_seqlens is {starts}: expected to begin with 0, never to fall, and to end at {B * T}")
    unique = sorted(set(starts))
    if absent := set(range(0, B * T, max(T, 1))) - set(unique):
        raise ValueError(f"cu_seqlens has no document that begins at {min(absent)}, where a row of {T} tokens does")
    return unique


def _boundaries(position_ids: Tensor, B: int) -> list[int]:
    """Where positions begin anew in the long row [batch * tokens], and its end; every row begins anew."""
    position_ids = position_ids.expand(B, -1)
    anew = torch.ones_like(position_ids, dtype=torch.bool)
    anew[:, 1:] = position_ids.diff(dim=-1) != 1
    return [*anew.flatten().nonzero()[:, 0].tolist(), position_ids.numel()]


AutoConfig.register(HybridKDAConfig.model_type, HybridKDAConfig)
AutoModelForCausalLM.register(HybridKDAConfig, HybridKDAForCausalLM)
