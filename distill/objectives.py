"""A stage's loss on a batch, and its gradient: what the teacher shows, what the student makes of it.

Alignment losses look at one mixer at a time, each given the teacher's own hidden states, so that no layer answers for
another; losses on the next token run teacher and student whole, up to the hidden states before the output head.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from distill.chunked import chunked_loss
from distill.losses import hidden_alignment, qk_alignment
from distill.packing import Batch
from distill.stage import ALIGNMENTS, Stage
from models.convert import hooked
from models.hybrid_config import LINEAR
from models.kda.layer import Packed

FULL = "full_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A batch on the device, with what attention and KDA need to know of its documents."""

    tokens: Tensor
    """[B, T] int64"""
    position: Tensor
    """[B, T] int64"""
    rows: Tensor
    """[N] int64: places in the long row B * T whose loss counts."""
    targets: Tensor
    """[N] int64: the token that follows at each of them."""
    weights: Tensor
    """[N] float32"""
    starts: Tensor
    """[documents + 1], on the CPU."""
    mask: Tensor
    """[B, 1, T, T] bool: who attends to whom."""

    @property
    def packed(self) -> Packed:
        return Packed(self.starts, self.position.view(1, -1))


def place(batch: Batch, device: torch.device) -> Placed:
    """Move ``batch``; which rows count is found on the CPU, so that the GPU needn't wait."""
    flat = batch.tokens.flatten()
    rows = batch.weights.flatten().nonzero()[:, 0]
    B, T = batch.tokens.shape
    sizes = batch.starts.diff()
    document = torch.arange(len(sizes)).repeat_interleave(sizes).view(B, T)

    def there(x: Tensor) -> Tensor:
        return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

    document = there(document)
    order = torch.arange(T, device=device)
    return Placed(
        tokens=there(batch.tokens),
        position=there(batch.position),
        rows=there(rows),
        targets=there(flat[(rows + 1).clamp(max=len(flat) - 1)]),
        weights=there(batch.weights.flatten()[rows]),
        starts=batch.starts,
        mask=((document[:, :, None] == document[:, None, :]) & (order[:, None] >= order))[:, None],
    )


def last_hidden(model: Any, batch: Placed) -> Tensor:
    """[B, T, hidden] before the output head, documents apart."""
    kinds = set(getattr(model.config, "layer_types", None) or [FULL])
    hybrid = LINEAR in kinds
    ours: dict[str, Any] = {"position_ids": batch.position, "use_cache": False}
    if hybrid:
        ours["cu_seqlens"] = batch.starts
    # One mask for all layers and both models; other kinds of attention make theirs from the positions.
    if model.config._attn_implementation == "sdpa" and kinds <= {FULL, LINEAR}:
        ours["attention_mask"] = {FULL: batch.mask, LINEAR: None} if hybrid else batch.mask
    hidden: Tensor = model.model(input_ids=batch.tokens, **ours).last_hidden_state
    return hidden


