"""Runs on disk. A run folder holds run.json (what was asked, of which model) and outcomes.jsonl (a line an item).

outcomes.jsonl only grows while a run goes on, so a killed run continues at the next item; run.json and reports are
written to a temporary file, synced and renamed, so nothing is ever half-written.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from evalkit.records import ItemRecord, TaskEntry
from evalkit.settings import Settings

SCHEMA: Literal["evalkit.run/1"] = "evalkit.run/1"
OUTCOMES, MANIFEST, DAMAGED, LOCK = "outcomes.jsonl", "run.json", "outcomes.damaged.jsonl", ".lock"

Key = tuple[str, str, str, str]
"""(task, task version, item, hash of its prompts)"""

_RECORD = TypeAdapter(ItemRecord)


class Model(BaseModel):
    """Which model a run scored."""

    model_config = ConfigDict(frozen=True)

    name: str
    fingerprint: str
    """Of weights, tokenizer, chat template and quantisation together."""
    parts: dict[str, str] = {}
    """The fingerprint's parts, to say which one differs."""
    dtype: str = ""
    device: str = ""
    parameters: int = 0
    note: str = ""
    """What a reader must know of it, e.g. how a student was made."""


class Manifest(BaseModel):
    """run.json."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: Literal["evalkit.run/1"] = SCHEMA
    model: Model
    settings: Settings
    tasks: tuple[TaskEntry, ...]
    versions: dict[str, str] = {}
    sessions: tuple[dict[str, Any], ...] = ()
    """One for each time the command ran: when, on what (engine, batch size, head, versions), the git revision of the
    folder it ran in, and once it is done the engine's profile."""
    complete: bool = False
    checkpoint: dict[str, Any] | None = None
    """evalkit.json of a distilled checkpoint, copied."""

    def entry(self, task: str) -> TaskEntry:
        return next(entry for entry in self.tasks if entry.name == task)


class Run:
    """A scored run in memory, wherever it came from."""

    def __init__(self, manifest: Manifest, records: Sequence[ItemRecord], path: Path | None = None) -> None:
        self.manifest = manifest
        self.path = path
        self._records: dict[str, dict[str, ItemRecord]] = {entry.name: {} for entry in manifest.tasks}
        for record in records:
            if record.task in self._records:
                self._records[record.task][record.item] = record

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} ({len(records)})" for name, records in self._records.items())
        return f"<evalkit run of {self.manifest.model.name}: {sizes}>"

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._records)

    def records(self, task: str) -> dict[str, ItemRecord]:
        """Item id -> record, in the order of scoring."""
        return self._records[task]


class RunWriter:
    """The growing outcomes.jsonl of one run. Without a folder it keeps records in memory only."""

    def __init__(self, path: Path | None, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.kept: dict[Key, ItemRecord] = {}
        self.damaged: list[str] = []
        """One line for each record found damaged; those items are scored again."""
        self._file: Any = None
        self._lock: FileLock | None = None
        if path is None:
            return
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another process is writing the run {path}; wait for it, or give another --out"
            ) from error
        try:
            self._open(path)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, path: Path) -> None:
        if (path / MANIFEST).exists():
            old = read_manifest(path)
            _same_run(path, old, self.manifest)
            sessions = (*old.sessions, *self.manifest.sessions)
            self.manifest = self.manifest.model_copy(update={"sessions": sessions})
        elif (path / OUTCOMES).exists():
            raise ValueError(
                f"{path} holds {OUTCOMES} but no {MANIFEST}: not a run that can be continued; give another --out"
            )
        write_json(path / MANIFEST, self.manifest)
        self._recover(path)
        self._file = open(path / OUTCOMES, "ab")  # noqa: SIM115  (open as long as the run)

    def _recover(self, path: Path) -> None:
        if not (path / OUTCOMES).exists():
            return
        good, bad = [], []
        for line, record, error in _lines(path / OUTCOMES):
            if record is None:
                bad.append(line)
                self.damaged.append(error)
            else:
                good.append(line)
                self.kept[key_of(record)] = record
        if bad:  # keep the damaged bytes for whoever wants to know, beside the run, and go on without them
            with open(path / DAMAGED, "ab") as file:
                file.writelines(line.rstrip(b"\n") + b"\n" for line in bad)
            with atomic(path / OUTCOMES) as file:
                file.writelines(good)

    def append(self, record: ItemRecord) -> None:
        """Add a record; a line is whole or, after a crash, seen to be damaged and scored again."""
        self.kept[key_of(record)] = record
        if self._file is not None:
            self._file.write(_RECORD.dump_json(record) + b"\n")
            self._file.flush()

    def close(self) -> None:
        file, self._file = self._file, None
        lock, self._lock = self._lock, None
        try:
            if file is not None:
                with file:
                    file.flush()
                    os.fsync(file.fileno())
        finally:
            if lock is not None:
                lock.release()

    def finish(self, keys: Iterable[Key], profile: Mapping[str, Any] | None = None) -> Run:
        """Mark the run complete; ``keys`` are the records that belong to it. ``profile``: of this session's engine."""
        records = [self.kept[key] for key in dict.fromkeys(keys)]
        *earlier, session = self.manifest.sessions or ({},)
        sessions = (*earlier, {**session, "profile": dict(profile)} if profile else session)
        self.manifest = self.manifest.model_copy(update={"complete": True, "sessions": sessions})
        if self.path is not None:
            if len(records) != len(self.kept):  # items that changed since they were scored would be read again
                with atomic(self.path / OUTCOMES) as file:
                    file.writelines(_RECORD.dump_json(record) + b"\n" for record in records)
            write_json(self.path / MANIFEST, self.manifest)
        self.close()
        return Run(self.manifest, records, self.path)


