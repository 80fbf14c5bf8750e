"""Distractors for questions whose answer is a text: answers of other questions."""

from bisect import bisect
from collections.abc import Collection, Iterable
from itertools import islice

from evalkit.selection import digest

DISTRACTORS = 3


class Ring:
    """All answers on a ring by hash: an item takes those that follow its own place."""

    def __init__(self, answers: Iterable[str]) -> None:
        one_each = {text.casefold(): text for text in sorted(set(answers))}
        self._ring = sorted((digest("answer", text), text) for text in one_each.values())

    def others(self, name: str, right: Collection[str]) -> list[str]:
        """Up to three answers that are none of ``right``, for the item called ``name``."""
        folded = {text.strip().casefold() for text in right}
        start = bisect(self._ring, (digest("distractor", name), ""))
        around = (self._ring[(start + step) % len(self._ring)][1] for step in range(len(self._ring)))
        return list(islice((text for text in around if text.casefold() not in folded), DISTRACTORS))
