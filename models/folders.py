"""A folder written whole or not at all: beside its place first, synced, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder to write in; when the block ends it is synced to disk and takes ``folder``'s place.

    What stood there before goes only after the new one is complete; after an error it stays as it was.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    new, old = work / "new", work / "old"
    new.mkdir()
    try:
        yield new
        for file in sorted(new.rglob("*")):
            _sync(file)
        _sync(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
    finally:
        # Also after Ctrl-C between the two renames, when the old folder is in the one that goes.
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(work, ignore_errors=True)


def would_destroy(folder: Path, model: str) -> bool:
    """Whether replacing ``folder`` would take a model's folder with it: ``model`` is ``folder``, or lies inside it."""
    place = Path(model).expanduser()
    return place.is_dir() and place.resolve().is_relative_to(folder.resolve())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