class Objective:
    """``stage``'s loss. Called, it gives the sum over the batch of weight x loss (0-dim float32, on the device).

    teacher: None only for cross-entropy. mixers: the layers whose mixer replaces the teacher's attention.
    """

    def __init__(self, stage: Stage, teacher: Any, student: Any, mixers: Sequence[int]) -> None:
        self.stage, self.teacher, self.student, self.mixers = stage, teacher, student, list(mixers)
        assert teacher is not None or stage.loss == "ce"

    def __call__(self, batch: Placed, scale: float = 1.0) -> Tensor:
        """Where gradients are on, those of ``scale`` x the sum are added to the student's parameters."""
        if self.stage.loss in ALIGNMENTS:
            return self._aligned(batch, scale)
        hidden = self._gathered(self.student, batch)
        shown = {} if self.stage.loss == "ce" else self._shown(batch)
        total = chunked_loss(
            self.stage.loss,
            hidden,
            self.student.get_output_embeddings().weight,
            shown.get("hidden"),
            shown.get("head"),
            batch.targets,
            batch.weights,
            temperature=self.stage.temperature,
            alpha=self.stage.alpha,
            beta=self.stage.beta,
            k=self.stage.k,
            rows=torch.arange(len(batch.rows)),  # all of them: the others were left out on the CPU
        )
        if torch.is_grad_enabled():
            (total * scale).backward()
        return total.detach()

    def _gathered(self, model: Any, batch: Placed) -> Tensor:
        return last_hidden(model, batch).flatten(0, 1).index_select(0, batch.rows)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _shown(self, batch: Placed) -> dict[str, Tensor]:
        return {
            "hidden": self._gathered(self.teacher, batch),
            "head": self.teacher.get_output_embeddings().weight,
        }

    def _aligned(self, batch: Placed, scale: float) -> Tensor:
        """The mean over layers; each layer's graph is gone before the next one's is made."""
        total = torch.zeros((), device=batch.weights.device)
        with torch.no_grad():
            seen = self._watch(batch)
        share = 1 / len(self.mixers)
        for layer in self.mixers:
            loss = self._layer(layer, seen.pop(layer), batch).flatten()[batch.rows]
            part = (loss * batch.weights).sum() * share
            if torch.is_grad_enabled():
                (part * scale).backward()
            total += part.detach()
        return total

    def _layer(self, layer: int, seen: dict[str, Any], batch: Placed) -> Tensor:
        """[B, T]: the loss of one mixer, given what the teacher's attention was given."""
        x, turns = seen["x"], seen["position_embeddings"]
        attention = self.teacher.model.layers[layer].self_attn
        ours = self.student.model.layers[layer]
        if self.stage.loss == "align-qk":
            with torch.no_grad():
                wanted = rotated_queries_keys(attention, x, turns)
            if hasattr(ours, "kda"):
                given = ours.kda.queries_keys(x, batch.packed, turns)
            else:
                given = rotated_queries_keys(ours.self_attn, x, turns)
            q, k = (qk_alignment(one, goal).mean(-1) for one, goal in zip(given, wanted, strict=True))
            return (q + k) / 2
        if hasattr(ours, "kda"):
            output = ours.kda(x, packed=batch.packed, position_embeddings=turns)
        else:
            # The teacher's own mask, in the form that its kind of attention takes.
            output = ours.self_attn(
                hidden_states=x,
                position_embeddings=turns,
                attention_mask=seen["attention_mask"],
                position_ids=batch.position,
            )[0]
        return hidden_alignment(output, seen["output"])

    def _watch(self, batch: Placed) -> dict[int, dict[str, Any]]:
        """What each replaced attention layer of the teacher was given, and made of it."""
        found: dict[int, dict[str, Any]] = {layer: {} for layer in self.mixers}
        with ExitStack() as hooks:
            for layer in self.mixers:
                attention = self.teacher.model.layers[layer].self_attn
                hooks.enter_context(hooked(attention.register_forward_hook(_keep(found[layer]), with_kwargs=True)))
            last_hidden(self.teacher, batch)
        return found


def rotated_queries_keys(attention: Any, x: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """q [B, T, H, K] and k [B, T, HK, K] of x [B, T, hidden], as softmax attention compares them."""
    q, k = (getattr(attention, f"{one}_proj")(x).unflatten(-1, (-1, attention.head_dim)) for one in ("q", "k"))
    if hasattr(attention, "q_norm"):  # Qwen3
        q, k = attention.q_norm(q), attention.k_norm(k)
    turned: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, *turns, unsqueeze_dim=2)
    return turned


def _keep(found: dict[str, Any]) -> Callable[..., None]:
    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: tuple[Tensor, Any]) -> None:
        shared = {name: kwargs[name] for name in ("position_embeddings", "attention_mask")}
        found.update(shared, x=kwargs["hidden_states"], output=output[0])

    return hook
