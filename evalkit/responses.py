"""Replies kept beneath the runs, so that no model is asked the same twice: `--cache-dir DIR` keeps DIR/responses.

One file for each way of computing a reply (weights, tokenizer, dtype, engine, device, versions, our own code), a line a
reply: key, checksum, value. The key is a hash of the exact token ids and settings. Files only grow, whole lines under a
lock, so two processes may share one; a line that a crash or a disk damaged is named, and its reply is asked for again.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from evalkit.encoding import Tokenizer
from evalkit.engines.base import Engine
from evalkit.records import Generated, Generation, Reply, Request
from evalkit.store import atomic

FOLDER = "responses"
SCHEMA = "evalkit.responses/1"
BUFFERED = 64
"""Replies that may wait to be written; the run's own folder has each of them already."""
_KEY = slice(6, 38)
"""Where a line's key stands: {"k":"...","c":"...","v":...}"""

logger = logging.getLogger("evalkit")


class Responses:
    """The file of one way of computing replies."""

    def __init__(self, folder: Path, how: Mapping[str, Any], name: str = "") -> None:
        """how: all that a reply depends on beside its request, as JSON values. name: the model's, to be shown."""
        self.path = folder / FOLDER / _file_name(how)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = self.added = 0
        self._header = json.dumps({"schema": SCHEMA, "model": name, **how}).encode() + b"\n"
        self._waiting: list[bytes] = []
        self._lock = lock_of(self.path)
        with self._lock:
            self._open()

    def _open(self) -> None:
        """Under the lock."""
        if not self.path.exists():
            with atomic(self.path) as file:
                file.write(self._header)
        _header(self.path)
        self._offsets = {line[_KEY]: offset for offset, line in _lines(self.path)}
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115  (open as long as the store)

    def _replaced(self) -> bool:
        """Whether another file, or none, is at the path by now: `evalkit cache prune` was there."""
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return True
        return not os.path.samestat(there, os.fstat(self._file.fileno()))

    def get(self, key: str) -> Any:
        """The value under ``key``; None: not held, or damaged."""
        offset = self._offsets.get(key.encode())
        if offset is None:
            self.misses += 1
            return None
        self._file.seek(offset)
        line = _read_line(self._file)
        value = parse(line)
        if value is None or line[_KEY] != key.encode():
            del self._offsets[key.encode()]
            self.misses += 1
            logger.warning("%s: damaged reply; it is asked for again", where(self.path, offset))
            return None
        self.hits += 1
        return value

    def put(self, key: str, value: Any) -> None:
        self._waiting.append(line_of(key, value))
        if len(self._waiting) >= BUFFERED:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        with self._lock:
            if self._replaced():
                self._file.close()
                self._open()
            end = self._file.seek(0, os.SEEK_END)
            self._file.seek(max(0, end - 1))
            if end and self._file.read(1) != b"\n":  # another writer died in the middle of a line
                self._waiting.insert(0, b"\n")
            at = self._file.seek(0, os.SEEK_END)
            block = memoryview(b"".join(self._waiting))
            try:
                while block:
                    block = block[self._file.write(block) :]
            except OSError:
                self._file.truncate(at)  # a full disk: no half line is left
                raise
        for line in self._waiting:
            if line != b"\n":
                self._offsets[line[_KEY]] = at
                self.added += 1
            at += len(line)
        self._waiting = []

    def close(self) -> None:
        try:
            self.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


class StoredEngine:
    """Answers what ``responses`` holds, asks ``engine`` for the rest, and keeps that."""

    def __init__(self, engine: Engine, responses: Responses) -> None:
        self.engine = engine
        self.responses = responses

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def max_length(self) -> int:
        return self.engine.max_length

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        held = [self._held(request) for request in requests]
        asked: list[int] = []
        rest: list[Request] = []
        for i, (request, (scores, said)) in enumerate(zip(requests, held, strict=True)):
            missing = tuple(tail for tail in request.continuations if tail not in scores)
            generation = request.generation if said is None else None
            if missing or generation is not None:
                asked.append(i)
                rest.append(replace(request, continuations=missing, generation=generation))
            else:
                yield i, _reply(request, scores, said)
        try:
            for at, reply in self.engine.answer(rest) if rest else ():
                i = asked[at]
                scores, said = held[i]
                for tail, row in zip(rest[at].continuations, reply.logprobs, strict=True):
                    scores[tail] = row
                    if all(map(math.isfinite, row)):  # else the item is an error, to be computed again
                        self.responses.put(score_key(requests[i].prompt, tail), row)
                if reply.generated is not None:
                    said = reply.generated
                    self.responses.put(generation_key(requests[i].prompt, rest[at].generation), asdict(said))
                yield i, _reply(requests[i], scores, said)
        finally:
            self.responses.flush()

    def _held(self, request: Request) -> tuple[dict[tuple[int, ...], tuple[float, ...]], Generated | None]:
        scores = {}
        for tail in request.continuations:
            row = self.responses.get(score_key(request.prompt, tail))
            if row is not None:
                scores[tail] = tuple(row)
        said = None
        if request.generation is not None:
            found = self.responses.get(generation_key(request.prompt, request.generation))
            said = None if found is None else Generated(**{**found, "tokens": tuple(found["tokens"])})
        return scores, said


