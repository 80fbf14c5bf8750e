"""Sources of examples: files of text and of conversations, data sets of the hub, benchmarks' own training items.

Everything is read in one fixed order; shuffling, mixing and tokenising come later (distill/packing.py, tokens.py).
"""

import glob
import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import tasks  # noqa: F401  (its benchmarks register themselves)
from distill.chat import Messages
from distill.stage import Source
from evalkit.records import Item
from evalkit.registry import Task, get_task
from evalkit.selection import digest, shuffled
from evalkit.views import Ask, ask

OWN = Path(__file__).with_name("data")
"""Text and conversations that evalkit ships: what "own" stands for."""
CUT_OFF = "length"
"""``finish`` of a generated answer that ran into its limit (distill/generate.py): nothing to learn an ending from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One document to train on: plain text, a conversation, or a prompt with its answer; exactly one is given."""

    label: str
    """Source and id, as messages name it."""
    text: str = ""
    messages: Messages = ()
    pair: tuple[str, str] | None = None
    """(prompt, answer) of running text; the answer follows after a space."""
    unusable: str = ""
    """Why it must be left out. Empty: it needn't."""

    @property
    def prompt(self) -> str:
        """What a held-out question must not stand in: of plain text all of it, of a conversation all but answers."""
        if self.pair is not None:
            return self.pair[0]
        if self.messages:
            return "\n".join(str(m["content"]) for m in self.messages if m["role"] != "assistant")
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """An opened source whose examples can be read from the start, any number of times."""

    label: str
    splits: bool
    """Its documents may be cut where a row ends: plain text may, an answer may not."""
    identity: Callable[[], str]
    """A hash of all it holds: what was tokenised before can be used again if this is equal."""
    examples: Callable[[], Iterator[Example]]
    left_out: Counter[str]
    """What the source itself left out: reason -> examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A source that is read on the way. Its cursor is the data set's own."""

    label: str
    splits: bool
    start: Callable[[Any], Iterator[tuple[Example, Callable[[], Any]]]]
    """Cursor (None: the beginning) -> the examples after it, each with what gives the cursor after itself."""


def open_source(source: Source, data_dir: Path | None) -> Corpus | Flow:
    """What ``source`` names; ValueError says what is missing where."""
    if source.text:
        return _files(source, source.text, "text", data_dir)
    if source.chat:
        return _files(source, source.chat, "chat", data_dir)
    return _hub(source, data_dir) if source.hub else _task(source, data_dir)


class Held:
    """Questions that no example may contain, whatever the spacing and case."""

    def __init__(self, questions: Iterable[str]) -> None:
        self.questions = sorted({_plain(question) for question in questions})
        if "" in self.questions:
            raise ValueError("a held-out question is empty, so it would leave out every example; drop it from exclude")

    def inside(self, example: Example) -> bool:
        prompt = _plain(example.prompt) if self.questions else ""
        return any(question in prompt for question in self.questions)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


# --- files ---


