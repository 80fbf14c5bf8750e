"""Text -> tokens: few-shot examples, chat template, thinking blocks, BOS, and the join of prompt and answer."""

from collections.abc import Sequence
from typing import Any, Protocol

from evalkit.views import Ask

OPEN, CLOSE = "<think>", "</think>"


def closing(close: str) -> str:
    """What shuts a thinking block by force and begins the answer."""
    return f"\n{close}\n\n"


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that evalkit uses."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...


class Encoder:
    """Writes and tokenises the prompts of one run."""

    def __init__(self, tokenizer: Tokenizer, *, chat: bool = False, system: str = "", thinking: bool = False) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.system = system
        self.thinking = thinking
        if (system or thinking) and not chat:
            asked = "a system prompt" if system else "thinking"
            raise ValueError(f"{asked} goes through the chat template: add --chat")
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError("--chat was asked for, but the model's tokenizer has no chat template; leave --chat out")
        if thinking and not self._can_think():
            raise ValueError(f"thinking was asked for, but the chat template has no {OPEN} block; use --thinking off")
        bos = tokenizer.bos_token_id
        # Whether this tokenizer puts a BOS before text is its own decision; asking it beats guessing by family.
        self.bos: tuple[int, ...] = (
            (bos,) if bos is not None and tokenizer.encode("x", add_special_tokens=True)[:1] == [bos] else ()
        )

    def _can_think(self) -> bool:
        return OPEN in str(self.tokenizer.chat_template) or self._render([], "x", True).rstrip().endswith(OPEN)

    def prompt(self, shots: Sequence[Ask], ask: Ask, *, closed: bool) -> str:
        """The text up to the answer. ``closed``: a thinking block, if the template has one, is empty and shut."""
        if not self.chat:
            own = "".join(f"{shot.question}{shot.joint}{shot.reply}{shot.gap}" for shot in ask.examples)
            return "".join(f"{self.joined(shot)}\n\n" for shot in shots) + ask.before + own + ask.question + ask.prefix
        said = [*((x.question, x.reply) for x in shots), *((x.question, x.reply) for x in ask.examples)]
        turns = [turn for question, reply in said for turn in (("user", question), ("assistant", reply))]
        prefix = ask.prefix.lstrip()
        if self.thinking and not closed:
            if prefix:
                raise ValueError(f"the answer is begun for the model ({prefix!r}), so it can't think first")
            return self._render(turns, ask.question, True, ask.before)
        text = self._render(turns, ask.question, False, ask.before)
        if "<|channel|>" in str(self.tokenizer.chat_template):
            if not closed and not prefix:
                return text
            raise ValueError(
                "log-likelihood is refused: this chat template reasons in <|channel|> blocks, which evalkit cannot "
                "close before the answer; use --mode generation, or leave --chat out"
            )
        tail = text.rstrip()
        if tail.endswith(OPEN):
            return f"{tail}\n\n{CLOSE}\n\n{prefix}"
        if self.thinking and not tail.endswith(CLOSE):
            return f"{text}{OPEN}\n\n{CLOSE}\n\n{prefix}"
        return text + prefix

    def joined(self, ask: Ask) -> str:
        """A few-shot example as plain text."""
        if ask.contexts:
            return ask.reply
        return ask.question + ask.joint + ask.reply

    @property
    def delimiter(self) -> str:
        """What stands between prompt and answer: a space in running text, nothing at a chat turn's start."""
        return "" if self.chat else " "

    def answer(self, ask: Ask, text: str) -> str:
        """``text`` with what joins it to the prompt of ``ask``."""
        if not self.chat:
            return ask.joint + text
        return ask.joint + text if ask.prefix and not ask.prefix[-1].isspace() else text

    def _render(self, turns: list[tuple[str, str]], question: str, thinking: bool, before: str = "") -> str:
        system = "\n\n".join(part for part in (self.system, before) if part)
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": role, "content": content} for role, content in (*turns, ("user", question))]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
        except Exception as error:  # jinja raises what the template's author chose
            raise ValueError(f"the model's chat template refused the conversation: {error}") from error
        return str(text)

    def encode(self, text: str) -> list[int]:
        """Token ids with exactly one BOS where the tokenizer wants one, whoever wrote it: template or tokenizer."""
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        if self.bos and ids[:1] != list(self.bos):
            ids = [*self.bos, *ids]
        return ids

    def join(self, prompt: str, answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Tokens of the prompt and of every answer after it.

        Text is tokenised whole. Where a token spans the join, the prompt is cut back to the last token that all
        answers share with it, and the bytes in between are scored with every answer: none comes out empty, and
        all are scored from the same place.
        """
        head = self.encode(prompt) if prompt else list(self.bos)
        wholes = [self.encode(prompt + answer) for answer in answers]
        shared = min([len(head), *(_common(head, whole) for whole in wholes)])
        for answer, whole in zip(answers, wholes, strict=True):
            if len(whole) <= shared:
                raise ValueError(
                    f"answer {answer!r} has no token of its own after the prompt, so nothing can be scored"
                )
        tails = [whole[shared:] for whole in wholes]
        if shared == 0:  # a score needs something before it: what the model takes for a text's start
            start = self.tokenizer.bos_token_id
            start = self.tokenizer.eos_token_id if start is None else start
            if start is None:
                raise ValueError("the tokenizer has neither a BOS nor an EOS token to start an empty prompt with")
            return [start], tails
        return head[:shared], tails


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
