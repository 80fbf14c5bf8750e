"""On what, with what and when a measurement was made; and its files, written whole or not at all."""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "triton", "transformers", "flash-linear-attention", "fla-core")
FLA = ("flash-linear-attention", "fla-core")
INSTALL_FLA = "pip install 'evalkit[fla]'"


def version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def fla_installed() -> bool:
    return any(version(name) for name in FLA)


def interpreted() -> bool:
    """Triton's kernels run in its interpreter, on a CPU: right, and thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def environment(device: torch.device) -> dict[str, Any]:
    """The device, the versions, the day, and a hash of the KDA sources that were measured."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
    versions["torch"] = torch.__version__  # with the CUDA build, which the package's own version may leave out
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": _device(device),
        "versions": versions,
        "kda_sources": _sources(Path(__file__).resolve().parent.parent / "kda"),
    }


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type, "name": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    known = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": known.name,
        "memory_bytes": known.total_memory,
        "multiprocessors": known.multi_processor_count,
        "capability": f"{known.major}.{known.minor}",
        "cuda": torch.version.cuda,
    }


def _sources(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        total.update(f"{file.relative_to(folder).as_posix()}\n".encode())
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


def write(file: Path, text: str) -> None:
    """Replace ``file``: a reader finds the old text or the new one, never half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, half = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(half, 0o666 & ~_umask())
        os.replace(half, file)
    except BaseException:
        Path(half).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
