"""Tiny GGUF files, and the models that they hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import tiny_qwen3, tiny_tokenizer

BLOCKS = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,))}
"""Types that the package gguf reads only: bytes of a block of 256 weights, and where its float16 scales stand."""


def qwen3(vocab_size: int) -> Any:
    """Wide enough for blocks of 256 weights; its head is its embeddings."""
    return tiny_qwen3(
        vocab_size,
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def packed(weight: np.ndarray, kind: str) -> np.ndarray:
    """``weight`` in the blocks of ``kind``; types that gguf can't write get random bytes with small scales."""
    import gguf

    if kind not in BLOCKS:
        return gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
    size, scales = BLOCKS[kind]
    rng = np.random.default_rng(weight.size)
    blocks = rng.integers(0, 256, (weight.shape[0], weight.shape[1] // 256, size), dtype=np.uint8)
    for at in scales:
        blocks[..., at : at + 2] = np.frombuffer(np.float16(1e-4).tobytes(), dtype=np.uint8)
    return blocks.reshape(weight.shape[0], -1)


def write_gguf(
    file: Path, kind: str, *, architecture: str = "qwen3", tokenizer: bool = True, parts: int = 1
) -> dict[str, np.ndarray]:
    """A model whose matrices are of the type ``kind``; returns the packed matrices by their name in transformers.

    parts: how many files the model claims to be split over.
    """
    import gguf

    words = tiny_tokenizer()
    model = qwen3(len(words))
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_uint16("split.count", parts)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if tokenizer:
        vocabulary = words.convert_ids_to_tokens(range(len(words)))
        special = set(words.all_special_ids)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(vocabulary)
        writer.add_token_types([3 if i in special else 1 for i in range(len(words))])
        writer.add_token_merges([" ".join(pair) for pair in _merges(words)])
        writer.add_bos_token_id(words.bos_token_id)
        writer.add_eos_token_id(words.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    matrices = {}
    for name, weight in model.named_parameters():
        values = weight.detach().numpy()
        stored = names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 1:
            writer.add_tensor(stored, values)
        else:
            matrices[name] = packed(values, kind)
            writer.add_tensor(stored, matrices[name], raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return matrices


def _merges(tokenizer: Any) -> list[tuple[str, str]]:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