def find_files(patterns: Sequence[str], exclude: Sequence[str], kind: str, data_dir: Path | None) -> list[Path]:
    """The files that ``patterns`` name, sorted, each once; a relative one in ``data_dir``, else in this folder."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        if pattern == "own":
            matches = [OWN / f"{kind}.jsonl"]
        else:
            expanded = os.path.expanduser(pattern)
            places = [Path(expanded)] if os.path.isabs(expanded) else [*([data_dir] if data_dir else []), Path()]
            places = places if os.path.isabs(expanded) else [place / expanded for place in places]
            matches = next((files for place in places if (files := _matches(place))), [])
        if not matches or not all(file.is_file() for file in matches):
            where = f"in {data_dir} or in {Path.cwd()}" if data_dir else f"in {Path.cwd()} (no data folder was named)"
            raise ValueError(f"no {kind} file matches {pattern!r} {where}: correct the recipe, or name --data-dir")
        found.update(dict.fromkeys(matches))
    kept = [file for file in sorted(found) if not any(fnmatch(file.name, pattern) for pattern in exclude)]
    if not kept:
        raise ValueError(f"exclude leaves out all {len(found)} files of {', '.join(patterns)}: narrow it")
    endings = (".txt", ".jsonl", ".jsonl.gz") if kind == "text" else (".jsonl", ".jsonl.gz")
    for file in kept:
        if not file.name.endswith(endings):
            raise ValueError(f"{file} is no {kind} file: expected a name that ends in {' or '.join(endings)}")
    return kept


def _matches(place: Path) -> list[Path]:
    return sorted(Path(name) for name in glob.glob(str(place), recursive=True) if os.path.isfile(name))


def _files(source: Source, patterns: Sequence[str], kind: str, data_dir: Path | None) -> Corpus:
    files = find_files(patterns, source.exclude, kind, data_dir)

    def identity() -> str:
        total = hashlib.sha256(kind.encode())
        for file in files:
            total.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        return total.hexdigest()

    def examples() -> Iterator[Example]:
        for file in files:
            if file.name.endswith(".txt"):
                yield Example(label=file.name, text=_decoded(file, file.read_bytes()))
                continue
            for number, row in _rows(file):
                yield _example(row, f"{file}, line {number}", f"{file.name}: {row.get('id', f'line {number}')}", kind)

    return Corpus(label=source.label, splits=kind == "text", identity=identity, examples=examples, left_out=Counter())


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not blank."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{file} can't be read: {error}; copy it again") from error
    for number, line in enumerate(_decoded(file, data).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: found {type(row).__name__}, expected one JSON object a line")
        yield number, row


def _decoded(file: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error


def _example(row: Mapping[str, Any], where: str, label: str, kind: str, field: str = "text") -> Example:
    """A row as an example; ValueError names the place and the field."""
    if kind == "text":
        text = row.get(field)
        if not isinstance(text, str):
            found = "no" if field not in row else f"{type(text).__name__} as"
            raise ValueError(
                f"{where}: {found} {field!r}, expected a string; the row has {', '.join(row) or 'nothing'}"
            )
        return Example(label=label, text=text)
    unusable = "with an answer cut off at its limit" if row.get("finish") == CUT_OFF else ""
    return Example(label=label, messages=check_messages(row.get("messages"), where), unusable=unusable)


def check_messages(messages: Any, where: str) -> Messages:
    """``messages`` if it is a list of objects with a role and a content; ValueError names ``where``."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: no 'messages', expected a list of objects with role and content")
    for number, message in enumerate(messages, 1):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise ValueError(f"{where}: message {number} has no string {key!r}")
    # Data sets fill the fields that a message lacks with None; a template would take them for given.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


# --- data sets of the hub ---


def _hub(source: Source, data_dir: Path | None) -> Corpus | Flow:
    rows = _load(source, data_dir)
    columns = rows.column_names or list(next(iter(rows), {}))
    kind = "chat" if "messages" in columns else "text"
    if kind == "text" and source.field not in columns:
        raise ValueError(
            f"the data set {source.hub} has neither 'messages' nor {source.field!r}: its rows have "
            f"{', '.join(columns) or 'nothing'}; name the text's column with field"
        )

    def example(number: int, row: Mapping[str, Any]) -> Example:
        label = f"{source.hub}: {row.get('id', number)}"
        return _example(row, f"{source.hub}, row {number}", label, kind, source.field)

    def start(cursor: Any) -> Iterator[tuple[Example, Callable[[], Any]]]:
        fresh = _load(source, data_dir)
        begin = 0
        if cursor is not None:
            begin = cursor["rows"]
            fresh.load_state_dict(cursor["state"])
        for number, row in enumerate(fresh, begin):
            yield example(number, row), partial(_cursor, fresh, number + 1)

    if source.streaming:
        return Flow(label=source.label, splits=kind == "text", start=start)
    return Corpus(
        label=source.label,
        splits=kind == "text",
        identity=lambda: f"{rows._fingerprint} {kind} {source.field}",
        examples=lambda: (example(number, row) for number, row in enumerate(rows)),
        left_out=Counter(),
    )


