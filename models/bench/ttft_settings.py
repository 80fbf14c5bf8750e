"""What `evalkit bench ttft` is asked to measure, checked and completed for the device at hand."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from models.bench.arguments import check_device, check_dtype, check_impls, check_names, check_positive
from models.bench.shapes import SHAPES, Pair, config_from_file, config_of_model, named_shape, pair
from models.bench.sides import BACKENDS
from models.kda.api import GATES


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """An empty tuple, None or 0 leaves the choice to the device."""

    model: str | None = None
    """A hub id, folder or built-in model whose shapes are taken (a hybrid's folder, too); its weights are not."""
    shapes: tuple[str, ...] = ()
    """Built-in shapes. Without ``model`` and ``config``: qwen3-0.6b on a GPU, smollm2-135m on a CPU."""
    config: str | None = None
    """A config.json."""
    keep: str | None = None
    """Layers that keep attention (models/kept.py). None: the shape's preset, a hybrid's own, or uniform."""
    tokens: tuple[int, ...] = ()
    """Prompt lengths. Empty: 4096, 8192, 32768 and 131072 on a GPU, 64 and 256 on a CPU."""
    batch: int = 1
    decode_steps: int = 16
    repeats: int = 5
    dtype: str = "auto"
    """Of weights and activations; "auto": bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    attention: str = "sdpa"
    """Of both sides: sdpa (torch chooses), or one backend of it: flash, cudnn, efficient, math."""
    impl: str | None = None
    """Of KDA; None: triton on a GPU, reference on a CPU."""
    gate: str | None = None
    """Of KDA: bounded or softplus; None: a hybrid's own, else bounded."""
    seed: int = 0
    profile: bool = False
    """The time of each kernel of a prefill, too (a GPU only)."""


def settled(settings: Settings) -> tuple[Settings, torch.device, list[Pair], list[str]]:
    """(settings with every choice made, the device, the models, what a reader must know); ValueError for the rest."""
    device = check_device(settings.device)
    gpu = device.type == "cuda"
    alone = not (settings.model or settings.config or settings.shapes)
    settings = replace(
        settings,
        shapes=(("qwen3-0.6b" if gpu else "smollm2-135m"),) if alone else settings.shapes,
        tokens=settings.tokens or ((4096, 8192, 32768, 131072) if gpu else (64, 256)),
        dtype=check_dtype(settings.dtype, device),
        device=str(device),
        impl=settings.impl or ("triton" if gpu else "reference"),
    )
    assert settings.impl is not None
    check_positive("tokens", settings.tokens)
    for name in ("batch", "decode_steps", "repeats"):
        check_positive(name, [getattr(settings, name)])
    check_names("attention", [settings.attention], BACKENDS)
    check_names("shape", settings.shapes, SHAPES)
    if settings.gate is not None:
        check_names("gate", [settings.gate], GATES)
    if settings.profile and not gpu:
        raise ValueError("profile is on, but the device is a CPU: kernels can be profiled on a CUDA GPU only")
    notes = check_impls([settings.impl], device, settings.dtype)
    pairs = _pairs(settings)
    return settings, device, pairs, notes + [models.note for models in pairs if models.note]


def _pairs(settings: Settings) -> list[Pair]:
    longest = max(settings.tokens) + settings.decode_steps + 1
    configs = {}
    if settings.model:
        configs[settings.model] = config_of_model(settings.model)
    if settings.config:
        configs[settings.config] = config_from_file(Path(settings.config))
    configs |= {name: named_shape(name) for name in settings.shapes}
    return [pair(name, config, settings.keep, longest, kda_gate=settings.gate) for name, config in configs.items()]
