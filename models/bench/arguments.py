"""What both measurements are asked for: texts become numbers, names are checked. Errors are ValueErrors."""

import difflib
from collections.abc import Iterable

import torch

from models.bench.provenance import INSTALL_FLA, fla_installed, interpreted
from models.kda.api import IMPLS
from models.load import DTYPES, pick_device


def numbers(name: str, text: str) -> tuple[int, ...]:
    """ "4096,8k" -> (4096, 8192): whole numbers between commas, where k stands for 1024."""
    out = []
    for part in text.split(","):
        digits = part.strip().lower()
        factor = 1024 if digits.endswith("k") else 1
        if not digits.removesuffix("k").isdecimal():
            raise ValueError(f"{name} is {text!r}: expected whole numbers between commas, such as 8192,32768 or 8k,32k")
        out.append(factor * int(digits.removesuffix("k")))
    return tuple(out)


def names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def check_positive(name: str, values: Iterable[int]) -> None:
    for value in values:
        if value < 1:
            raise ValueError(f"{name} is {value}: expected 1 or more")


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known, seen = list(known), set[str]()
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown {what} {name!r}: expected {', '.join(known)}{guess}")
        if name in seen:
            raise ValueError(f"{what} {name!r} is named twice: expected each once")
        seen.add(name)


def check_device(name: str) -> torch.device:
    """A CUDA GPU or the CPU, with its number."""
    device = torch.device(pick_device(name))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device.type!r}: a measurement needs cuda or cpu (--device cpu)")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def check_dtype(name: str, device: torch.device) -> str:
    """ "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: expected auto, {', '.join(DTYPES)}")
    return name


def check_impls(impls: Iterable[str], device: torch.device, dtype: str) -> list[str]:
    """What a reader must know of these implementations here; ValueError for one that can't run."""
    impls, gpu, notes = list(impls), device.type == "cuda", list[str]()
    check_names("impl", impls, IMPLS)
    if "fla" in impls:
        if not gpu:
            raise ValueError("impl fla needs a CUDA GPU, and this device is a CPU: leave it out of --impl")
        if not fla_installed():
            raise ValueError(f"impl fla is not installed: {INSTALL_FLA}, or leave it out of --impl")
    if "triton" in impls and interpreted():
        if dtype != "float32":
            raise ValueError(f"dtype is {dtype!r}: Triton's interpreter (TRITON_INTERPRET=1) is right in float32 only")
        notes.append("triton ran in its interpreter (TRITON_INTERPRET=1): its results count, its times mean nothing")
    elif "triton" in impls and not gpu:
        raise ValueError("impl triton needs a CUDA GPU: choose reference, or set TRITON_INTERPRET=1 before the start")
    return notes
