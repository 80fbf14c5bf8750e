"""Tiny teachers of the three families and tiny hybrids of them, random enough that every part matters."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from models.hybrid import HybridKDAForCausalLM
from models.hybrid_config import TEACHER_CONFIGS, HybridKDAConfig

VOCAB = 61
FAMILIES = tuple(TEACHER_CONFIGS)
CLOSE = 2e-5
"""What another order of sums may change of logits of size 1 in float32, or in float64 around the float32 norms."""


def tiny_teacher(family: str, **options: Any) -> Any:
    """Three layers, 4 query and 2 key/value heads of 8; norms and biases random too."""
    torch.manual_seed(0)
    config = TEACHER_CONFIGS[family](
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "tie_word_embeddings": family == "qwen3",
            **options,
        }
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def tiny_hybrid(teacher: Any, keep: Iterable[int] = (1,), **options: Any) -> Any:
    """The teacher with KDA in all layers but ``keep``; convolutions, gates and decays random, not as they start."""
    config = HybridKDAConfig.from_teacher(teacher.config, keep, **options)
    config._attn_implementation = teacher.config._attn_implementation
    torch.manual_seed(1)
    model = HybridKDAForCausalLM(config).eval().to(teacher.dtype)
    own = model.state_dict()
    copied = {name: tensor for name, tensor in teacher.state_dict().items() if name in own}
    model.load_state_dict(copied, strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".kda." in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def tokens(*lengths: int, seed: int = 2) -> Any:
    """[1, n] random ids a length, none of them special; a single tensor for a single length."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, VOCAB, (1, n), generator=generator) for n in lengths]
    return rows[0] if len(rows) == 1 else rows


def padded(rows: Iterable[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of one batch; the pads are a word that means something, so that a leak shows."""
    rows = [row[0] for row in rows]
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for r, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[r, start : start + len(row)] = row
        mask[r, start : start + len(row)] = 1
    return ids, mask
