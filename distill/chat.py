"""Conversations as tokens, each marked: the assistant's own words, the token that ends its turn, or neither.

The tokenizer's chat template writes the conversation once, as a whole, and the whole is tokenised once; so the tokens
are those that a model sees. Where the assistant's words stand in the text is found by rendering what came before each
of its turns: that must be the whole's beginning. Templates with ``{% generation %}`` say it themselves.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.encoding import OPEN, Encoder

CONTENT, END = 1, 2
"""Marks of a token: the assistant's words; what ends its turn. 0: neither."""
Messages = Sequence[Mapping[str, Any]]
"""Of a conversation: each with a role and a content."""
Span = tuple[int, int, int]
"""Of a turn in the text: where its words begin; where they end and its end token begins; where that ends."""
Marked = tuple[NDArray[np.int64], NDArray[np.uint8]]
"""(tokens, their marks)"""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = ("evalkit asks", "evalkit answers")


class Unusable(ValueError):
    """A conversation that can't be a target, through no fault of the template: it is left out and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation as one text."""

    text: str
    turns: tuple[Span, ...]
    """The assistant's, one for each of its messages."""


class Chat:
    """Writes, tokenises and marks examples with one tokenizer: conversations, and prompts with their answer."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} can't say which characters a token stands for, so no answer can be told "
                f"from its prompt; use the model's fast tokenizer (tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self.bos = list(Encoder(tokenizer).bos)
        self.template = str(getattr(tokenizer, "chat_template", None) or "")
        self._special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._end: str | None = None

    @cached_property
    def identity(self) -> str:
        """A hash of all that turns text and messages into tokens."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # How the last caller padded or cut a batch is not the tokenizer's identity.
        state.pop("padding", None)
        state.pop("truncation", None)
        parts = [state, self.template, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    # --- conversations ---

    def encode(self, conversations: Sequence[tuple[str, Messages]]) -> list[Marked | Unusable]:
        """Tokens and marks of each (name, messages), or why it can't be a target. ValueError names the conversation."""
        marked = bool(_GENERATION.search(self.template))
        out: list[Marked | Unusable | Rendered] = []
        for name, messages in conversations:
            try:
                out.append(self._by_template(messages) if marked else self.render(messages))
            except Unusable as error:
                out.append(error)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        rendered = [one for one in out if isinstance(one, Rendered)]
        ready = iter(self.mark([one.text for one in rendered], [one.turns for one in rendered]))
        return [next(ready) if isinstance(one, Rendered) else one for one in out]

    def render(self, messages: Messages) -> Rendered:
        """The conversation's text, and where in it each of the assistant's turns stands."""
        end = self.end_of_turn
        self._check(messages, end)
        text = self._write(messages)
        turns: list[Span] = []
        at = 0
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begin = self._begin(messages[:k], text, at)
            stop = text.find(end, begin)
            if stop < 0:
                raise ValueError(
                    f"the chat template writes no {end!r} after turn {k + 1}: it can't be told where it ends"
                )
            at = stop + len(end)
            turns.append((begin, stop, at))
        return Rendered(text=text, turns=tuple(turns))

    @property
    def end_of_turn(self) -> str:
        """The special token that the template writes after the assistant's words."""
        if self._end is None:
            asked, answered = _PROBE
            text = self._write([{"role": "user", "content": asked}, {"role": "assistant", "content": answered}])
            _, found, after = text.partition(answered)
            ends = [(after.find(token), -len(token), token) for token in self._special if token and token in after]
            if not found or not ends:
                raise ValueError(
                    f"the chat template writes {after[:40]!r} after the assistant's words: expected a special token of "
                    f"the tokenizer, which a model can learn to end its turn with; correct the template"
                )
            self._end = min(ends)[2]
        return self._end

    def _begin(self, before: Messages, text: str, at: int) -> int:
        """Where the words of the turn after ``before`` begin.

        A template may write more before a turn to come than before one that is over: an empty thinking block where
        thinking is off (Qwen3), an opened one (DeepSeek-R1). So the prompts with thinking off, with thinking on, and
        without the opened block are tried in turn: the first that begins ``text`` is it, so that what evalkit itself
        would put before an answer counts as the prompt, and what it would not as the answer.
        """
        for prompt in self._prompts(before):
            if len(prompt) >= at and text.startswith(prompt):
                return len(prompt)
        raise ValueError(
            f"the chat template writes the {len(before)} messages before an assistant's turn otherwise when the turn "
            f"follows than when it is asked for, so its words can't be found; put them between {{% generation %}} and "
            f"{{% endgeneration %}} in the template"
        )

    def _prompts(self, before: Messages) -> Iterator[str]:
        for thinking in (False, True):
            prompt = self._write(before, add_generation_prompt=True, enable_thinking=thinking)
            yield prompt
        if prompt.rstrip().endswith(OPEN):
            yield prompt.rstrip().removesuffix(OPEN)

    def _write(self, messages: Messages, **options: Any) -> str:
        if not self.template:
            raise ValueError(
                "the tokenizer has no chat template, so messages can't be written: take an instruction-tuned model's "
                "tokenizer, or set tokenizer.chat_template and save it with the model"
            )
        options = {"enable_thinking": False, **options}
        try:
            return str(self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **options))
        except Exception as error:  # jinja raises what the template's author chose
            raise ValueError(f"the model's chat template refused the conversation: {error}") from error

    def _check(self, messages: Messages, end: str) -> None:
        answers = [str(m["content"]) for m in messages if m["role"] == "assistant"]
        if not answers:
            raise Unusable("without an assistant's turn")
        if not all(answer.strip() for answer in answers):
            raise Unusable("with an empty answer")
        if any(end in str(m["content"]) for m in messages):
            raise Unusable(f"with {end} inside a message")

    def _by_template(self, messages: Messages) -> Marked:
        """Marks from ``{% generation %}``; the end of a turn may stand inside it or follow it."""
        self._check(messages, self.end_of_turn)
        try:
            found = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                enable_thinking=False,
            )
        except Exception as error:
            raise ValueError(f"the model's chat template refused the conversation: {error}") from error
        ids = np.asarray(found["input_ids"], np.int64)
        inside = np.asarray(found["assistant_masks"], bool)
        if not inside.any():
            raise ValueError("the chat template has {% generation %} marks, but none is around the assistant's words")
        marks = np.where(inside, CONTENT, 0).astype(np.uint8)
        special = np.isin(ids, list(self._special_ids))
        marks[special & inside] = END
        follows = np.zeros_like(inside)
        follows[1:] = inside[:-1] & ~special[:-1]
        marks[special & ~inside & follows] = END
        return self._begun(ids, marks)

    # --- any text with known places ---

    def mark(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Marked]:
        """Tokens and marks of ``texts``. A token that spans the join of prompt and words counts as words: it is
        generated, if anything is."""
        if not texts:
            return []
        found = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        out = []
        for ids, offsets, turns in zip(found["input_ids"], found["offset_mapping"], spans, strict=True):
            # By ends alone: byte-level tokenizers report tokens without their leading spaces, so begins deceive.
            ends = np.asarray(offsets, np.int64).reshape(-1, 2)[:, 1]
            marks = np.zeros(len(ids), np.uint8)
            for begin, stop, end in turns:
                marks[(ends > begin) & (ends <= stop)] = CONTENT
                marks[(ends > stop) & (ends <= end)] = END
            out.append(self._begun(np.asarray(ids, np.int64), marks))
        return out

    def answers(self, pairs: Sequence[tuple[str, str]]) -> list[Marked]:
        """(prompt, answer) as running text, the answer after a space as evalkit scores it, then the end of the text."""
        end = self.tokenizer.eos_token_id
        if pairs and end is None:
            raise ValueError("the tokenizer has no eos_token, so an answer can't end: set tokenizer.eos_token")
        texts = [f"{prompt} {answer}" for prompt, answer in pairs]
        spans = [((len(prompt), len(text), len(text)),) for (prompt, _), text in zip(pairs, texts, strict=True)]
        return [(np.append(ids, end), np.append(marks, np.uint8(END))) for ids, marks in self.mark(texts, spans)]

    def texts(self, texts: Sequence[str]) -> list[Marked]:
        """Plain texts, targets throughout, with the tokenizer's own BOS and the end of the text."""
        if not texts:
            return []
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        out = []
        for ids in found:
            row = np.asarray([*(self.bos if ids[: len(self.bos)] != self.bos else []), *ids, *end], np.int64)
            out.append((row, np.full(len(row), CONTENT, np.uint8)))
        return out

    def _begun(self, ids: NDArray[np.int64], marks: NDArray[np.uint8]) -> Marked:
        """With exactly one BOS where the tokenizer wants one; the template may have written it."""
        if not self.bos or ids[:1].tolist() == self.bos:
            return ids, marks
        return np.concatenate([self.bos, ids]), np.concatenate([np.zeros(1, np.uint8), marks])
