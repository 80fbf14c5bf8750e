"""A server on loopback that speaks OpenAI's protocol for a tiny model, in one of four dialects, and fails on demand."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from evalkit.engines.hf import HFEngine
from evalkit.records import Generation, Request

COMMON = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop"}
FIELDS = {
    "vllm": COMMON
    | {"prompt_logprobs", "return_token_ids", "top_k", "min_p", "repetition_penalty"}
    | {"skip_special_tokens", "echo", "logprobs"},
    "echo": COMMON | {"echo", "logprobs"},
    "text": COMMON,
    "chat": {"model", "messages", "max_tokens", "temperature", "top_p", "seed", "stop"},
}
"""What each dialect takes; anything else is refused. Only the first two take token ids and score prompts."""

Fault = Callable[["Handler"], None]
"""Answers a request in place of the model."""


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, model: Any, tokenizer: Any, dialect: str, name: str = "tiny") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine = HFEngine(model, tokenizer, batch_size=1)
        self.tokenizer = tokenizer
        self.dialect = dialect
        self.name = name
        self.key = ""
        """Wanted of every request; empty: none is."""
        self.faults: dict[int, Fault] = {}
        """By the number of the POST, counted from 0."""
        self.otherwise: Fault | None = None
        """For every POST from number ``since`` on."""
        self.since = 0
        self.change: Callable[[dict[str, Any]], None] = lambda reply: None
        """Falsifies the replies."""
        self.posts = 0
        self.bodies: list[dict[str, Any]] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.computing = threading.Lock()  # tokenizers may refuse two threads at once, and so does the engine
        self.over = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are two packets, and the second would wait 40 ms for an echo

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, content: Any, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str, **headers: str) -> None:
        self.send({"error": {"message": message, "code": status}}, status, **headers)

    def authorised(self) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given == self.server.key or not self.server.key:
            return True
        self.refuse(401, f"Incorrect API key provided: {given}.")
        return False

    def do_GET(self) -> None:
        if self.authorised():
            entry = {"id": self.server.name, "object": "model"}
            if self.server.dialect == "vllm":
                entry |= {"max_model_len": self.server.engine.max_length}
            self.send({"object": "list", "data": [entry]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number, server.posts = server.posts, server.posts + 1
            server.bodies.append(body)
            server.busy += 1
            server.busiest = max(server.busy, server.busiest)
        try:
            fault = server.faults.get(number) or (server.otherwise if number >= server.since else None)
            if not self.authorised():
                return
            if fault is not None:
                fault(self)
                return
            extra = set(body) - FIELDS[server.dialect]
            path = "/v1/chat/completions" if server.dialect == "chat" else "/v1/completions"
            if self.path != path:
                self.refuse(404, "Not Found")
            elif extra:
                self.refuse(400, f"Unrecognized request argument supplied: {', '.join(sorted(extra))}")
            elif server.dialect == "text" and not isinstance(body["prompt"], str):
                self.refuse(422, "prompt should be a string")
            else:
                with server.computing:
                    if server.over:
                        hang_up(self)
                        return
                    reply = self.chat(body) if server.dialect == "chat" else self.complete(body)
                server.change(reply)
                self.send(reply)
        finally:
            with server.lock:
                server.busy -= 1

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        tokenizer = self.server.tokenizer
        text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        sent = tokenizer.encode(text, add_special_tokens=False)
        said, choice, usage = self.generate(sent, body)
        del choice["token_ids"]
        choice["message"] = {"role": "assistant", "content": choice.pop("text")}
        return {"choices": [choice], "usage": usage}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        tokenizer, prompt = self.server.tokenizer, body["prompt"]
        sent = tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
        said, choice, usage = self.generate(sent, body)
        if "prompt_logprobs" in body or body.get("echo"):
            [(_, reply)] = self.server.engine.answer([Request(prompt=(sent[0],), continuations=(tuple(sent[1:]),))])
            values = reply.logprobs[0]
        if "prompt_logprobs" in body:
            entries = [{str(t): {"logprob": v, "rank": 7}} for t, v in zip(sent[1:], values, strict=True)]
            choice["prompt_logprobs"] = [None, *entries]
        if body.get("echo"):
            texts = [tokenizer.decode([t], skip_special_tokens=False) for t in (*sent, *said)]
            choice["logprobs"] = {"tokens": texts, "token_logprobs": [None, *values, *(-0.5 for _ in said)]}
            choice["text"] = "".join(texts)
        if body.get("return_token_ids"):
            choice["prompt_token_ids"] = sent
        else:
            del choice["token_ids"]
        if self.server.dialect != "vllm":
            del choice["stop_reason"]
        return {"choices": [choice], "usage": usage, "system_fingerprint": "fake-1"}

    def generate(self, sent: list[int], body: dict[str, Any]) -> tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]:
        engine = self.server.engine
        stops = tuple(body.get("stop", ()))
        generation = Generation(max_tokens=body["max_tokens"], stops=stops, temperature=body["temperature"])
        [(_, reply)] = engine.answer([Request(prompt=tuple(sent), generation=generation)])
        said = reply.generated
        assert said is not None
        ids = [*said.tokens, *([self.server.tokenizer.eos_token_id] if said.finish == "eos" else [])]
        reason = next((s for s in stops if said.finish == "stop" and s in engine.tokenizer.decode(said.tokens)), None)
        choice = {
            "index": 0,
            "text": said.text,
            "token_ids": ids,
            "finish_reason": "length" if said.finish == "length" else "stop",
            "stop_reason": reason,
        }
        return said.tokens, choice, {"prompt_tokens": len(sent), "completion_tokens": len(ids)}


@contextmanager
def serving(model: Any, tokenizer: Any, dialect: str = "vllm") -> Iterator[FakeServer]:
    with FakeServer(model, tokenizer, dialect) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            with server.computing:  # what a client gave up is still computed, with a model that the next server shares
                server.over = True


# --- faults ---


def status(code: int, message: str = "no", **headers: str) -> Fault:
    return lambda handler: handler.refuse(code, message, **headers)


def half_an_answer(handler: Handler) -> None:
    """JSON that ends in the middle, though the length says otherwise."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"te')
    handler.close_connection = True


def broken_json(handler: Handler) -> None:
    handler.send(b'{"choices": [{"te')


def html(handler: Handler) -> None:
    handler.send(b"<html><body>Sign in</body></html>", kind="text/html")


def no_choice(handler: Handler) -> None:
    handler.send({"choices": [], "usage": {"prompt_tokens": 1}})


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def slow(handler: Handler) -> None:
    time.sleep(1.5)
    handler.close_connection = True
