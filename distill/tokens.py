"""Sources as flat arrays of tokens: tokenised once, kept in memory for the run, and in a file for the next."""

import hashlib
import json
import logging
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from distill.chat import Chat, Marked, Unusable
from distill.sources import Corpus, Example, Flow, Held, chunks, open_source
from distill.stage import Source
from evalkit.store import atomic

FORMAT = "evalkit.tokens/1"
CHUNK = 1000
"""Examples tokenised at a time: enough for the tokenizer's batches, few enough to hold as Python lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """All documents of a source, one after the other."""

    ids: NDArray[Any]
    """uint16 or uint32, whichever holds the vocabulary."""
    marks: NDArray[np.uint8]
    """Of each token: CONTENT, END or 0 (distill/chat.py), so that one file serves every mask."""
    offsets: NDArray[np.int64]
    """Where each document begins in ``ids``, and the end of the last."""
    labels: tuple[str, ...]
    left_out: dict[str, int]
    """Reason -> examples."""


class Library:
    """The sources of a run, each read and tokenised once for all of its stages."""

    def __init__(
        self, tokenizer: Any, data_dir: Path | None = None, *, exclude: Sequence[str] = (), cache: Path | None = None
    ) -> None:
        """exclude: questions that no document may hold. cache: folder of what earlier runs tokenised."""
        self.chat, self.held = Chat(tokenizer), Held(exclude)
        self._data_dir, self._cache = data_dir, cache
        self._read: dict[str, tuple[str, bool, Documents]] = {}

    def open(self, source: Source) -> Flow | tuple[str, bool, Documents]:
        """What is read on the way, from its beginning; or (label, whether its documents may be cut, documents)."""
        name = source.model_dump_json(exclude={"weight"})
        if name not in self._read:
            opened = open_source(source, self._data_dir)
            if isinstance(opened, Flow):  # it has one place at a time
                return opened
            documents = tokenise(opened, self.chat, self.held, self._cache)
            self._read[name] = (opened.label, opened.splits, documents)
        return self._read[name]


def tokenise(corpus: Corpus, chat: Chat, held: Held, cache: Path | None) -> Documents:
    """The corpus' documents, from the file in ``cache`` if it holds the very same."""
    if cache is None:
        return _tokenise(corpus, chat, held)
    key = _digest(FORMAT, corpus.label, corpus.identity(), chat.identity, *held.questions)
    file = cache / f"tokens-{key[:24]}.npz"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):  # of several processes one tokenises, the others read what it wrote
        if file.is_file():
            try:
                return _read(file)
            except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
                reason = " ".join(str(error).split())
                logging.getLogger("evalkit").warning("%s is damaged (%s); tokenising again", file, reason)
        documents = _tokenise(corpus, chat, held)
        _write(file, documents)
    return documents


def encode(examples: Sequence[Example], chat: Chat, held: Held) -> list[Marked | str]:
    """Tokens and marks of each example, or why it is left out."""
    kept = [one for one in examples if not one.unusable and not held.inside(one)]
    by_kind: dict[str, list[Example]] = {"messages": [], "pair": [], "text": []}
    for one in kept:
        by_kind["messages" if one.messages else "pair" if one.pair is not None else "text"].append(one)
    done: dict[str, list[Any]] = {
        "messages": chat.encode([(one.label, one.messages) for one in by_kind["messages"]]),
        "pair": chat.answers([one.pair for one in by_kind["pair"] if one.pair is not None]),
        "text": chat.texts([one.text for one in by_kind["text"]]),
    }
    found = {id(one): marked for kind, ones in by_kind.items() for one, marked in zip(ones, done[kind], strict=True)}
    return [_checked(found.get(id(one)), one) for one in examples]


def _checked(marked: Marked | Unusable | None, example: Example) -> Marked | str:
    if marked is None:
        return example.unusable or "with a held-out question"
    if isinstance(marked, Unusable):
        return str(marked)
    if not example.messages and example.pair is None and not example.text.strip():
        return "without text"
    return marked


def _tokenise(corpus: Corpus, chat: Chat, held: Held) -> Documents:
    left_out: Counter[str] = Counter(corpus.left_out)
    width = np.uint16 if len(chat.tokenizer) <= 2**16 else np.uint32
    ids: list[NDArray[Any]] = []
    marks: list[NDArray[np.uint8]] = []
    labels: list[str] = []
    for chunk in chunks(corpus.examples(), CHUNK):
        for example, found in zip(chunk, encode(chunk, chat, held), strict=True):
            if isinstance(found, str):
                left_out[found] += 1
                continue
            ids.append(found[0].astype(width))
            marks.append(found[1])
            labels.append(example.label)
    return Documents(
        ids=np.concatenate(ids) if ids else np.zeros(0, width),
        marks=np.concatenate(marks) if marks else np.zeros(0, np.uint8),
        offsets=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        labels=tuple(labels),
        left_out=dict(left_out),
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write(file: Path, documents: Documents) -> None:
    head = json.dumps({"format": FORMAT, "labels": documents.labels, "left_out": documents.left_out}).encode()
    with atomic(file) as out:
        np.savez(
            out,
            ids=documents.ids,
            marks=documents.marks,
            offsets=documents.offsets,
            head=np.frombuffer(head, np.uint8),
        )


def _read(file: Path) -> Documents:
    """The zip's checksums are verified on the way; ValueError where the arrays don't fit each other."""
    with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as found:
        head = json.loads(found["head"].tobytes())
        documents = Documents(
            ids=found["ids"],
            marks=found["marks"],
            offsets=found["offsets"],
            labels=tuple(head["labels"]),
            left_out=head["left_out"],
        )
    if not len(documents.ids) == len(documents.marks) == documents.offsets[-1]:
        raise ValueError("its arrays differ in length")
    if len(documents.offsets) != len(documents.labels) + 1:
        raise ValueError("its labels don't fit its documents")
    return documents
