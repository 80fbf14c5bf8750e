"""One tensor, stored small: full, as 8-bit rows, or as low-rank factors. Pure: tensors in, tensors out.

"full": as it is, bit for bit. "int8": rows of int8 with one float32 scale a row (absmax / 127), of the tensor or of
its difference from the teacher's, whichever loses less. "lowrank:R": factors A [rows, R] and B [R, columns] of that
difference. Both lossy forms record what they lose.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Entry = dict[str, Any]
"""How a tensor is stored: encoding, of ("tensor" or "difference"), shape, dtype, rank; error, relative in the Frobenius
norm, and error_of_change, the same by the norm of the tensor's difference from the teacher's."""
FACTOR_TOLERANCE = 0.01
"""Given factors may miss the tensor by rounding (bfloat16: 0.4 % an element at most), not by more."""
MIN_COLUMNS = 16
"""Shorter rows (vectors, convolution taps) are stored full under "int8": their scales would eat what it saves."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
}


def check_encoding(name: str, encoding: str) -> int:
    """The rank that ``encoding`` asks for, 0 for the others; ValueError for no such encoding."""
    kind, _, rank = encoding.partition(":")
    if encoding in ("full", "int8"):
        return 0
    if kind != "lowrank" or not rank.isdecimal() or int(rank) < 1:
        raise ValueError(f"the encoding of {name} is {encoding!r}: expected full, int8 or lowrank:RANK")
    return int(rank)


def pack(name: str, tensor: Tensor, base: Tensor | None, encoding: str) -> tuple[Entry, dict[str, Tensor]]:
    """(entry, parts to store) of ``tensor``; ``base`` is the teacher's of the same shape, if it has one."""
    rank = check_encoding(name, encoding)
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}: expected one of {', '.join(DTYPES)}")
    if rank and _matrix(tensor) and rank * sum(tensor.shape) < tensor.numel():
        change = _finite(name, tensor if base is None else tensor.float() - base.float())
        U, S, V = torch.linalg.svd(change, full_matrices=False)
        root = S[:rank].sqrt()
        factors = (U[:, :rank] * root).to(tensor.dtype), (root[:, None] * V[:rank]).to(tensor.dtype)
        return _entry(tensor, base, "lowrank", dict(zip("AB", factors, strict=True)), base is not None)
    if encoding == "int8" and tensor.is_floating_point() and tensor.ndim > 1 and tensor[0].numel() >= MIN_COLUMNS:
        found = [_entry(tensor, None, "int8", _rows(_finite(name, tensor.float())), False)]
        if base is not None:
            parts = _rows(_finite(name, tensor.float() - base.float()))
            found.append(_entry(tensor, base, "int8", parts, True))
        return min(found, key=lambda one: one[0]["error"])
    return _entry(tensor, None, "full", {"": tensor}, False)


def pack_factors(
    name: str, tensor: Tensor, base: Tensor | None, A: Tensor, B: Tensor
) -> tuple[Entry, dict[str, Tensor]]:
    """As ``pack``, with the factors A [rows, R], B [R, columns] of the difference that training knows exactly."""
    wrong = not _matrix(tensor) or A.ndim != 2 or B.ndim != 2
    if wrong or A.shape[1] != B.shape[0] or (A.shape[0], B.shape[1]) != tensor.shape:
        raise ValueError(
            f"the factors of {name} have shapes {list(A.shape)} and {list(B.shape)}: "
            f"expected [rows, rank] and [rank, columns] of a {list(tensor.shape)} matrix"
        )
    entry, parts = _entry(tensor, base, "lowrank", {"A": A, "B": B}, base is not None)
    if not entry["error"] <= FACTOR_TOLERANCE:
        raise ValueError(
            f"the factors of {name} give another tensor than the student's: relative error {entry['error']:.2g}, "
            f"expected at most {FACTOR_TOLERANCE}; merge them into the student before saving"
        )
    return entry, parts


def unpack(name: str, entry: Mapping[str, Any], parts: Mapping[str, Tensor], base: Tensor | None) -> Tensor:
    """The tensor that ``pack`` stored; ValueError where ``base`` or a part does not fit."""
    shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
    expected = {"full": {"": shape}, "int8": {"rows": shape, "scale": shape[:1]}}.get(entry["encoding"])
    if entry["encoding"] == "lowrank":
        expected = {"A": (shape[0], entry["rank"]), "B": (entry["rank"], shape[1])}
    if expected is None:
        raise ValueError(f"{name} is stored as {entry['encoding']!r}: expected full, int8 or lowrank")
    for part, want in expected.items():
        label = f"{name} ({part})" if part else name
        if part not in parts:
            raise ValueError(f"{label} is missing")
        if tuple(parts[part].shape) != want:
            raise ValueError(f"{label} has shape {list(parts[part].shape)}: expected {list(want)}")
    if entry["encoding"] == "full":
        return parts[""].to(dtype)
    change = _product(parts["A"], parts["B"]) if "A" in expected else _from_rows(parts["rows"], parts["scale"])
    if entry["of"] == "difference":
        if base is None or base.shape != shape:
            found = "none" if base is None else f"shape {list(base.shape)}"
            raise ValueError(f"{name} is stored as a difference from the teacher's, of which there is {found}")
        change = base.to(change.dtype) + change
    return change.to(dtype)


def _entry(
    tensor: Tensor, base: Tensor | None, encoding: str, parts: dict[str, Tensor], difference: bool
) -> tuple[Entry, dict[str, Tensor]]:
    entry: Entry = {
        "encoding": encoding,
        "of": "difference" if difference else "tensor",
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }
    if encoding == "lowrank":
        entry["rank"] = parts["A"].shape[1]
    if encoding != "full":
        lost = unpack("", entry, parts, base).double() - tensor.double()
        entry["error"] = float(lost.norm() / tensor.double().norm().clamp_min(1e-300))
        if base is not None:
            change = tensor.double() - base.double()
            entry["error_of_change"] = float(lost.norm() / change.norm().clamp_min(1e-300))
    return entry, {part: value.contiguous() for part, value in parts.items()}


def _rows(x: Tensor) -> dict[str, Tensor]:
    flat = x.flatten(1)
    scale = flat.abs().amax(1) / 127
    rows = (flat / scale.where(scale > 0, torch.ones_like(scale))[:, None]).round().to(torch.int8)
    return {"rows": rows.view(x.shape), "scale": scale}


def _from_rows(rows: Tensor, scale: Tensor) -> Tensor:
    return rows.float() * scale.view(-1, *[1] * (rows.ndim - 1))


def _product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B in float64, the same on every machine, since the result's hash must be.

    Products of half-precision factors are exact in float64, so the order of their sum can't show after rounding. Those
    of wider factors are not: they are added one rank after the other.
    """
    if A.dtype in (torch.bfloat16, torch.float16) and B.dtype in (torch.bfloat16, torch.float16):
        return A.double() @ B.double()
    total = torch.zeros(A.shape[0], B.shape[1], dtype=torch.float64)
    for a, b in zip(A.double().T, B.double(), strict=True):
        total += torch.outer(a, b)
    return total


def _matrix(tensor: Tensor) -> bool:
    return bool(tensor.ndim == 2 and tensor.is_floating_point())


def _finite(name: str, x: Tensor) -> Tensor:
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity, which can't be packed: store it full, and find out why")
    return x
