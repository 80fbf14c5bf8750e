"""A model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a provider's API), through /completions.

What a server can do is found by asking it, before anything is scored; what it answers is compared with what it was
sent, token by token where it tells. Log-probabilities of a prompt are taken from vLLM's ``prompt_logprobs``, or from
``echo`` with ``logprobs``, as lm-evaluation-harness does; a server that offers neither can only generate.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from typing import Any, Literal

from evalkit.encoding import CLOSE, Tokenizer
from evalkit.engines.replies import cut_reply, first_stop, in_thought
from evalkit.engines.server import Refused, Server
from evalkit.records import LOGLIKELIHOOD, Generated, Generation, Reply, Request
from evalkit.settings import Settings

PROBE = "In 1984, Zoë paid 12 € for a naïve dog:\n\tWoof!"
"""Text that two tokenizers seldom make the same number of tokens of."""
HABITS: Mapping[str, Any] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""No sampling habits of the model's own generation_config.json, which vLLM and its like would apply."""
EXTRAS: Mapping[str, Any] = {"return_token_ids": True, **HABITS}
"""What vLLM understands beyond OpenAI's protocol."""
_WAYS: Mapping[str, Mapping[str, Any]] = {
    "prompt_logprobs": {"prompt_logprobs": 0},
    "echo": {"echo": True, "logprobs": 1},
}
_FLOOR = -9999.0
"""What vLLM writes for minus infinity, which JSON lacks."""
STOPS = 4
"""More are refused by OpenAI's protocol; all are looked for here again."""
CANNOT = (400, 404, 405, 415, 422, 501)
"""Statuses of a server that does not know what it is asked for."""
_ENDS: Mapping[str, Literal["eos", "length"]] = {
    "stop": "eos",
    "eos": "eos",
    "eos_token": "eos",
    "stop_sequence": "eos",
    "end_turn": "eos",
    "content_filter": "eos",
    "length": "length",
    "max_tokens": "length",
}


class Mismatch(ValueError):
    """The server's answer is not one to what it was sent."""

    def __init__(self, server: Server, what: str) -> None:
        self.what = server.clean(what)
        super().__init__(f"the server {server.url} {self.what}")


@contextlib.contextmanager
def understood(server: Server) -> Iterator[None]:
    """JSON of another shape than the protocol's is a mismatch."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise Mismatch(server, f"answered in a form that is not OpenAI's ({type(error).__name__}: {error})") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What a server was found to understand."""

    ids: bool
    """Prompts may be token ids, so nothing is tokenised twice."""
    extras: bool
    """``EXTRAS`` are accepted."""
    token_ids: bool
    """Replies come with their token ids."""
    scores: Literal["prompt_logprobs", "echo", ""]
    """Where a prompt's log-probabilities are; empty: nowhere."""
    why_not: str = ""
    """For each way in which the server gives no scores, what it did."""
    system: str = ""
    """The server's own name of its build (``system_fingerprint``)."""


