"""Which parameters a stage trains: groups by name; the proof that the others stay; who gets which learning rate.

A hybrid's KDA layers are its mixers, and so are the layers whose softmax attention the control model starts anew (its
config lists them as ``evalkit_mixers``). ``attention`` is the attention of all other layers, Qwen3's q_norm and k_norm
included. A LoRA factor belongs to ``lora`` alone, the weight it adapts to the groups it had before.
"""

import hashlib
import re
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.stage import GROUPS

FRESH = "evalkit_mixers"
"""Field of a control's config: its layers whose attention was initialised anew."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(kda|self_attn)\.(\w+)")
_KDA = {
    **{f"{one}_proj": one for one in "qkvo"},
    **{f"{one}_conv": "conv" for one in "qkv"},
    **dict.fromkeys(("f_a_proj", "f_b_proj", "b_proj", "A_log", "dt_bias"), "gates"),
    **dict.fromkeys(("g_a_proj", "g_b_proj"), "output_gate"),
    "o_norm": "o_norm",
}
_CONVS = ("q_conv", "k_conv", "v_conv")
_VECTORS = ("A_log", "dt_bias", "o_norm")
"""Of a KDA layer: two of them have two dimensions, none is a matrix that multiplies."""


def mixer_layers(model: Any) -> frozenset[int]:
    """The layers (from 0) whose mixer is new: KDA, or a control's fresh attention."""
    config = model.config
    return frozenset(getattr(config, "kda_layers", None) or getattr(config, FRESH, None) or ())


def group_of(name: str, mixers: Container[int] = ()) -> frozenset[str]:
    """Every group of the parameter ``name``; ``mixers`` are the layers whose softmax attention is fresh.

    By its name alone: a head that is tied to the embeddings is one tensor, which `trained` looks after.
    """
    if _lora(name):
        return frozenset({"lora"})
    groups = {"all"}
    if found := _LAYER.search(name):
        if is_mixer(name, mixers):
            part = found[3] if found[2] == "kda" else found[3].replace("_norm", "_proj")
            groups |= {"mixer"} | ({_KDA[part]} if part in _KDA else set())
        else:
            groups.add("attention")
    elif ".mlp." in name:
        groups.add("mlp")
    elif "embed_tokens." in name:
        groups.add("embeddings")
    elif "lm_head." in name:
        groups.add("head")
    elif re.search(r"(layernorm|(^|\.)norm)\.", name):
        groups.add("norms")
    return frozenset(groups)


def is_mixer(name: str, mixers: Container[int] = ()) -> bool:
    """Whether the parameter takes Stage.lr (a LoRA factor: as the weight it adapts); all others take lr_rest."""
    found = _LAYER.search(name)
    return found is not None and (found[2] == "kda" or int(found[1]) in mixers)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices that multiply, LoRA's factors and an untied head among them.

    Not to norms, biases, convolutions, A_log and dt_bias; nor to embeddings, whose rows of words that the data lacks
    would only shrink (and a tied head is one tensor with them).
    """
    parts = name.split(".")
    return multiplies(name, parameter) and "embed_tokens" not in parts and not set(parts) & set(_CONVS)


def multiplies(name: str, parameter: Tensor) -> bool:
    """Whether a token costs a multiplication and an addition an element of the parameter (embeddings aside)."""
    return parameter.ndim == 2 and not set(name.split(".")) & set(_VECTORS)


def trained(model: Any, groups: Sequence[str], mixers: Container[int] | None = None) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that belong to one of ``groups``, in the model's order; nothing is set.

    mixers: by default `mixer_layers`. Where the head is tied to the embeddings, their one tensor is trained if both
    are named, or "all". ValueError for no such group, and for one that holds no parameter of this model.
    """
    if unknown := [group for group in groups if group not in GROUPS]:
        raise ValueError(f"train names {unknown[0]!r}: expected groups of {', '.join(GROUPS)}")
    where = mixer_layers(model) if mixers is None else mixers
    members = {name: _groups(model, name, where) for name, _ in model.named_parameters()}
    there = frozenset().union(*members.values())
    asked, tied = set(groups), _tied(model)
    for group in groups:
        if tied and group in ("head", "embeddings") and not asked >= {"head", "embeddings"} and "all" not in asked:
            raise ValueError(f"train names {group!r}, but this model's head and embeddings are one tensor: name both")
        if group not in there:
            listed = ", ".join(one for one in GROUPS if one in there)
            raise ValueError(f"train names {group!r}, which holds no parameter of this model: it has {listed}")
    return {name: one for name, one in model.named_parameters() if members[name] & asked}


def freeze(model: Any, groups: Sequence[str], mixers: Container[int] | None = None) -> dict[str, nn.Parameter]:
    """`trained`, after requires_grad is set for exactly those."""
    chosen = trained(model, groups, mixers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return chosen


def frozen_hashes(model: Any, trained_names: Collection[str]) -> dict[str, str]:
    """Name -> SHA-256 of the bytes of every other tensor of the state dict; a tied one under its first name.

    A tensor spread over processes (DTensor): of this process's part.
    """
    hashes: dict[str, str] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if name not in trained_names:
            hashes[name] = _sha256(tensor)
    return hashes


def check_frozen(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """ValueError naming what differs between two results of `frozen_hashes` for the same model and names."""
    if changed := [name for name in {**before, **after} if before.get(name) != after.get(name)]:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"{len(changed)} of {len(before)} frozen tensors changed while training ({', '.join(changed[:3])}{more}): "
            f"name their groups in the stage's train, or find what writes to them"
        )


def _lora(name: str) -> bool:
    return ".lora_" in name


def _groups(model: Any, name: str, mixers: Container[int]) -> frozenset[str]:
    groups = group_of(name, mixers)
    return groups | {"head"} if "embeddings" in groups and _tied(model) else groups


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _sha256(tensor: Tensor) -> str:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    raw = local.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data if raw.numel() else b"").hexdigest()
