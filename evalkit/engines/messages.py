"""A model that takes chat messages only: no tokenizer is needed, and none is to be had.

Prompts stay what the chat template would have been given. ``Messages`` stands in for the tokenizer: its tokens are
characters, and its template writes the conversation as JSON, which ``ChatEngine`` reads back and sends.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any, Literal

from evalkit.encoding import Tokenizer
from evalkit.engines.openai import CANNOT, HABITS, STOPS, ended, sampling, understood
from evalkit.engines.replies import first_stop, in_thought
from evalkit.engines.server import Refused, Server
from evalkit.records import LOGLIKELIHOOD, Generated, Generation, Reply, Request
from evalkit.settings import Settings


class Messages:
    """The tokenizer of a model whose tokens nobody sees."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    chat_template: Any = "messages as JSON"

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        return "".join(map(chr, token_ids))

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> str:
        return json.dumps(conversation, ensure_ascii=False)


class ChatEngine:
    """Replies from /chat/completions. The server's own template, window and thinking apply."""

    max_length = 2**31
    """Nobody here knows it: a prompt that is too long is refused by the server."""

    def __init__(self, server: Server, model: str, *, threads: int = 16) -> None:
        self.server = server
        self.model = model
        self.tokenizer: Tokenizer = Messages()
        self._threads = threads
        ways: tuple[tuple[Mapping[str, Any], str], ...] = (
            (HABITS, "max_tokens"),
            ({}, "max_tokens"),
            ({}, "max_completion_tokens"),
        )
        for self._habits, self._limit in ways:  # OpenAI refuses words that it does not know; so do its newer models
            try:
                self._post(self._body([{"role": "user", "content": "Say yes."}], Generation(max_tokens=16)))
                return
            except Refused as refused:
                if refused.status not in CANNOT or (self._habits, self._limit) == ways[-1]:
                    raise

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        jobs = []
        for index, request in enumerate(requests):
            assert request.generation is not None and not request.continuations, "check() refuses log-likelihood"
            messages = json.loads(self.tokenizer.decode(request.prompt))
            jobs.append((index, messages, self._body(messages, request.generation)))
        with ThreadPool(self._threads) as pool:
            for index, messages, found in pool.imap_unordered(lambda job: (*job[:2], self._post(job[2])), jobs):
                generation = requests[index].generation
                assert generation is not None
                with understood(self.server):
                    said = self._said(messages, generation, found)
                yield index, Reply(generated=said)

    def check(self, settings: Settings) -> None:
        """ValueError for settings that can't be served by messages."""
        if LOGLIKELIHOOD in settings.modes:
            raise ValueError(
                "log-likelihood is refused: endpoint=chat gives no log-probabilities of an answer that others wrote; "
                "use --mode generation"
            )
        if not settings.chat:
            raise ValueError("endpoint=chat sends messages, not text: add --chat")
        if settings.thought_budget():
            raise ValueError("endpoint=chat leaves thinking to the server: leave --thinking off, raise --max-tokens")

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        return self.server.post("/chat/completions", {"model": self.model, **body}, needs="choices")

    def _body(self, messages: list[dict[str, str]], generation: Generation, stopping: bool = True) -> dict[str, Any]:
        body = {"messages": messages, self._limit: generation.max_tokens, **sampling(generation), **self._habits}
        return {**body, "stop": list(generation.stops[:STOPS])} if stopping and generation.stops else body

    def _said(self, messages: list[dict[str, str]], generation: Generation, found: dict[str, Any]) -> Generated:
        end, text, thought = self._read(found)
        inside = in_thought(text, generation) or (thought and not text)  # where no stop string counts
        if end != "length" and generation.stops and inside:
            found = self._post(self._body(messages, generation, stopping=False))
            end, text, thought = self._read(found)
        cut = first_stop(text, generation.stops)
        text = text if cut is None else text[:cut]
        stopped = cut is not None or (end == "eos" and bool(generation.stops))  # as the text-only OpenAIEngine has it
        finish: Literal["eos", "stop", "length"] = "stop" if stopped else end
        count = (found.get("usage") or {}).get("completion_tokens") or 0
        return Generated(
            text=text,
            tokens=(-1,) * count,  # so many, and the server keeps to itself which
            finish=finish,
            thought=thought,
            cut_in="thought" if thought and not text and finish == "length" else "",
        )

    def _read(self, found: dict[str, Any]) -> tuple[Literal["eos", "length"], str, str]:
        """(why it ended, the answer, the thought before it)"""
        choice = found["choices"][0]
        message = choice.get("message") or {}
        thought = str(message.get("reasoning_content") or message.get("reasoning") or "")
        return ended(self.server, choice), str(message.get("content") or ""), thought
