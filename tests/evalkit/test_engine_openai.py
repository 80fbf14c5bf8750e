"""Engine openai against the transformers engine, over servers of four dialects that run the same model; and faults."""

import datetime
import email.utils
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import evalkit as ek
from evalkit.engines import server as server_module
from evalkit.engines.hf import HFEngine
from evalkit.engines.messages import ChatEngine
from evalkit.engines.openai import Mismatch, OpenAIEngine
from evalkit.engines.server import Refused, Server, checked_url
from evalkit.engines.thinking import ThinkingEngine
from evalkit.records import Generated, Generation, ItemRecord, Request, Thought
from models.load import load
from tests.evalkit.test_engine_hf import mixed_requests
from tests.fake_server import (
    FakeServer,
    Fault,
    broken_json,
    half_an_answer,
    hang_up,
    html,
    no_choice,
    serving,
    slow,
    status,
)
from tests.oracles import CharTokenizer, assert_same_replies
from tests.tiny import THINKING, chain_llama, tiny_llama, tiny_tokenizer

KEY = "sk-secret-417"
TASKS = ["quick", "arithmetic"]
N = 2
PROBES = 3
"""POSTs before the first item, where the server takes all that is asked of it."""


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "BACKOFF_S", 0.0)
    for name in (*server_module.KEYS, "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Any:
    return load(str(tiny_folder))


@pytest.fixture(params=["vllm", "echo"])
def scoring(request: pytest.FixtureRequest, loaded: Any) -> Iterator[FakeServer]:
    with serving(loaded.model, loaded.tokenizer, request.param) as server:
        yield server


@pytest.fixture
def vllm(loaded: Any) -> Iterator[FakeServer]:
    with serving(loaded.model, loaded.tokenizer, "vllm") as server:
        yield server


@pytest.fixture(scope="module")
def expected(tiny_folder: Path) -> Any:
    return ek.run(tiny_folder, TASKS, limit=N, batch_size=1)


def run(server: FakeServer, folder: Path, tasks: Any = TASKS, options: Any = None, **more: Any) -> Any:
    chosen = {"tokenizer": str(folder), "concurrency": 4, **(options or {})}
    settings = {"limit": N, "engine": "openai", "base_url": server.url, "engine_options": chosen, **more}
    return ek.run("tiny", tasks, **settings)


def assert_same_run(found: Any, expected: Any, counted: bool = True) -> None:
    """Log-probabilities may differ in float32's last digits: a server scores whole prompts, not their ends. Where it
    does not tell a reply's tokens, they are not ``counted``: the lone bytes of random text are read as other ones."""
    for task in expected.tasks:
        one, other = found.records(task), expected.records(task)
        assert set(one) == set(other)
        for item in other:
            assert logprobs(one[item]) == pytest.approx(logprobs(other[item]), rel=1e-5)
            assert without(one[item], counted) == without(other[item], counted)


def logprobs(record: ItemRecord) -> list[float]:
    return [value for outcome in record.outcomes for value in (*outcome.logprobs, *outcome.blind)]


def without(record: ItemRecord, counted: bool) -> ItemRecord:
    outcomes = [replace(o, logprobs=(), blind=(), num_tokens=o.num_tokens * counted) for o in record.outcomes]
    return replace(record, outcomes=tuple(outcomes))


def engine(server: FakeServer, **more: Any) -> OpenAIEngine:
    """Over the fake's own model and tokenizer."""
    how = {"eos": frozenset({1}), "window": server.engine.max_length, **more}
    return OpenAIEngine(Server(server.url), server.name, server.tokenizer, **how)


def said(text: str) -> Request:
    return Request(prompt=tuple(tiny_tokenizer().encode(text)), generation=Generation(max_tokens=4))


# --- the same as transformers ---


def test_a_run_is_that_of_the_transformers_engine(
    scoring: FakeServer, tiny_folder: Path, expected: Any, tmp_path: Path
) -> None:
    assert_same_run(run(scoring, tiny_folder, out=tmp_path), expected, counted=scoring.dialect == "vllm")
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert manifest["sessions"][0]["scores"] == {"vllm": "prompt_logprobs", "echo": "echo"}[scoring.dialect]
    assert manifest["model"]["parts"]["weights"] == f"unknown: tiny at {scoring.url}"
    before = scoring.posts
    run(scoring, tiny_folder, out=tmp_path)
    assert scoring.posts - before <= 5, "a finished run asks for nothing but what the server understands"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("dialect", ["vllm", "echo"])
def test_replies_are_those_of_the_transformers_engine(dialect: str, bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    with serving(tiny_llama(len(tokenizer)), tokenizer, dialect) as server:
        requests = mixed_requests(tokenizer)
        if dialect != "vllm":  # without token ids, a reply's tokens are those of its text
            requests = [replace(r, generation=None) for r in requests if r.continuations]
        served = engine(server)
        assert_same_replies(requests, dict(server.engine.answer(requests)), dict(served.answer(requests)))
        served.server.close()


@pytest.mark.parametrize("bos", [False, True])
def test_text_prompts_get_the_same_replies(bos: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    model = tiny_llama(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with serving(model, tokenizer, "text") as server:
        for chat in (False, True):
            found = run(server, tmp_path, mode="generation", chat=chat)
            for task in TASKS:
                wanted = ek.run(tmp_path, task, limit=N, mode="generation", chat=chat).records(task)
                for item, record in found.records(task).items():
                    [one], [other] = record.outcomes, wanted[item].outcomes
                    assert (one.reply, one.outcome, one.answer) == (other.reply, other.outcome, other.answer)
                    assert (one.finish == "length") == (other.finish == "length")
        assert all(isinstance(body["prompt"], (str, list)) for body in server.bodies)
        assert any(isinstance(body["prompt"], str) for body in server.bodies[-3:])


def test_messages_get_the_replies_of_the_chat_template(loaded: Any, tiny_folder: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"limit": N, "chat": True, "system": "Be brief.", "mode": "generation"}
    wanted = ek.run(tiny_folder, TASKS, **how)
    with serving(loaded.model, loaded.tokenizer, "chat") as server:
        how |= {"engine": "openai", "base_url": server.url, "engine_options": {"endpoint": "chat"}}
        found = ek.run("tiny", TASKS, out=tmp_path, **how)
        for task in TASKS:
            for item, record in found.records(task).items():
                [one], [other] = record.outcomes, wanted.records(task)[item].outcomes
                assert (one.reply, one.outcome, one.num_tokens) == (
                    other.reply,
                    other.outcome,
                    other.num_tokens + (other.finish == "eos"),
                )
        assert server.bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
        refused = {
            "log-likelihood is refused": {"mode": "both"},
            "add --chat": {"chat": False, "system": ""},
            "thinking to the server": {"thinking": "on"},
        }
        for words, change in refused.items():
            with pytest.raises(ValueError, match=words):
                ek.run("tiny", TASKS, out=tmp_path / "refused", **{**how, **change})
        assert not (tmp_path / "refused").exists()


def test_stop_strings_end_messages_too(loaded: Any) -> None:
    prompt = tuple(map(ord, json.dumps([{"role": "user", "content": "Why?"}])))

    def said(engine: ChatEngine, *stops: str) -> Generated:
        [(_, reply)] = engine.answer([Request(prompt=prompt, generation=Generation(max_tokens=12, stops=stops))])
        assert reply.generated is not None
        return reply.generated

    with serving(loaded.model, loaded.tokenizer, "chat") as server:
        engine = ChatEngine(Server(server.url), "tiny")
        whole = said(engine).text
        stop = whole[len(whole) // 2 :][:2]
        cut = said(engine, stop)
        assert server.bodies[-1]["stop"] == [stop]
        assert (cut.text, cut.finish) == (whole[: whole.index(stop)], "stop")
        said(engine, "a!", "b!", "c!", "d!", stop)  # more than the protocol takes
        assert (said(engine, "a!", "b!", "c!", "d!", stop).text, len(server.bodies[-1]["stop"])) == (cut.text, 4)

        def thinks(reply: dict[str, Any]) -> None:
            stopped = "stop" in server.bodies[-1]
            reply["choices"][0]["message"]["content"] = "<think>a\n\nb" if stopped else "<think>a\n\nb</think>c\n\nd"
            reply["choices"][0]["finish_reason"] = "stop"

        server.change = thinks
        assert said(engine, "\n\n").text == "<think>a\n\nb</think>c", "no stop string counts in a thought"


@pytest.mark.parametrize("how", [{"revision": "main"}, {"trust_remote_code": True}])
def test_messages_need_no_tokenizers_options(how: dict[str, Any]) -> None:
    options = {"engine": "openai", "base_url": "http://127.0.0.1:1/v1", "engine_options": {"endpoint": "chat"}}
    with pytest.raises(ValueError, match="endpoint=chat loads no tokenizer here"):
        ek.run("m", "quick", limit=1, chat=True, mode="generation", **options, **how)


def test_a_reasoning_server_keeps_its_thought_apart(loaded: Any, tmp_path: Path) -> None:
    def reasons(reply: dict[str, Any]) -> None:
        reply["choices"][0]["message"] = {"content": None, "reasoning_content": "Let me see"}
        reply["choices"][0]["finish_reason"] = "length"

    with serving(loaded.model, loaded.tokenizer, "chat") as server:
        server.change = reasons
        how: dict[str, Any] = {"engine": "openai", "base_url": server.url, "engine_options": {"endpoint": "chat"}}
        found = ek.run("tiny", "quick", limit=1, chat=True, mode="generation", **how)
    [outcome] = next(iter(found.records("quick").values())).outcomes
    assert (outcome.outcome, outcome.thought, outcome.cut_in) == ("truncated", "Let me see", "thought")


def test_newer_openai_models_are_told_their_limit_in_their_word(loaded: Any) -> None:
    with serving(loaded.model, loaded.tokenizer, "chat") as server:
        server.faults = dict.fromkeys((0, 1), status(400, "Unsupported parameter: 'max_tokens'."))
        how: dict[str, Any] = {"engine": "openai", "base_url": server.url, "engine_options": {"endpoint": "chat"}}
        with pytest.raises(ValueError, match="Unrecognized request argument supplied: max_completion_tokens"):
            ek.run("tiny", "quick", limit=1, chat=True, mode="generation", **how)
        asked = [set(body) - {"model", "messages", "temperature"} for body in server.bodies]
        assert asked == [
            {"max_tokens", "top_k", "min_p", "repetition_penalty"},
            {"max_tokens"},
            {"max_completion_tokens"},
        ]


@pytest.mark.parametrize(
    ("chain", "generation"),
    [
        (" a dog\n\nQuestion:", Generation(max_tokens=20, stops=("\n\n",))),
        (" a dog\n\nQuestion:", Generation(max_tokens=20, stops=("g\n", "zz", "yy", "xx", "a do"))),
        (" a dog", Generation(max_tokens=20, stops=("\n",))),
        (" a dog", Generation(max_tokens=1)),
        (" a dog\n", Generation(max_tokens=20)),
    ],
    ids=["stop string", "the fifth stop string", "end of sequence", "length", "no stop string"],
)
def test_replies_end_where_those_of_the_transformers_engine_end(chain: str, generation: Generation) -> None:
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.encode("Answer:", add_special_tokens=False)
    tokens = tokenizer.encode(chain, add_special_tokens=False)
    model = chain_llama(len(tokenizer), [prompt[-1], *dict.fromkeys(tokens)])
    request = Request(prompt=tuple(prompt), generation=generation)
    wanted = dict(HFEngine(model, tokenizer).answer([request]))
    with serving(model, tokenizer, "vllm") as server:
        served = engine(server)
        assert dict(served.answer([request])) == wanted
        served.server.close()


@pytest.mark.parametrize("leaves_out_the_end", [False, True])
def test_an_end_token_that_only_the_server_knows_ends_the_reply(leaves_out_the_end: bool) -> None:
    tokenizer = tiny_tokenizer()
    with serving(tiny_llama(len(tokenizer)), tokenizer, "vllm") as server:

        def ends(reply: dict[str, Any]) -> None:
            ids = [50, 51] if leaves_out_the_end else [50, 51, 3]
            reply["choices"][0] |= {"token_ids": ids, "finish_reason": "stop", "stop_reason": 3}

        served = engine(server)
        server.change = ends
        [(_, reply)] = served.answer([said("Answer:")])
        assert reply.generated is not None
        assert (reply.generated.tokens, reply.generated.finish) == ((50, 51), "eos")
        served.server.close()


def test_a_server_that_stops_inside_a_thought_is_asked_again_without_stop_strings() -> None:
    tokenizer = tiny_tokenizer()
    with serving(tiny_llama(len(tokenizer)), tokenizer, "vllm") as server:

        def thinks(reply: dict[str, Any]) -> None:
            cut = "stop" in server.bodies[-1]
            text = "<think>" if cut else "<think>\nhm</think>Rome\nx"
            ids = tokenizer.encode(text, add_special_tokens=False)
            reply["choices"][0] |= {"text": text, "token_ids": ids, "finish_reason": "stop", "stop_reason": None}

        served = engine(server)
        server.change = thinks
        prompt = tuple(tokenizer.encode("Answer:", add_special_tokens=False))
        [(_, reply)] = served.answer([Request(prompt=prompt, generation=Generation(max_tokens=30, stops=("\n",)))])
        assert reply.generated is not None and reply.generated.text == "<think>\nhm</think>Rome"
        assert reply.generated.finish == "stop"
        served.server.close()


def test_thinking_takes_two_passes_as_on_any_engine() -> None:
    tokenizer = tiny_tokenizer(chat=THINKING)
    model = tiny_llama(len(tokenizer))
    thought = Thought(max_tokens=6, close="</think>", force=True)
    prompt = tuple(tokenizer.encode("Answer: <think>", add_special_tokens=False))
    requests = [Request(prompt=prompt, generation=Generation(max_tokens=5, thought=thought))]
    with serving(model, tokenizer, "vllm") as server:
        served = engine(server)
        wanted = dict(ThinkingEngine(HFEngine(model, tokenizer)).answer(requests))
        assert dict(ThinkingEngine(served).answer(requests)) == wanted
        assert [body["skip_special_tokens"] for body in server.bodies[-2:]] == [False, True]
        served.server.close()


def test_one_token_choices_are_scored_whatever_their_rank(scoring: FakeServer) -> None:
    prompt = tuple(scoring.tokenizer.encode("Question: Which animal barks?\nAnswer:", add_special_tokens=False))
    request = Request(prompt=prompt, continuations=tuple((token,) for token in range(60, 100)))
    served = engine(scoring)
    assert_same_replies([request], dict(scoring.engine.answer([request])), dict(served.answer([request])))
    served.server.close()


def test_no_more_requests_at_a_time_than_asked(vllm: FakeServer, tiny_folder: Path) -> None:
    run(vllm, tiny_folder, options={"concurrency": 2})
    assert vllm.busiest <= 2


# --- a server that does not do what was asked ---


def more_tokens(reply: dict[str, Any]) -> None:
    reply["usage"]["prompt_tokens"] += 1


def no_usage(reply: dict[str, Any]) -> None:
    del reply["usage"]


def other_ids(reply: dict[str, Any]) -> None:
    reply["choices"][0]["prompt_token_ids"] = reply["choices"][0].get("prompt_token_ids", [5])[::-1]


def in_rows(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    def changed(reply: dict[str, Any]) -> None:
        rows = reply["choices"][0].get("prompt_logprobs")
        if rows:
            rows[-1] = change(rows[-1])

    return changed


def echoed(key: str, at: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def changed(reply: dict[str, Any]) -> None:
        if told := reply["choices"][0].get("logprobs"):
            told[key][at] = value

    return changed


def clamped(row: dict[str, Any]) -> dict[str, Any]:
    return {token: {**entry, "logprob": -9999.0} for token, entry in row.items()}


@pytest.mark.parametrize(
    ("dialect", "change", "words"),
    [
        ("vllm", more_tokens, "tokenises or cuts prompts in its own way"),
        ("vllm", no_usage, "reports no usage.prompt_tokens"),
        ("vllm", other_ids, "others"),
        ("vllm", in_rows(lambda row: {"7": {"logprob": -1.0}}), "the log-probability None"),
        ("vllm", in_rows(clamped), "the log-probability -9999.0"),
        ("vllm", in_rows(lambda row: {t: {"logprob": 0.5} for t in row}), "the log-probability 0.5"),
        ("vllm", lambda reply: reply["choices"][0].update(prompt_logprobs=None), "0 prompt_logprobs"),
        ("vllm", lambda reply: reply["choices"][0].update(prompt_logprobs=[0.5] * 999), "999 prompt_logprobs"),
        ("vllm", lambda reply: reply.update(choices=["x"]), "a form that is not OpenAI's"),
        ("echo", echoed("tokens", 2, "elsewhere"), "as 'elsewhere'"),
        ("echo", echoed("token_logprobs", 1, None), "the log-probability None"),
        ("echo", lambda reply: reply["choices"][0].update(logprobs=None), "0 echoed logprobs"),
    ],
)
def test_an_answer_to_something_else_is_refused(
    dialect: str, change: Callable[[dict[str, Any]], None], words: str, loaded: Any
) -> None:
    with serving(loaded.model, loaded.tokenizer, dialect) as server:
        served = engine(server)
        server.change = change
        prompt = tuple(server.tokenizer.encode("Answer:", add_special_tokens=False))
        with pytest.raises(Mismatch, match=words):
            list(served.answer([Request(prompt=prompt, continuations=((60, 61),))]))
        served.server.close()


@pytest.mark.parametrize("reason", [None, "abort"])
def test_a_reply_that_ended_for_no_known_reason_is_refused(reason: Any, vllm: FakeServer) -> None:
    served = engine(vllm)
    vllm.change = lambda reply: reply["choices"][0].update(finish_reason=reason)
    with pytest.raises(ValueError, match=f"for the reason '{reason}'"):
        list(served.answer([said("Answer:")]))
    served.server.close()


def test_without_logprobs_log_likelihood_is_refused_and_nothing_is_written(
    loaded: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    with serving(loaded.model, loaded.tokenizer, "text") as server:
        with pytest.raises(ValueError, match=r"log-likelihood is refused: .*Unrecognized.*use --mode generation"):
            run(server, tiny_folder, out=tmp_path / "run")
        with pytest.raises(ValueError, match="thinking is refused"):
            run(server, tiny_folder, mode="generation", chat=True, thinking="on", out=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_server_that_ignores_what_it_does_not_know_gives_no_scores(vllm: FakeServer, tiny_folder: Path) -> None:
    def ignorant(reply: dict[str, Any]) -> None:
        choice = reply["choices"][0]
        for key in ("prompt_logprobs", "logprobs", "token_ids", "prompt_token_ids", "stop_reason"):
            choice.pop(key, None)

    vllm.change = ignorant
    with pytest.raises(ValueError, match="prompt_logprobs: it gave 0 prompt_logprobs .*; echo: it gave 0 echoed"):
        run(vllm, tiny_folder)
    run(vllm, tiny_folder, mode="generation")


def test_another_tokenizer_is_noticed_before_anything_is_scored(vllm: FakeServer) -> None:
    with pytest.raises(ValueError, match=r"not the same tokenizer.*tokenizer=FOLDER_OR_ID"):
        OpenAIEngine(Server(vllm.url), "tiny", CharTokenizer(), eos=frozenset(), window=100)


@pytest.mark.parametrize(("bos", "words"), [(True, "leaves out the BOS token"), (False, "adds a BOS token")])
def test_a_bos_of_its_own_matters_only_to_a_server_that_takes_text(bos: bool, words: str) -> None:
    ours, theirs = tiny_tokenizer(bos=bos), tiny_tokenizer(bos=not bos)
    model = tiny_llama(len(ours))
    with serving(model, theirs, "text") as server, pytest.raises(ValueError, match=words):
        OpenAIEngine(Server(server.url), "tiny", ours, eos=frozenset(), window=100)
    with serving(model, theirs, "vllm") as server:
        served = OpenAIEngine(Server(server.url), "tiny", ours, eos=frozenset(), window=100)
        assert served.dialect.ids and served.dialect.scores
        served.server.close()


def test_a_prompt_that_text_cannot_carry_is_refused(loaded: Any) -> None:
    with serving(loaded.model, loaded.tokenizer, "text") as server:
        served = engine(server)
        piece = loaded.tokenizer.encode("é", add_special_tokens=False)[0]
        with pytest.raises(ValueError, match="another one after it was written as text"):
            list(served.answer([Request(prompt=(60, piece), generation=Generation(max_tokens=2))]))
        served.server.close()


# --- faults ---

PASSING: dict[str, Fault] = {
    "429": status(429),
    "429 with Retry-After": status(429, Retry_After="0"),
    "500": status(500),
    "503": status(503),
    "half an answer": half_an_answer,
    "broken JSON": broken_json,
    "a page": html,
    "no choice": no_choice,
    "hung up": hang_up,
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_changes_no_record(fault: str, vllm: FakeServer, tiny_folder: Path, expected: Any) -> None:
    vllm.faults = {1: PASSING[fault], PROBES + 4: PASSING[fault], PROBES + 9: PASSING[fault]}
    assert_same_run(run(vllm, tiny_folder), expected)


LASTING: dict[str, tuple[Fault, str]] = {
    "429": (status(429, "slow down"), "answered with status 429: slow down (3 tries)"),
    "500": (status(500, "out of memory"), "answered with status 500: out of memory (3 tries)"),
    "half an answer": (half_an_answer, "can't be reached: "),
    "broken JSON": (broken_json, 'answered /completions with no JSON but \'{"choices": [{"te\' (3 tries)'),
    "a page": (html, "answered /completions with no JSON but '<html><body>Sign in"),
    "no choice": (no_choice, "answered /completions without 'choices'"),
    "hung up": (hang_up, "can't be reached: Remote end closed connection"),
    "slow": (slow, "gave no answer within 1 s (--engine-option timeout=SECONDS)"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_lasts_is_one_line_and_the_run_goes_on_afterwards(
    fault: str, vllm: FakeServer, tiny_folder: Path, expected: Any, tmp_path: Path
) -> None:
    vllm.otherwise, words = LASTING[fault]
    vllm.since = PROBES + 20
    options = {"retries": 0 if fault == "slow" else 2, "timeout": 1 if fault == "slow" else 600, "concurrency": 1}
    with pytest.raises(ValueError) as raised:
        run(vllm, tiny_folder, out=tmp_path, options=options)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert "what is scored so far is kept" in str(raised.value)
    kept = (tmp_path / "outcomes.jsonl").read_text().splitlines()
    assert 0 < len(kept) < 2 * N
    vllm.otherwise = None
    assert_same_run(run(vllm, tiny_folder, out=tmp_path), expected)
    assert (tmp_path / "outcomes.jsonl").read_text().splitlines()[: len(kept)] == kept


def test_a_server_that_goes_away_is_one_line_and_the_run_goes_on_when_it_is_back(
    loaded: Any, tiny_folder: Path, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(loaded.model, loaded.tokenizer) as server:
        port = server.server_address[1]
        server.faults[PROBES + 20] = lambda handler: (server.socket.close(), hang_up(handler))  # type: ignore[func-returns-value]
        server.otherwise, server.since = hang_up, PROBES + 21
        with pytest.raises(ValueError, match=r"can't be reached: .*what is scored so far is kept"):
            run(server, tiny_folder, out=tmp_path, options={"retries": 2})
    monkeypatch.setattr(FakeServer, "server_bind", lambda self: _bind(self, port))
    with serving(loaded.model, loaded.tokenizer) as server:
        assert_same_run(run(server, tiny_folder, out=tmp_path), expected)


def _bind(server: FakeServer, port: int) -> None:
    server.server_address = ("127.0.0.1", port)
    server.socket.setsockopt(1, 2, 1)  # SO_REUSEADDR
    server.socket.bind(server.server_address)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(400, "This model's maximum context length is 2048 tokens"), "maximum context length is 2048"),
        (status(404, "gone"), "refused /completions (status 404): gone"),
        (status(307, "", Location="http://elsewhere/v1"), "sends /completions elsewhere (status 307)"),
        (status(401, "expired"), "wants a key (status 401: expired); set EVALKIT_API_KEY or OPENAI_API_KEY"),
    ],
)
def test_a_refusal_is_told_at_once(fault: Fault, words: str, vllm: FakeServer, tiny_folder: Path) -> None:
    vllm.faults[PROBES + 20] = fault
    with pytest.raises(Refused) as raised:
        run(vllm, tiny_folder)
    assert words in str(raised.value) and "\n" not in str(raised.value)


class Waits:
    """Stands in for the event that ends waits, and keeps their lengths."""

    def __init__(self) -> None:
        self.lengths: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.lengths.append(seconds)
        return False

    def set(self) -> None:
        pass


def test_waits_double_and_are_scattered_and_the_server_may_ask_for_more(
    vllm: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "BACKOFF_S", 1.0)
    date = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=100)
    asked = [None, None, None, "7", email.utils.format_datetime(date, usegmt=True), "soon"]
    vllm.faults = {i: status(429, **({"Retry_After": a} if a else {})) for i, a in enumerate(asked)}
    server = Server(vllm.url)
    server._closed = waits = Waits()  # type: ignore[assignment]
    server.get("/models")
    server.post("/completions", {"model": "tiny", "prompt": [60], "max_tokens": 1, "temperature": 0}, "choices")
    extra = [0, 0, 0, 7, 100, 0]
    for i, (wait, more) in enumerate(zip(waits.lengths, extra, strict=True)):
        assert 2**i / 2 - 2 <= wait - more <= 2**i, "the date is a whole second and passes"
    assert len({round(wait / 2**i, 6) for i, wait in enumerate(waits.lengths[:3])}) == 3
    vllm.faults = {vllm.posts: status(429, "come back tomorrow", Retry_After="86400")}
    with pytest.raises(ValueError, match="come back tomorrow"):
        server.post("/completions", {}, "choices")
    assert len(waits.lengths) == 6
    server.close()


def test_closing_ends_a_wait(vllm: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "BACKOFF_S", 1000.0)
    server = Server(vllm.url)
    server.get("/models")
    vllm.otherwise = status(500)
    server.close()
    with pytest.raises(ValueError, match="was closed"):
        server.post("/completions", {}, "choices")


# --- addresses, names and keys ---


def test_no_server_is_told_at_once(tiny_folder: Path, loaded: Any) -> None:
    with serving(loaded.model, loaded.tokenizer) as server:
        url = server.url
    with pytest.raises(ValueError, match=f"the server {url} can't be reached: Connection refused; is it running"):
        ek.run("tiny", TASKS, limit=1, engine="openai", base_url=url)


def test_a_wrong_model_name_is_told_with_the_right_one(vllm: FakeServer) -> None:
    with pytest.raises(ValueError, match=r"has no model 'tinny'; it has tiny; did you mean 'tiny'\?"):
        ek.run("tinny", TASKS, limit=1, engine="openai", base_url=vllm.url)


def test_a_tokenizer_that_is_not_here_can_be_named(vllm: FakeServer) -> None:
    with pytest.raises(ValueError, match=r"tokenizer of 'tiny' could not be loaded .*tokenizer=FOLDER_OR_ID"):
        ek.run("tiny", TASKS, limit=1, engine="openai", base_url=vllm.url)


def test_a_server_without_completions_is_told_with_the_way_out(loaded: Any, tiny_folder: Path) -> None:
    with (
        serving(loaded.model, loaded.tokenizer, "chat") as server,
        pytest.raises(ValueError, match="endpoint=chat --chat --mode generation"),
    ):
        run(server, tiny_folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_url": ""}, "needs its server"),
        ({"engine": "hf"}, "runs the model here"),
        ({"dtype": "float32"}, "chooses its own dtype"),
        ({"batch_size": 4}, "leave --batch-size out"),
        ({"options": {"concurrency": 0}}, "concurrency is 0: expected a whole number of 1 or more"),
        ({"options": {"timeout": "soon"}}, "timeout is 'soon'"),
        ({"options": {"endpoint": "responses"}}, "expected completions or chat"),
        ({"options": {"endpoint": "chat"}}, "no option 'tokenizer' with endpoint=chat"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    change: dict[str, Any], words: str, vllm: FakeServer, tiny_folder: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        run(vllm, tiny_folder, **change)


def test_another_server_or_model_is_another_run(
    vllm: FakeServer, loaded: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    run(vllm, tiny_folder, out=tmp_path)
    with (
        serving(loaded.model, loaded.tokenizer) as server,
        pytest.raises(ValueError, match=r"differs in model \(weights\)"),
    ):
        run(server, tiny_folder, out=tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{KEY}@127.0.0.1/v1",
        f"http://{KEY}@127.0.0.1/v1",
        f"http://127.0.0.1/v1?api_key={KEY}",
        f"http://127.0.0.1/v1#{KEY}",
        f"127.0.0.1/{KEY}",
        f"http://127.0.0.1:{KEY}/v1",
        f"ftp://127.0.0.1/{KEY}",
    ],
)
def test_an_address_that_may_hold_a_key_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="--base-url") as raised:
        checked_url(url)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("url", [f"http://127.0.0.1/{KEY}/v1", f"http://{KEY}.host/v1", "http://h/sk%2Dsecret-417"])
def test_an_address_with_the_key_in_it_is_refused_and_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match="--base-url holds the key in OPENAI_API_KEY") as raised:
        Server(url)
    assert KEY not in str(raised.value)


def test_what_a_server_says_is_shown_in_one_short_line_without_the_key(
    vllm: FakeServer, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert Server("http://h/v1").clean(f"a\n {KEY}\tb" + "c" * 999) == "a *** b" + "c" * 293

    def said(reply: dict[str, Any]) -> None:
        reply["system_fingerprint"] = f"build of\n{KEY}"

    vllm.change = said
    made = run(vllm, tiny_folder, "quick", limit=1, out=tmp_path)
    assert made.manifest.sessions[0]["system_fingerprint"] == "build of ***"

    def ends(reply: dict[str, Any]) -> None:
        reply["choices"][0]["finish_reason"] = f"{KEY}\n"

    vllm.change = ends
    with pytest.raises(ValueError, match=r"for the reason '\*\*\*'"):
        run(vllm, tiny_folder, "quick", limit=1)
    vllm.change = lambda _: None
    vllm.name = f"another-{KEY}"
    with pytest.raises(ValueError, match=r"it has another-\*\*\*"):
        run(vllm, tiny_folder)


@pytest.mark.parametrize("variable", ["EVALKIT_API_KEY", "OPENAI_API_KEY", "MY_KEY"])
def test_a_key_comes_from_the_environment_and_stays_there(
    variable: str,
    vllm: FakeServer,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    vllm.key = KEY
    monkeypatch.setenv(variable, KEY + "\n")
    options = {"api_key_env": "MY_KEY"} if variable == "MY_KEY" else {}
    with caplog.at_level("DEBUG"):
        run(vllm, tiny_folder, out=tmp_path, options=options)
    assert KEY not in caplog.text
    assert KEY not in "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    vllm.key = "another"
    with pytest.raises(ValueError, match=rf"refused the key in {variable} \(status 401: .*provided: \*\*\*") as raised:
        run(vllm, tiny_folder, options=options)
    vllm.otherwise = status(400, "x" * 290 + KEY)
    vllm.key = KEY
    with pytest.raises(ValueError, match=r"x\*\*\*") as halved:
        run(vllm, tiny_folder, options=options)
    chain = [halved.value, raised.value, raised.value.__cause__, raised.value.__context__]
    assert not any(KEY in repr(error) for error in chain)


@pytest.mark.parametrize("key", [f"{KEY}\n{KEY}", f"{KEY}é", f"{KEY} {KEY}"])
def test_a_key_that_no_header_takes_is_not_repeated(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters") as raised:
        Server("http://127.0.0.1:1/v1")
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("option", ["api_key", "api_key_env"])
def test_a_key_given_as_an_option_is_refused_and_not_repeated(option: str, vllm: FakeServer, tiny_folder: Path) -> None:
    with pytest.raises(ValueError) as raised:
        run(vllm, tiny_folder, options={option: KEY})
    assert KEY not in str(raised.value)


def test_the_environments_proxy_is_used_and_named(
    vllm: FakeServer, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://user:{KEY}@127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(ValueError, match="through the proxy that the environment names: Connection refused") as raised:
        run(vllm, tiny_folder)
    assert KEY not in str(raised.value)
    monkeypatch.setenv("HTTP_PROXY", f"http://user:{KEY}#@127.0.0.1:1")
    with pytest.raises(ValueError, match="in the environment, is no address") as raised:
        run(vllm, tiny_folder)
    assert KEY not in str(raised.value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    run(vllm, tiny_folder, "quick", limit=1)


def test_the_command_runs_against_a_server_and_says_one_line_where_it_cannot(
    vllm: FakeServer, tiny_folder: Path, tmp_path: Path
) -> None:
    words = ["run", "tiny", "--tasks", "quick", "--limit", "2", "--out", str(tmp_path), "--engine", "openai"]
    words += ["--engine-option", f"tokenizer={tiny_folder}", "--base-url"]

    def evalkit(url: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "evalkit", *words, url]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})

    done = evalkit(vllm.url)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    done = evalkit(f"http://{KEY}@127.0.0.1/v1")
    assert (done.returncode, len(done.stderr.splitlines()), KEY in done.stderr) == (2, 1, False)