class OpenAIEngine:
    """Asks for every score and every reply in a request of its own, ``threads`` of them at a time."""

    def __init__(
        self,
        server: Server,
        model: str,
        tokenizer: Tokenizer,
        *,
        eos: frozenset[int],
        window: int,
        threads: int = 16,
    ) -> None:
        self.server = server
        self.model = model
        self._tokenizer = tokenizer
        self._eos = eos
        self._threads = threads
        bos = tokenizer.bos_token_id
        self._bos = (bos,) if bos is not None and tokenizer.encode("x", add_special_tokens=True)[:1] == [bos] else ()
        with understood(server):
            self.dialect = self._probe()
        # A server generates at least one token, and so needs room for one behind what it scores.
        self.max_length = window - 1 if self.dialect.scores else window

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        # Tokenizers are used by this thread alone: they may refuse two at once.
        jobs = [
            (i, j, self._score_body(request.prompt + tail))
            for i, request in enumerate(requests)
            for j, tail in enumerate(request.continuations)
        ]
        jobs += [(i, -1, self._say_body(r.prompt, r.generation)) for i, r in enumerate(requests) if r.generation]
        jobs.sort(key=lambda job: job[0])
        waits = [len(r.continuations) + (r.generation is not None) for r in requests]
        scores: dict[tuple[int, int], tuple[float, ...]] = {}
        said: dict[int, Generated] = {}
        with ThreadPool(self._threads) as pool:
            for i, j, found in pool.imap_unordered(lambda job: (job[0], job[1], self._post(job[2])), jobs):
                request = requests[i]
                with understood(self.server):
                    if j >= 0:
                        tail = request.continuations[j]
                        scores[i, j] = self._scores(request.prompt + tail, found)[-len(tail) :]
                    elif request.generation:
                        said[i] = self._said(request.prompt, request.generation, found)
                waits[i] -= 1
                if not waits[i]:
                    rows = tuple(scores.pop((i, k)) for k in range(len(request.continuations)))
                    yield i, Reply(logprobs=rows, generated=said.pop(i, None))

    def _post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self.server.post("/completions", {"model": self.model, **body}, needs="choices")

    def check(self, settings: Settings) -> None:
        """ValueError for settings that this server can't serve."""
        if LOGLIKELIHOOD in settings.modes and not self.dialect.scores:
            raise ValueError(
                f"log-likelihood is refused: the server {self.server.url} gives no log-probabilities of a prompt's "
                f"tokens ({self.dialect.why_not}); use --mode generation"
            )
        if settings.thought_budget() and not self.dialect.token_ids:
            raise ValueError(
                f"thinking is refused: the server {self.server.url} does not tell a reply's tokens, so its thought "
                f"can't be carried on; use --thinking off"
            )

    # --- prompts ---

    def _sent(self, tokens: Sequence[int]) -> list[int] | str:
        """The prompt as the server takes it; text only where tokenising it gives ``tokens`` again."""
        if self.dialect.ids:
            return list(tokens)
        bare = tokens[len(self._bos) :] if tuple(tokens[: len(self._bos)]) == self._bos else tokens
        text = self._tokenizer.decode(bare, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if list(self._tokenizer.encode(text, add_special_tokens=True)) != list(tokens):
            raise ValueError(
                f"the server {self.server.url} takes text only, and this prompt of {len(tokens)} tokens is another one "
                f"after it was written as text and read again: ...{text[-60:]!r}"
            )
        return text

    def _read(self, tokens: Sequence[int], found: Mapping[str, Any]) -> Mapping[str, Any]:
        """The one choice of a reply to ``tokens``; ValueError if the server read something else."""
        choice = found["choices"][0]
        count = self._prompt_tokens(found)
        ids = choice.get("prompt_token_ids")
        if count != len(tokens) or (ids is not None and list(ids) != list(tokens)):
            others = " others" if count == len(tokens) else ""
            raise Mismatch(
                self.server,
                f"read a prompt of {len(tokens)} tokens as {count}{others}: it tokenises or cuts prompts in its own "
                f"way, so what it says is no answer to what was asked",
            )
        return choice  # type: ignore[no-any-return]

    def _prompt_tokens(self, found: Mapping[str, Any]) -> int:
        count = (found.get("usage") or {}).get("prompt_tokens")
        if not isinstance(count, int):
            raise Mismatch(self.server, "reports no usage.prompt_tokens, so what it read can't be checked")
        return count

    # --- log-likelihood ---

    def _score_body(self, tokens: tuple[int, ...]) -> dict[str, Any]:
        assert self.dialect.scores, "check() refuses log-likelihood"
        return self._scoring(self._sent(tokens), self.dialect.scores)

    def _scoring(self, prompt: list[int] | str, way: str) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": 1, "temperature": 0.0, **_WAYS[way]}

    def _scores(self, tokens: Sequence[int], found: Mapping[str, Any], way: str = "") -> tuple[float, ...]:
        """The log-probability (nats) of each of ``tokens`` but the first, checked to be theirs."""
        choice = self._read(tokens, found)
        rows: list[Any]
        if (way or self.dialect.scores) == "prompt_logprobs":
            rows = choice.get("prompt_logprobs") or []
            if len(rows) != len(tokens):
                raise Mismatch(self.server, f"gave {len(rows)} prompt_logprobs for {len(tokens)} tokens")
            # Each row may hold likelier tokens too; the prompt's own is there whatever its rank.
            values = [(row or {}).get(str(t), {}).get("logprob") for row, t in zip(rows[1:], tokens[1:], strict=True)]
        else:
            told = choice.get("logprobs") or {}
            texts, rows = told.get("tokens") or [], told.get("token_logprobs") or []
            # Servers do or don't tell the generated token's.
            if len(rows) - len(tokens) not in (0, 1) or len(texts) != len(rows):
                raise Mismatch(self.server, f"gave {len(rows)} echoed logprobs for {len(tokens)} tokens")
            for text, token in zip(texts, tokens, strict=False):
                if not self._same_text(str(text), token):
                    raise Mismatch(self.server, f"echoed token {token} as {text!r}")
            values = rows[1 : len(tokens)]
        for value, token in zip(values, tokens[1:], strict=True):
            if not isinstance(value, (int, float)) or not _FLOOR < value <= 1e-3:
                raise Mismatch(self.server, f"gave token {token} the log-probability {value}")
        return tuple(map(float, values))

    def _same_text(self, text: str, token: int) -> bool:
        """Servers write a token's space and its lone bytes in ways of their own; what is left must be equal."""
        own = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" in own or "\ufffd" in text or text.startswith(("bytes:", "<0x")) or not text:
            return True
        spaces = str.maketrans("", "", "\u2581\u0120 ")
        return text.translate(spaces) == own.translate(spaces) or text == f"token_id:{token}"

    # --- generation ---

    def _say_body(self, prompt: tuple[int, ...], generation: Generation, stopping: bool = True) -> dict[str, Any]:
        body = {"prompt": self._sent(prompt), "max_tokens": generation.max_tokens, **sampling(generation)}
        if stopping and generation.stops:
            body["stop"] = list(generation.stops[:STOPS])
        if self.dialect.extras:
            body |= {**EXTRAS, "skip_special_tokens": CLOSE not in generation.stops}
        return body

    def _said(self, prompt: tuple[int, ...], generation: Generation, found: Mapping[str, Any]) -> Generated:
        choice = self._read(prompt, found)
        finish = ended(self.server, choice)
        text = str(choice.get("text") or "")
        if finish != "length" and generation.stops and in_thought(text, generation):
            choice = self._read(prompt, self._post(self._say_body(prompt, generation, stopping=False)))
            finish, text = ended(self.server, choice), str(choice.get("text") or "")
        if not self.dialect.token_ids:
            return self._from_text(text, finish, generation)
        reason = choice.get("stop_reason")  # the stop string, or the token that ended the reply
        eos = self._eos | {reason} if isinstance(reason, int) else self._eos
        said = cut_reply(self._tokenizer, list(choice["token_ids"]), generation, eos)
        if said.finish == "length" and finish != "length":  # the token that ended it was left out
            said = replace(said, finish="stop" if isinstance(reason, str) else finish)
        return said

    def _from_text(self, text: str, finish: Literal["eos", "length"], generation: Generation) -> Generated:
        """Without token ids: the text is tokenised again, and where stop strings were given, one ended the reply."""
        cut = first_stop(text, generation.stops)
        text = text if cut is None else text[:cut]
        stopped = cut is not None or (finish == "eos" and bool(generation.stops))
        tokens = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        return Generated(text=text, tokens=tokens, finish="stop" if stopped else finish)

    # --- what the server understands ---

    def _probe(self) -> Dialect:
        whole = list(self._tokenizer.encode(PROBE, add_special_tokens=True))
        bare = list(self._tokenizer.encode(PROBE, add_special_tokens=False))
        short = {"max_tokens": 1, "temperature": 0.0}
        extras: Mapping[str, Any] = EXTRAS
        try:
            found = self._post({"prompt": PROBE, **short, **extras})
        except Refused as refused:
            if refused.status in (404, 405, 501):
                raise ValueError(
                    f"{refused}. Where it serves /chat/completions alone, send messages: "
                    f"--engine-option endpoint=chat --chat --mode generation"
                ) from refused
            if refused.status not in CANNOT:
                raise
            extras = {}
            found = self._post({"prompt": PROBE, **short})
        choice, count = found["choices"][0], self._prompt_tokens(found)
        theirs = choice.get("prompt_token_ids") or whole
        told = isinstance(choice.get("token_ids"), list)
        # Whether text gets a BOS may differ: it matters only where prompts must be text.
        alike = theirs in (whole, bare) or theirs[1:] == bare
        if count not in (len(whole), len(bare), len(bare) + 1) or not alike:
            raise ValueError(
                f"the server {self.server.url} makes {count} tokens of a text of which the tokenizer makes "
                f"{len(whole)}{', others' if count == len(whole) else ''}: not the same tokenizer. Name the model's "
                f"own: --engine-option tokenizer=FOLDER_OR_ID"
            )
        ids = self._takes({"prompt": whole, **short, **extras}, len(whole))
        if not ids and count != len(whole):
            raise ValueError(
                f"the server {self.server.url} takes text only, and reads it as {count} tokens where the tokenizer "
                f"makes {len(whole)}: it {'leaves out the' if count < len(whole) else 'adds a'} BOS token"
            )
        self.dialect = Dialect(
            ids=ids,
            extras=bool(extras),
            token_ids=told,
            scores="",
            system=self.server.clean(str(found.get("system_fingerprint") or "")),
        )
        why = []
        for way in ("prompt_logprobs", "echo"):
            try:
                with understood(self.server):
                    self._scores(whole, self._post(self._scoring(self._sent(whole), way)), way)
                return replace(self.dialect, scores=way)
            except Refused as refused:
                if refused.status not in CANNOT:
                    raise
                why.append(f"{way}: {refused.said}")
            except Mismatch as mismatch:
                why.append(f"{way}: it {mismatch.what}")
        return replace(self.dialect, why_not="; ".join(why))

    def _takes(self, body: Mapping[str, Any], count: int) -> bool:
        try:
            return self._prompt_tokens(self._post(body)) == count
        except Refused as refused:
            if refused.status not in CANNOT:
                raise
            return False


def sampling(generation: Generation) -> dict[str, Any]:
    """Greedy at temperature 0. Samples are the server's own: no two engines draw alike."""
    if not generation.temperature:
        return {"temperature": 0.0}
    return {"temperature": generation.temperature, "top_p": 1.0, "seed": generation.seed}


def ended(server: Server, choice: Mapping[str, Any]) -> Literal["eos", "length"]:
    """Why a reply ended, short of which of the two: end-of-sequence token or stop string."""
    reason = server.clean(str(choice.get("finish_reason")))
    if reason not in _ENDS:
        raise ValueError(
            f"the server {server.url} ended a reply for the reason {reason!r}, which is none that is known"
        )
    return _ENDS[reason]
