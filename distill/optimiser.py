"""Float32 masters of the trained parameters, AdamW on them, and the learning rate's schedule.

The model computes in its own dtype (bfloat16 on a GPU). Gradients of micro-batches and of all processes are added in
float32, in one flat buffer that is reduced once a step: data parallelism as torch's DDP does it, which would reduce
bfloat16 gradients in bfloat16 and needs every parameter in every forward pass.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.groups import decays, is_mixer
from distill.parallel import Processes
from distill.stage import Stage


def schedule(stage: Stage, step: int, steps: int) -> float:
    """Factor on the peak learning rate at ``step`` (from 0) of ``steps``."""
    warm = round(stage.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if stage.schedule == "constant":
        return 1.0
    if stage.schedule == "cosine":
        done = (step - warm) / max(steps - warm, 1)
        return stage.final_lr + (1 - stage.final_lr) * (1 + math.cos(math.pi * done)) / 2
    last = max(round(stage.decay * steps), 1)
    left = (steps - step) / last
    return 1.0 if left >= 1 else stage.final_lr + (1 - stage.final_lr) * left


class Masters:
    """Master weights of ``parameters`` (name -> parameter), their gradients, and the optimiser's state."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], stage: Stage, mixers: Sequence[int]) -> None:
        self.parameters = list(parameters.values())
        self.stage = stage
        device = self.parameters[0].device
        size = sum(p.numel() for p in self.parameters)
        self.weights = torch.empty(size, dtype=torch.float32, device=device)
        self.gradients = torch.zeros_like(self.weights)
        self._masters = self._views(self.weights)
        self._gradients = self._views(self.gradients)
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for (name, parameter), master, gradient in zip(parameters.items(), self._masters, self._gradients, strict=True):
            with torch.no_grad():
                master.copy_(parameter)
            leaf = nn.Parameter(master)
            leaf.grad = gradient
            groups.setdefault((is_mixer(name, mixers), decays(name, parameter)), []).append(leaf)
        rest = stage.lr if stage.lr_rest is None else stage.lr_rest
        self.adamw = torch.optim.AdamW(
            [
                {"params": leaves, "peak": stage.lr if mixer else rest, "weight_decay": stage.weight_decay * decayed}
                for (mixer, decayed), leaves in sorted(groups.items())
            ],
            lr=stage.lr,
            betas=stage.betas,
            eps=1e-8,
            fused=device.type == "cuda",
        )

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def collect(self, first: bool) -> None:
        """Add the parameters' gradients to the masters' (``first``: of the step, so they are replaced), and drop them."""
        if first:
            self.gradients.zero_()
        there = [(g, p.grad) for g, p in zip(self._gradients, self.parameters, strict=True) if p.grad is not None]
        if first:
            torch._foreach_copy_([g for g, _ in there], [grad for _, grad in there])
        else:
            torch._foreach_add_([g for g, _ in there], [grad.float() for _, grad in there])
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, step: int, steps: int, processes: Processes) -> Tensor:
        """One optimiser step; the gradient's norm before clipping (0-dim, on the device)."""
        processes.sum(self.gradients)
        norm = self.gradients.norm()
        self.gradients.mul_((self.stage.clip / (norm + 1e-6)).clamp(max=1.0))
        factor = schedule(self.stage, step, steps)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * factor
        self.adamw.step()
        self.publish()
        return norm

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def publish(self) -> None:
        """The model's parameters become the masters, rounded to the model's dtype."""
        torch._foreach_copy_(self.parameters, self._masters)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "adamw": self.adamw.state_dict()}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights.copy_(state["weights"])
        self.adamw.load_state_dict(state["adamw"])
        self.publish()
