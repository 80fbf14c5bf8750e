"""Engine openai against the transformers engine, over vLLM's own server on the CPU or a GPU."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import evalkit as ek
from evalkit.engines.hf import HFEngine
from evalkit.engines.thinking import ThinkingEngine
from evalkit.opening import Opened, Spec, open_engine
from evalkit.records import Generation, Request, Thought
from models.load import Loaded, load
from tests.conftest import missing
from tests.evalkit.test_engine_hf import ids_of, mixed_requests
from tests.tiny import tiny_qwen3, tiny_tokenizer

pytestmark = pytest.mark.slow
START_S = 300
TOLERANCE = 1e-4
"""Of a choice's sum (nats)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32: vLLM's attention on the CPU knows none of 16. Its sampling habits must not matter."""
    if importlib.util.find_spec("vllm") is None:
        missing("vllm", "vllm is not installed: pip install 'evalkit[vllm]'")
    made = tmp_path_factory.mktemp("served") / "qwen3"
    tokenizer = tiny_tokenizer(bos=True)
    model = tiny_qwen3(len(tokenizer))
    model.generation_config.update(do_sample=True, temperature=1.5, top_k=3, repetition_penalty=1.8)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's server, which knows the model as "served"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", **os.environ}
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        _wait(process, port, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"vLLM's server did not start: {log.read_text()[-2000:]}", pytrace=False)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def served(url: str) -> Iterator[Opened]:
    opened = open_engine(Spec(model="served", engine="openai", base_url=url))
    yield opened
    opened.close()


def test_the_server_takes_ids_and_gives_scores_and_ids(served: Opened) -> None:
    assert (served.session["prompts"], served.session["scores"]) == ("token ids", "prompt_logprobs")
    assert served.session["system_fingerprint"].startswith("vllm-")
    assert served.engine.max_length == 511


def test_scores_and_replies_are_those_of_the_transformers_engine(served: Opened, loaded: Loaded) -> None:
    requests = mixed_requests(loaded.tokenizer)
    wanted = dict(HFEngine(loaded.model, loaded.tokenizer).answer(requests))
    found = dict(served.engine.answer(requests))
    for i in range(len(requests)):
        assert found[i].generated == wanted[i].generated
        for row, other in zip(found[i].logprobs, wanted[i].logprobs, strict=True):
            assert len(row) == len(other) and abs(sum(row) - sum(other)) <= TOLERANCE


def test_a_text_that_fills_the_window_is_scored(served: Opened, loaded: Loaded) -> None:
    tokens = ids_of(loaded.tokenizer, " dog" * 1000)[: served.engine.max_length]
    request = Request(prompt=tokens[:-2], continuations=(tokens[-2:],))
    [(_, wanted)] = HFEngine(loaded.model, loaded.tokenizer).answer([request])
    [(_, found)] = served.engine.answer([request])
    assert found.logprobs[0] == pytest.approx(wanted.logprobs[0], abs=TOLERANCE)


def test_thoughts_are_those_of_the_transformers_engine(served: Opened, loaded: Loaded) -> None:
    thought = Thought(max_tokens=6, close="</think>", force=True)
    prompt = ids_of(loaded.tokenizer, "Answer: <think>")
    requests = [Request(prompt=prompt, generation=Generation(max_tokens=5, thought=thought))]
    wanted = dict(ThinkingEngine(HFEngine(loaded.model, loaded.tokenizer)).answer(requests))
    assert dict(ThinkingEngine(served.engine).answer(requests)) == wanted


def test_a_run_has_the_transformers_engines_outcomes(url: str, folder: Path) -> None:
    found = ek.run("served", "quick", limit=10, engine="openai", base_url=url)
    wanted = ek.run(folder, "quick", limit=10, device="cpu")
    for item, record in wanted.records("quick").items():
        for one, other in zip(found.records("quick")[item].outcomes, record.outcomes, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
            assert (one.reply, one.finish, one.num_tokens, one.outcome) == (
                other.reply,
                other.finish,
                other.num_tokens,
                other.outcome,
            )


def test_samples_follow_the_seed(served: Opened, loaded: Loaded) -> None:
    def reply(seed: int) -> str:
        generation = Generation(max_tokens=12, temperature=1.0, seed=seed)
        [(_, reply)] = served.engine.answer(
            [Request(prompt=ids_of(loaded.tokenizer, "Answer:"), generation=generation)]
        )
        assert reply.generated is not None
        return reply.generated.text

    assert reply(1) == reply(1) != reply(2)


def test_messages_get_the_replies_of_the_chat_template(url: str, loaded: Loaded) -> None:
    how: dict[str, Any] = {"chat": True, "mode": "generation", "limit": 5, "max_tokens": 12}
    options = {"endpoint": "chat"}
    found = ek.run("served", "quick", engine="openai", base_url=url, engine_options=options, **how)
    # vLLM leaves a BOS to the template, so the oracle's tokenizer adds none.
    wanted = ek.run(loaded.model, "quick", tokenizer=tiny_tokenizer(), **how)
    for item, record in wanted.records("quick").items():
        [reply] = [outcome.reply for outcome in found.records("quick")[item].outcomes]
        assert reply == record.outcomes[0].reply.rstrip("\ufffd"), "a server holds back a character's first bytes"
