"""What every engine makes of generated tokens: where a reply ends, and its text. No model is needed."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from evalkit.encoding import CLOSE, OPEN, Tokenizer
from evalkit.records import Generated, Generation


def cut_reply(tokenizer: Tokenizer, tokens: list[int], generation: Generation, eos: frozenset[int]) -> Generated:
    """Cut one row of generated tokens at its own end: EOS, stop string or length, whichever came first."""
    finish: Literal["eos", "stop", "length"] = "length"
    tokens = tokens[: generation.max_tokens]
    end = next((at for at, token in enumerate(tokens) if token in eos), None)
    if end is not None:
        tokens, finish = tokens[:end], "eos"
    text = decode(tokenizer, tokens, generation.stops)
    cut = first_stop(text, generation.stops)
    if cut is not None:
        tokens, text, finish = _until(tokenizer, tokens, generation.stops), text[:cut], "stop"
    return Generated(text=text, tokens=tuple(tokens), finish=finish)


def _until(tokenizer: Tokenizer, tokens: list[int], stops: tuple[str, ...]) -> list[int]:
    """The shortest run of ``tokens`` with a whole stop string: the row stopped there, whatever its batch did."""
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        text = decode(tokenizer, tokens[:middle], stops)
        low, high = (low, middle) if first_stop(text, stops) is not None else (middle + 1, high)
    return tokens[:low]


def decode(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str]) -> str:
    """Special tokens are left out, but while a thought is awaited: its closing tag may be one of them."""
    skip = CLOSE not in stops
    return tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins. None stands inside a thinking block, unless the block's end is the stop."""
    start = 0
    if text.lstrip().startswith(OPEN) and CLOSE not in stops:
        start = text.find(CLOSE)
        if start < 0:
            return None
    found = [at for at in (text.find(stop, start) for stop in stops) if at >= 0]
    return min(found, default=None)


class Watch:
    """Tells, asked after each token of a reply, when a stop string stands in it.

    Few tokens can be the end of one, and decoding takes time: each token is looked at once. What is missed so costs
    tokens, no correctness, since `cut_reply` cuts.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        # A stop string of n characters lies within the last n + 8 tokens: every token but a byte piece has one.
        self._tail = max(map(len, stops), default=0) + 8
        self._ends = {stop[-1:] for stop in (*stops, CLOSE)}  # a stop string may stand in the tag itself
        self._may_end: dict[int, bool] = {}

    def __call__(self, tokens: Sequence[int]) -> bool:
        """``tokens``: all that was said."""
        if not self.stops or not self._may(tokens[-1]):
            return False
        shown = decode(self.tokenizer, tokens[-self._tail :], self.stops)
        if not any(stop in shown for stop in self.stops):
            return False
        return first_stop(decode(self.tokenizer, tokens, self.stops), self.stops) is not None

    def _may(self, token: int) -> bool:
        """Not where a tokenizer drops the space that a token begins with, nor for a part of a character."""
        if token not in self._may_end:
            text = decode(self.tokenizer, [token], self.stops)
            odd = not text or "\ufffd" in text or " " in self._ends
            self._may_end[token] = odd or any(end in text for end in self._ends)
        return self._may_end[token]


def in_thought(text: str, generation: Generation) -> bool:
    """Whether ``text`` ends inside a thinking block that the model opened; no stop string counts there."""
    return text.lstrip().startswith(OPEN) and CLOSE not in text and CLOSE not in generation.stops


def seed_of(prompt: tuple[int, ...], generation: Generation) -> int:
    """Of a reply's own generator: it depends on its prompt and its run's seed, on no other request."""
    digest = hashlib.sha256(f"{generation.seed} {prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def eos_ids(model: Any, tokenizer: Tokenizer) -> frozenset[int]:
    """Every token that ends a turn: what the generation config names, and the tokenizer's own."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(named if isinstance(named, (list, tuple)) else [named])
    return frozenset(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None)
