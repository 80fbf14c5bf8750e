"""The engine that can't go wrong: every text alone, from its first token, without a cache, a batch or padding."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from evalkit.records import Generated, Reply, Request


class NaiveEngine:
    def __init__(self, model: Any, tokenizer: Any, eos: frozenset[int] = frozenset({1}), window: int = 2**31) -> None:
        self.model, self.tokenizer, self.eos, self.max_length = model, tokenizer, eos, window

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for index, request in enumerate(requests):
            rows = tuple(self.score(request.prompt, tail) for tail in request.continuations)
            yield index, Reply(logprobs=rows, generated=self.say(request) if request.generation else None)

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """[tokens, vocabulary]"""
        with torch.inference_mode():
            return self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float()

    def score(self, prompt: Sequence[int], tail: Sequence[int]) -> tuple[float, ...]:
        rows = self.logits((*prompt, *tail)).double().log_softmax(-1)
        return tuple(float(rows[len(prompt) + k - 1, token]) for k, token in enumerate(tail))

    def say(self, request: Request) -> Generated:
        asked = request.generation
        assert asked is not None
        digest = hashlib.sha256(f"{asked.seed} {request.prompt}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        tokens: list[int] = []
        while len(tokens) < asked.max_tokens:
            scores = self.logits((*request.prompt, *tokens))[-1]
            if asked.temperature:
                noise = torch.empty(scores.shape).exponential_(generator=generator)
                scores = scores / asked.temperature - noise.log()
            token = int(scores.argmax())
            if token in self.eos:
                return Generated(text=self.text(tokens), tokens=tuple(tokens), finish="eos")
            tokens.append(token)
            text = self.text(tokens)
            found = [text.index(stop) for stop in asked.stops if stop in text]
            if found:
                return Generated(text=text[: min(found)], tokens=tuple(tokens), finish="stop")
        return Generated(text=self.text(tokens), tokens=tuple(tokens), finish="length")

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
