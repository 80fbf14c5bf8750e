"""Fused forward and backward passes for training on a GPU: MLPs and norms through torch.compile, shapes fixed.

Eager, they are a quarter of a step's kernels and much of its memory traffic (distill/README.md has the figures). What
is compiled belongs to the instances given, within the block only; evaluation inside runs eagerly (`eager`).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

import torch

from models.hybrid import FAMILIES

FUSED = tuple({family[part] for family in FAMILIES.values() for part in ("MLP", "RMSNorm")})


@contextmanager
def compiled(*models: Any, wanted: bool = True, backend: str = "inductor") -> Iterator[None]:
    """Within the block the MLPs and norms of ``models`` are compiled, one graph a class; wanted=False: nothing is.

    backend: torch.compile's; "aot_eager" traces forward and backward alike and generates no code.
    """
    if not wanted:
        yield
        return
    torch.compiler.reset()  # a stage before this one had other shapes, and only so many are kept of one function
    forwards = {kind: torch.compile(kind.forward, dynamic=False, backend=backend) for kind in FUSED}
    changed = []
    for model in models:
        for module in model.modules():
            if type(module) in forwards and "forward" not in vars(module):
                module.forward = MethodType(forwards[type(module)], module)
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def eager() -> AbstractContextManager[Any]:
    """Within the block compiled parts run as they are written: for shapes that change from call to call."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