def write_run(path: Path | None, manifest: Manifest, records: Sequence[ItemRecord], what: str) -> Run:
    """A run that is whole already, ``what`` it is; without a folder in memory only. ValueError: ``path`` holds
    something."""
    if path is not None and path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty; give {what} another --out")
    writer = RunWriter(path, manifest.model_copy(update={"complete": False}))
    try:
        for record in records:
            writer.append(record)
        return writer.finish(map(key_of, records))
    finally:
        writer.close()


def key_of(record: ItemRecord) -> Key:
    return record.task, record.version, record.item, record.prompt_sha256


def read_run(path: Path) -> Run:
    """Open a finished run; ValueError says what is wrong with it and what to do."""
    manifest = read_manifest(path)
    if not (path / OUTCOMES).exists():
        raise ValueError(f"{path} has no {OUTCOMES}: not a whole run; run the same `evalkit run` command again")
    records = []
    for _, record, error in _lines(path / OUTCOMES):
        if record is None:
            raise ValueError(f"{error}; run the same `evalkit run` command again, and only damaged items are redone")
        records.append(record)
    run = Run(manifest, records, path)
    for entry in manifest.tasks:
        found = sum(record.version == entry.version for record in run.records(entry.name).values())
        if found != entry.n or not manifest.complete:
            raise ValueError(
                f"run {path} is not finished: {found} of {entry.n} items of {entry.name!r}; "
                f"the same `evalkit run` command goes on where it stopped"
            )
    return run


def read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.exists():
        raise ValueError(f"{path} is not a run: it has no {MANIFEST}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{file} has the schema {schema!r}; this evalkit reads {SCHEMA!r}")
        return Manifest.model_validate({**found, "schema_": found.pop("schema")})
    except (json.JSONDecodeError, ValidationError) as error:
        raise ValueError(f"{file} is damaged: {_brief(error)}") from error


def write_json(path: Path, value: BaseModel | dict[str, Any]) -> None:
    content = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    if "schema_" in content:
        content = {"schema": content.pop("schema_"), **content}
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text.encode())


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with atomic(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows)


@contextmanager
def atomic(path: Path) -> Iterator[Any]:
    """A binary file that takes ``path``'s place when it is whole and on disk, and leaves no trace otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _lines(path: Path) -> Iterator[tuple[bytes, ItemRecord | None, str]]:
    """(line, its record, "") or (line, None, what is wrong with it)."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                yield line, None, f"{path}, line {number}: cut off in the middle"
                continue
            try:
                record = _RECORD.validate_json(line)
                bad = _not_finite(record)
                yield line, None if bad else record, f"{path}, line {number}: {bad}" if bad else ""
            except ValidationError as error:
                yield line, None, f"{path}, line {number}: damaged record ({_brief(error)})"


def _not_finite(record: ItemRecord) -> str:
    """What is wrong with a record whose log-probabilities can't be ranked; empty: nothing."""
    for outcome in record.outcomes:
        for value in (*outcome.logprobs, *outcome.blind):
            if not math.isfinite(value):
                return f"item {record.item} of {record.task!r} has the log-probability {value}"
    return ""


def _same_run(path: Path, old: Manifest, new: Manifest) -> None:
    """A run goes on only with what it was begun with; ValueError lists the differences."""
    differences = []
    if old.model.fingerprint != new.model.fingerprint:
        parts = [name for name, value in new.model.parts.items() if old.model.parts.get(name) != value]
        differences.append(f"model ({', '.join(parts) or 'fingerprint'})")
    if old.model.dtype != new.model.dtype:
        differences.append(f"dtype ({old.model.dtype}, now {new.model.dtype})")
    if old.versions.get("evalkit") != new.versions.get("evalkit"):
        differences.append(f"evalkit ({old.versions.get('evalkit')}, now {new.versions.get('evalkit')})")
    before, after = old.settings.model_dump(), new.settings.model_dump()
    differences += [f"{name} ({before[name]!r}, now {after[name]!r})" for name in after if before[name] != after[name]]
    known = {entry.name: entry for entry in new.tasks}
    for entry in old.tasks:
        if entry.name not in known:
            differences.append(f"task {entry.name!r} is missing now")
    if differences:
        raise ValueError(
            f"{path} holds another run; it differs in {'; '.join(differences)}. "
            f"Give another --out, or repeat its command"
        )


def _brief(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'line'}: {first['msg']}"
    return str(error)
