"""What `evalkit bench kda` is asked to measure, checked and completed for the device at hand."""

from dataclasses import dataclass, replace

import torch

from models.bench.arguments import check_device, check_dtype, check_impls, check_names, check_positive
from models.bench.provenance import INSTALL_FLA, fla_installed, interpreted
from models.kda.api import GATES


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """An empty tuple, None or 0 leaves the choice to the device."""

    tokens: tuple[int, ...] = ()
    """Lengths. Empty: 8192, 32768 and 131072 on a GPU, 128 and 512 on a CPU."""
    heads: int = 16
    kv_heads: int | None = None
    """Heads of k and v; None: as many as ``heads``."""
    head_dim: int = 128
    batch: int = 1
    dtype: str = "auto"
    """Of q, k, v, g and beta; "auto": bfloat16 on a GPU, float32 on a CPU."""
    gates: tuple[str, ...] = GATES
    impls: tuple[str, ...] = ()
    """Empty: triton and fla on a GPU; reference on a CPU, and triton under TRITON_INTERPRET=1."""
    backward: bool = True
    decode_batch: int = 64
    """Sequences of a decode step; 0: no decode step."""
    repeats: int = 0
    """0: 30 on a GPU, 5 on a CPU."""
    device: str = "auto"
    seed: int = 0
    profile: bool = False
    """The time of each kernel, too (a GPU only)."""
    keep_compiled: bool = False
    """Take Triton's cache of compiled kernels as it is; otherwise the first calls compile everything."""
    fla_configs: int = 0
    """fla's autotuner tries at most so many configurations a kernel; 0: all of them, which takes minutes a size."""


def settled(settings: Settings) -> tuple[Settings, torch.device, list[str]]:
    """(settings with every choice made, the device, what a reader must know). ValueError for what can't be measured."""
    device = check_device(settings.device)
    gpu = device.type == "cuda"
    dtype = check_dtype(settings.dtype, device)
    impls, notes = (settings.impls, []) if settings.impls else _implementations(gpu)
    notes += check_impls(impls, device, dtype)
    settings = replace(
        settings,
        tokens=settings.tokens or ((8192, 32768, 131072) if gpu else (128, 512)),
        kv_heads=settings.heads if settings.kv_heads is None else settings.kv_heads,
        dtype=dtype,
        impls=impls,
        repeats=settings.repeats or (30 if gpu else 5),
        device=str(device),
    )
    _check(settings, gpu)
    return settings, device, notes


def _implementations(gpu: bool) -> tuple[tuple[str, ...], list[str]]:
    """All that can be timed here without being named, and what is missing."""
    if gpu and fla_installed():
        return ("triton", "fla"), []
    if gpu:
        return ("triton",), [f"fla is not installed, so it does not stand beside triton: {INSTALL_FLA}"]
    if interpreted():
        return ("triton", "reference"), []
    return ("reference",), ["triton needs a CUDA GPU (or TRITON_INTERPRET=1), so the reference alone was measured"]


def _check(settings: Settings, gpu: bool) -> None:
    assert settings.kv_heads is not None
    check_positive("tokens", settings.tokens)
    for name in ("heads", "kv_heads", "head_dim", "batch", "repeats"):
        check_positive(name, [getattr(settings, name)])
    if settings.fla_configs < 0:
        raise ValueError(f"fla_configs is {settings.fla_configs}: expected a number of configurations, or 0 for all")
    if settings.decode_batch < 0:
        raise ValueError(f"decode_batch is {settings.decode_batch}: expected a batch, or 0 for no decode step")
    if settings.heads % settings.kv_heads:
        raise ValueError(f"kv_heads is {settings.kv_heads}: expected a divisor of heads, which is {settings.heads}")
    check_names("gate", settings.gates, GATES)
    if not settings.gates:
        raise ValueError(f"no gate is named: expected one or more of {', '.join(GATES)}")
    if settings.profile and not gpu:
        raise ValueError("profile is on, but the device is a CPU: kernels can be profiled on a CUDA GPU only")