def _reply(request: Request, scores: Mapping[tuple[int, ...], tuple[float, ...]], said: Generated | None) -> Reply:
    return Reply(logprobs=tuple(scores[tail] for tail in request.continuations), generated=said)


def score_key(prompt: Sequence[int], tail: Sequence[int]) -> str:
    return _hash(b"score", prompt, tail)


def generation_key(prompt: Sequence[int], generation: Generation | None) -> str:
    assert generation is not None and generation.thought is None, "thinking is two requests by now"
    how = asdict(generation)
    if generation.temperature == 0:
        del how["seed"]
    return _hash(json.dumps(how, sort_keys=True).encode(), prompt, ())


def _hash(kind: bytes, prompt: Sequence[int], tail: Sequence[int]) -> str:
    total = hashlib.sha256(kind)
    for tokens in (prompt, tail):
        total.update(len(tokens).to_bytes(8, "little") + array("q", tokens).tobytes())
    return total.hexdigest()[:32]


@cache
def code() -> str:
    """Of the files that compute replies: after a change of ours no old reply is taken for a new one."""
    root = Path(__file__).resolve().parent.parent
    total = hashlib.sha256()
    for file in sorted([*(root / "evalkit" / "engines").rglob("*.py"), *(root / "models").rglob("*.py")]):
        total.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return total.hexdigest()[:16]


# --- files -------------------------------------------------------------------------------------------------------


def lock_of(path: Path) -> FileLock:
    return FileLock(path.with_suffix(".lock"))


def line_of(key: str, value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":"))
    return f'{{"k":"{key}","c":"{_checksum(key, text)}","v":{text}}}\n'.encode()


def _checksum(key: str, text: str) -> str:
    return f"{zlib.crc32((key + text).encode()):08x}"


def parse(line: bytes) -> Any:
    """The value of a line; None: damaged."""
    try:
        found = json.loads(line)
        whole = line == line_of(found["k"], found["v"]) and found["v"] is not None
        return found["v"] if whole else None
    except (ValueError, KeyError, TypeError):
        return None


def _read_line(file: Any) -> bytes:
    """One line of an unbuffered file from where it stands; a reply is seldom longer than one block."""
    parts: list[bytes] = []
    while block := file.read(4096):
        end = block.find(b"\n")
        parts.append(block if end < 0 else block[: end + 1])
        if end >= 0:
            break
    return b"".join(parts)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line behind the header that is not empty."""
    with open(path, "rb") as file:
        offset = len(file.readline())
        for line in file:
            if line != b"\n":
                yield offset, line
            offset += len(line)


def _header(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        line = file.readline()
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        what = f"does not begin as a file of {SCHEMA!r} does"
    elif path.name != _file_name({name: value for name, value in found.items() if name not in ("schema", "model")}):
        what = "is not named after what its first line says"
    else:
        return found
    raise ValueError(f"{path} {what}; remove it by `evalkit cache prune`, or give another --cache-dir")


def _file_name(how: Mapping[str, Any]) -> str:
    return f"{hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]}.jsonl"


def where(path: Path, offset: int) -> str:
    with open(path, "rb") as file:
        return f"{path}, line {file.read(offset).count(bytes([10])) + 1}"


# --- `evalkit cache` ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One file of replies."""

    path: Path
    how: dict[str, Any]
    """Its first line; empty: that is damaged, and nobody uses the file."""
    replies: int
    bytes: int
    used: float
    """When a reply was last added (seconds since 1970)."""
    damaged: tuple[str, ...] = ()
    """Where damaged lines stand: the first one always, the others filled in by ``verify``."""


def kept(folder: Path, check: bool = False) -> list[Kept]:
    """Every file of replies under ``folder``; with ``check`` each line's checksum is compared."""
    found = []
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        with lock_of(path) if check else contextlib.nullcontext():  # else a line that is being written seems damaged
            found.append(_kept(path, check))
    return found


def _kept(path: Path, check: bool) -> Kept:
    keys, damaged = set(), []
    try:
        how = _header(path)
    except ValueError:
        how = {}
        damaged.append(where(path, 0))
    for offset, line in _lines(path):
        if check and parse(line) is None:
            damaged.append(where(path, offset))
        else:
            keys.add(line[_KEY])
    size = path.stat()
    one = Kept(path=path, how=how, replies=len(keys), bytes=size.st_size, used=size.st_mtime)
    return replace(one, damaged=tuple(damaged))


def prune(one: Kept) -> int:
    """Rewrite a file without damaged and doubled lines; the bytes that it gave back.

    A run that has the file open takes up the new one before it adds more.
    """
    with lock_of(one.path):
        before = one.path.stat().st_size
        last = {line[_KEY]: line for _, line in _lines(one.path) if parse(line) is not None}
        with open(one.path, "rb") as file:
            header = file.readline()
        with atomic(one.path) as out:
            out.write(header)
            out.writelines(last.values())
        return before - one.path.stat().st_size


def remove(one: Kept) -> int:
    """Remove a file of replies; the bytes that it gave back."""
    with lock_of(one.path):
        size = one.path.stat().st_size
        one.path.unlink()
    return size