def _cursor(rows: Any, number: int) -> dict[str, Any]:
    return {"rows": number, "state": rows.state_dict()}


def _load(source: Source, data_dir: Path | None) -> Any:
    import datasets

    local = next(
        (place for place in (*([data_dir / source.hub] if data_dir else []), Path(source.hub)) if place.is_dir()), None
    )
    options: dict[str, Any] = {"split": source.split, "streaming": source.streaming}
    if local is None:
        options["revision"] = source.revision
    try:
        return datasets.load_dataset(str(local or source.hub), source.config or None, **options)
    except Exception as error:  # datasets raises a dozen types for one cause: it could not be read
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"could not read split {source.split!r} of the data set {local or source.hub} ({reason}); offline, put a "
            f"copy of it into the data folder as {source.hub}/"
        ) from error


# --- benchmarks ---


def _task(source: Source, data_dir: Path | None) -> Corpus:
    task = get_task(source.task)
    for view in source.views:
        if view not in task.views:
            raise ValueError(f"task {task.name!r} has no view {view!r}: its views are {', '.join(task.views)}")
    left_out: Counter[str] = Counter()
    items = _trainable(task, data_dir, left_out)
    asked = [_asked(one, source.chat_share) for one in _asks(task, items, source.views, left_out)]

    def identity() -> str:
        total = hashlib.sha256()
        for one in asked:
            total.update(json.dumps([one.label, one.pair, list(one.messages)]).encode())
        return total.hexdigest()

    return Corpus(label=source.label, splits=False, identity=identity, examples=lambda: iter(asked), left_out=left_out)


def _trainable(task: Task, data_dir: Path | None, left_out: Counter[str]) -> list[Item]:
    """The items of the task's pool, without those that are reported, too."""
    pool = list(task.pool(data_dir)) if task.pool is not None else []
    if not pool:
        raise ValueError(
            f"task {task.name!r} has no training split here, and what it reports must never be trained on: "
            f"leave it out of the recipe, or add its train file to the data folder {data_dir}"
        )
    reported = {_identity(task, item) for item in task.items(data_dir)}
    items = [item for item in pool if _identity(task, item) not in reported]
    if not items:
        raise ValueError(
            f"all {len(pool)} training items of task {task.name!r} are reported items, which must never be trained on: "
            f"correct its pool, or leave the task out of the recipe"
        )
    if len(items) < len(pool):
        left_out["the same as a reported item"] += len(pool) - len(items)
    return [shuffled(item, 0) for item in items] if task.shuffle else items


def _identity(task: Task, item: Item) -> tuple[str, ...]:
    """What makes two items one question. An open question's choices are made from its id, so they don't count."""
    options = sorted(map(_plain, item.choices)) if task.answer == "choice" else []
    return _plain(item.question), _plain(item.passage), *options


def _asks(
    task: Task, items: Sequence[Item], views: Sequence[str], left_out: Counter[str]
) -> Iterator[tuple[str, str, Ask, Item]]:
    for item in items:
        for view in views:
            try:
                yield f"{task.name}: {item.id}", view, ask(view, task, item), item
            except ValueError:
                if view != "blank":
                    raise
                # Not every question has a gap with text behind it; the other views ask it all the same.
                left_out["without the gap that view 'blank' needs"] += 1


def _asked(asked: tuple[str, str, Ask, Item], chat_share: float) -> Example:
    """One question as evalkit asks it without examples: as running text, or as a chat's only turn."""
    name, view, one, item = asked
    label = f"{name} ({view})"
    if digest("chat", item.id) < chat_share * 2**64:
        turns = ({"role": "user", "content": one.question}, {"role": "assistant", "content": one.reply})
        return Example(label=label, messages=turns)
    if one.contexts:  # a gap is filled in running text, and what follows it is scored
        return Example(label=label, pair=(one.contexts[item.gold], one.answers[item.gold]))
    return Example(label=label, pair=(one.question, one.reply))


def chunks(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    while chunk := list(islice(examples, size)):
        yield chunk
