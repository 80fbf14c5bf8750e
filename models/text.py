"""Text for calibration and probes: our own few pages, or the user's file, as rows of tokens without padding."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OWN_TEXT = Path(__file__).with_name("plain_english.txt")
ROW, ROWS = 512, 4
"""Tokens a row at most, and rows at most for each of calibration and probe."""
MIN_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Two batches of the same text that share no token."""

    source: str
    """Where the text came from, as a report names it."""
    calibration: Tensor
    """[rows, tokens] int64: the first half."""
    probe: Tensor
    """[rows, tokens] int64: what comes after, so that a probe never sees what was calibrated on."""


def batches(tokenizer: Any, file: Path | None = None, *, window: int = ROW) -> Batches:
    """Rows of at most ``window`` tokens of ``file`` (default: our own text); a longer text is cut, never sampled."""
    texts = read_texts(OWN_TEXT if file is None else file)
    begin, end = _ends(tokenizer)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False).input_ids + end
        if len(ids) >= 2 * ROW * ROWS:
            break
    if len(ids) < MIN_TOKENS:
        raise ValueError(f"the text {file} has {len(ids)} tokens: expected at least {MIN_TOKENS}, better {2 * ROW}")
    half = len(ids) // 2
    row = min(ROW, window) - len(begin)
    return Batches(
        source="evalkit's own text" if file is None else file.name,
        calibration=_rows(ids[:half], row, begin),
        probe=_rows(ids[half:], row, begin),
    )


def _rows(ids: Sequence[int], row: int, begin: list[int]) -> Tensor:
    """As few rows as ``row`` allows, all of one length: what is left over is dropped."""
    rows = min(ROWS, -(-len(ids) // row))
    row = min(row, len(ids) // rows)
    return torch.tensor([begin + list(ids[r * row : (r + 1) * row]) for r in range(rows)])


def _ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(what the tokenizer puts before every text, what stands between two documents)"""
    bos: int | None = getattr(tokenizer, "bos_token_id", None)
    eos: int | None = getattr(tokenizer, "eos_token_id", None)
    begins = [] if bos is None or tokenizer("a").input_ids[:1] != [bos] else [bos]
    return begins, [] if eos is None else [eos]


def read_texts(file: Path) -> list[str]:
    """The documents of a .txt file (one), or of .jsonl or .jsonl.gz (the field ``text`` of every line)."""
    if not file.is_file():
        raise ValueError(f"there is no text file {file}: expected .txt, .jsonl or .jsonl.gz")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = data.decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"the text file {file} can't be read: {error}") from error
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        return [text]
    return [_text(file, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _text(file: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{file}, line {number} has no "text": expected one JSON object a line, with a string "text"')
    return str(row["text"])
