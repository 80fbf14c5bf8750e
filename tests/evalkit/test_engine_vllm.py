"""vLLM against the transformers engine: the same tokens in, the same scores and replies out, in float32."""

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import evalkit
from evalkit.engines import vllm as engine_module
from evalkit.engines.thinking import ThinkingEngine
from evalkit.opening import Opened, Spec, open_engine
from evalkit.records import Generated, Generation, Reply, Request, Thought
from models.fingerprint import changed
from models.quantise import quantise
from tests.evalkit.test_engine_hf import byte_ids, mixed_requests
from tests.oracles import assert_same_replies
from tests.tiny import chain_llama, tiny_qwen3, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own, of which there are many

OPTIONS = {"enforce_eager": True, "max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 32}
"""Few sequences at a time, long prompts in pieces, short blocks: what would go wrong in a batch would go wrong here."""
TOLERANCE = 1e-4


@dataclass
class Pair:
    hf: Opened
    vllm: Opened

    def both(self, *requests: Request) -> tuple[dict[int, Reply], dict[int, Reply]]:
        found = [list(opened.engine.answer(requests)) for opened in (self.hf, self.vllm)]
        assert [len(replies) for replies in found] == [len(requests)] * 2
        return dict(found[0]), dict(found[1])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def random_qwen3(tokenizer: Any) -> Any:
    return tiny_qwen3(len(tokenizer))


def chains(tokenizer: Any) -> Any:
    """Replies that are known beforehand, each begun by its own character."""
    think, close = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = chain_llama(
        len(tokenizer),
        (*byte_ids(tokenizer, "#abc\nQ:d"), 1),
        (*byte_ids(tokenizer, "%"), 1),
        (*byte_ids(tokenizer, "$ef"), turn_end, *byte_ids(tokenizer, "g")),
        (*byte_ids(tokenizer, "&hijklm"), 1),
        (*byte_ids(tokenizer, "*"), think, *byte_ids(tokenizer, "n.o"), close, *byte_ids(tokenizer, "pq;r"), 1),
        (*byte_ids(tokenizer, "@→¶"), 1),
        head_dim=32,
    )
    model.generation_config.eos_token_id = [turn_end]
    return model


MODELS = {"random": random_qwen3, "chains": chains}


@pytest.fixture(scope="module")
def pair(
    vllm: None, request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("a model")
    MODELS[request.param](tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    opened = [
        open_engine(Spec(model=str(folder), dtype="float32", device="cpu")),
        open_engine(Spec(model=str(folder), dtype="float32", engine="vllm", options=OPTIONS)),
    ]
    yield Pair(*opened)
    for one in opened:
        one.close()


random = pytest.mark.parametrize("pair", ["random"], indirect=True)
known = pytest.mark.parametrize("pair", ["chains"], indirect=True)


def ids(tokenizer: Any, count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, len(tokenizer), (count,), generator=generator).tolist())


def assert_close(one: Reply, other: Reply) -> None:
    assert [len(row) for row in one.logprobs] == [len(row) for row in other.logprobs]
    for a, b in zip(itertools.chain(*one.logprobs), itertools.chain(*other.logprobs), strict=True):
        assert abs(a - b) <= TOLERANCE * max(1.0, abs(a)), (a, b)


# --- scores ---


@random
def test_scores_and_replies_are_those_of_transformers(pair: Pair, tokenizer: Any) -> None:
    requests = mixed_requests(tokenizer)
    for _ in range(2):  # the second time everything is in the prefix cache
        assert assert_same_replies(requests, *pair.both(*requests))[1] == 0


@random
def test_any_number_of_one_token_choices_is_scored_however_unlikely(pair: Pair, tokenizer: Any) -> None:
    count = len(tokenizer)
    assert count > 3 * engine_module.WIDTH
    request = Request(prompt=ids(tokenizer, 9, 1), continuations=tuple((token,) for token in reversed(range(count))))
    one, other = pair.both(request)
    assert_close(one[0], other[0])
    assert abs(sum(torch.tensor(row).exp() for row in other[0].logprobs).item() - 1) < 1e-4


@random
def test_texts_that_share_cached_blocks_past_the_prompt_are_scored_whole(
    pair: Pair, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, found = engine_module._read, []

    def spied(job: Any, output: Any) -> Any:
        found.append(read(job, output))
        return found[-1]

    monkeypatch.setattr(engine_module, "_read", spied)
    prompt, shared = ids(tokenizer, 40, 2), ids(tokenizer, 60, 3)
    tails = tuple((*shared[:cut], *ids(tokenizer, 2 + cut % 3, cut)) for cut in (60, 59, 57, 30, 24, 1))
    tails += tails[:1]
    one, other = pair.both(Request(prompt=prompt, continuations=tails))
    assert_close(one[0], other[0])
    assert None in found, "no text was found in the cache past its prompt: the test shows nothing"


def test_a_score_is_the_same_when_its_request_was_preempted(
    vllm: None, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies grow, cache blocks are few, and texts share blocks past their prompts."""
    read, preempted = engine_module._read, []

    def spied(job: Any, output: Any) -> Any:
        preempted.append(output.metrics.num_preemptions)
        return read(job, output)

    monkeypatch.setattr(engine_module, "_read", spied)
    tiny_qwen3(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    requests = []
    for seed in range(12):
        shared = ids(tokenizer, 60, 100 + seed)
        tails = tuple((*shared, *ids(tokenizer, 2 + n, n)) for n in range(3))
        words = Generation(max_tokens=90)
        requests.append(Request(prompt=ids(tokenizer, 150 + seed, seed), continuations=tails, generation=words))
    few = {**OPTIONS, "max_num_seqs": 16, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 20}
    few["max_model_len"] = 288
    hf = open_engine(Spec(model=str(tmp_path), dtype="float32", device="cpu"))
    opened = open_engine(Spec(model=str(tmp_path), dtype="float32", engine="vllm", options=few))
    try:
        found = dict(opened.engine.answer(requests))
    finally:
        opened.close()
    for index, reply in hf.engine.answer(requests):
        assert_close(reply, found[index])
    assert any(preempted), "no score request was preempted: the test shows nothing"


@random
def test_a_text_that_fills_the_window_is_scored_and_a_longer_one_is_refused(pair: Pair, tokenizer: Any) -> None:
    window = pair.vllm.engine.max_length
    assert window == pair.hf.engine.max_length == 512
    text = ids(tokenizer, window, 4)
    full = [Request(prompt=text[:cut], continuations=(text[cut:],)) for cut in (1, 200, window - 1)]
    full.append(Request(prompt=text[:-6], generation=Generation(max_tokens=6)))
    one, other = pair.both(*full)
    for i in range(len(full)):
        assert_close(one[i], other[i])
        assert one[i].generated == other[i].generated
    too_long = Request(prompt=text, continuations=((5,),))
    with pytest.raises(ValueError, match="vLLM refused a request of 512 tokens: .*maximum model length of 512"):
        list(pair.vllm.engine.answer([too_long]))


@random
def test_a_listener_that_leaves_early_leaves_nothing_behind(pair: Pair, tokenizer: Any) -> None:
    requests = mixed_requests(tokenizer)
    replies = pair.vllm.engine.answer(requests)
    next(replies)
    replies.close()  # type: ignore[attr-defined]
    assert not pair.vllm.engine.llm.llm_engine.has_unfinished_requests()  # type: ignore[attr-defined]
    assert assert_same_replies(requests, *pair.both(*requests))[1] == 0


@random
def test_it_is_the_same_model_and_run_json_says_how_it_ran(pair: Pair) -> None:
    assert pair.vllm.model.fingerprint == pair.hf.model.fingerprint
    assert pair.vllm.model.parts == pair.hf.model.parts
    assert (pair.vllm.model.dtype, pair.vllm.model.parameters) == ("float32", pair.hf.model.parameters)
    session = pair.vllm.session
    assert (session["engine"], session["batch_size"], session["head"]) == ("vllm", 4, "float32")
    assert session["options"] == OPTIONS
    assert list(pair.vllm.versions) == ["vllm"]


@random
def test_sampling_depends_on_the_seed_and_the_prompt_alone(pair: Pair, tokenizer: Any) -> None:
    def sample(seed: int, *others: Request) -> Generated | None:
        generation = Generation(max_tokens=20, temperature=1.0, seed=seed)
        mine = Request(prompt=ids(tokenizer, 12, 5), generation=generation)
        return dict(pair.vllm.engine.answer([*others, mine]))[len(others)].generated

    assert sample(3) == sample(3, *mixed_requests(tokenizer))
    assert sample(3) != sample(4)


# --- replies ---


def said(pair: Pair, tokenizer: Any, start: str, *stops: str, max_tokens: int = 20) -> Generated:
    """The reply after one character, which transformers gives too."""
    generation = Generation(max_tokens=max_tokens, stops=stops)
    one, other = pair.both(Request(prompt=(0, *byte_ids(tokenizer, start)), generation=generation))
    assert one[0].generated == other[0].generated
    assert other[0].generated is not None
    return other[0].generated


@known
def test_a_stop_string_may_be_split_over_tokens(pair: Pair, tokenizer: Any) -> None:
    until = byte_ids(tokenizer, "abc\nQ:")
    assert said(pair, tokenizer, "#", "never", "\nQ:") == Generated(text="abc", tokens=until, finish="stop")
    assert said(pair, tokenizer, "@", "¶").text == "→", "a character split over tokens"
    assert said(pair, tokenizer, "#", "c\n", "bc").text == "a", "the first of two"


@known
def test_every_end_token_ends_a_reply_and_is_no_part_of_it(pair: Pair, tokenizer: Any) -> None:
    assert said(pair, tokenizer, "%", "\n") == Generated(text="", tokens=(), finish="eos")
    named = said(pair, tokenizer, "$")
    assert (named.text, named.finish) == ("ef", "eos"), "named by the generation config, not by the tokenizer"


@known
def test_a_limit_cuts_a_reply(pair: Pair, tokenizer: Any) -> None:
    cut = said(pair, tokenizer, "&", "\n", max_tokens=3)
    assert cut == Generated(text="hij", tokens=byte_ids(tokenizer, "hij"), finish="length")
    assert said(pair, tokenizer, "&", max_tokens=6).finish == "length"
    assert said(pair, tokenizer, "&", max_tokens=7).finish == "eos"


@known
def test_no_stop_string_counts_inside_a_thinking_block(pair: Pair, tokenizer: Any) -> None:
    whole = said(pair, tokenizer, "*", ".", "o")
    assert (whole.text, whole.finish) == ("<think>n.o</think>pq;r", "eos")
    assert said(pair, tokenizer, "*", ".", ";").text == "<think>n.o</think>pq"
    assert said(pair, tokenizer, "*", ".", max_tokens=3).text == "<think>n."


@known
def test_thinking_works_on_top(pair: Pair, tokenizer: Any) -> None:
    for force, budget in itertools.product((True, False), (2, 10)):
        thought = Thought(max_tokens=budget, close="</think>", force=force)
        generation = Generation(max_tokens=9, stops=(";",), thought=thought)
        request = Request(prompt=(0, *byte_ids(tokenizer, "*")), generation=generation)
        found = [dict(ThinkingEngine(one.engine).answer([request]))[0].generated for one in (pair.hf, pair.vllm)]
        assert found[0] == found[1] and found[0] is not None
        if budget == 10:
            assert (found[0].thought, found[0].text) == ("n.o", "pq")


# --- opening ---


def test_a_bfloat16_model_has_a_float32_head_and_a_second_engine_may_follow(
    vllm: None, tokenizer: Any, tmp_path: Path
) -> None:
    tiny_qwen3(len(tokenizer)).bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    request = Request(prompt=ids(tokenizer, 9, 6), continuations=tuple((token,) for token in range(300)))
    plain = open_engine(Spec(model=str(tmp_path), device="cpu"))
    options = {**OPTIONS, "max_model_len": 100}
    opened = open_engine(Spec(model=str(tmp_path), engine="vllm", options=options, batch_size=3))
    try:
        assert (opened.model.dtype, opened.session["head"], opened.session["batch_size"]) == ("bfloat16", "float32", 4)
        assert opened.engine.max_length == 100
        [(_, found)] = opened.engine.answer([request])
    finally:
        opened.close()
    [(_, wanted)] = plain.engine.answer([request])
    rows = [torch.tensor(reply.logprobs)[:, 0] for reply in (found, wanted)]
    assert (rows[0] - rows[1]).abs().max() < 0.1
    assert len(set(rows[0].tolist())) > 295, "a bfloat16 head would tie one in seven"


@pytest.mark.slow
def test_the_built_in_model_scores_and_says_what_it_does_with_transformers(
    vllm: None, smollm2: str, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"dtype": "float32", "limit": 12, "device": "cpu"}
    one = evalkit.run(smollm2, out=tmp_path / "hf", **how)
    options = {"enforce_eager": True}
    other = evalkit.run(smollm2, out=tmp_path / "vllm", engine="vllm", engine_options=options, **how)
    sums, worst = 0, 0.0
    for task in one.tasks:
        for item, record in one.records(task).items():
            twin = other.records(task)[item]
            assert record.prompts == twin.prompts and record.prompt_sha256 == twin.prompt_sha256
            for a, b in zip(record.outcomes, twin.outcomes, strict=True):
                assert (a.outcome, a.reply, a.finish, a.num_tokens) == (b.outcome, b.reply, b.finish, b.num_tokens)
                for x, y in zip((*a.logprobs, *a.blind), (*b.logprobs, *b.blind), strict=True):
                    sums, worst = sums + 1, max(worst, abs(x - y) / max(1.0, abs(x)))
    print(f"{sums} sums, largest relative difference {worst:.1e}")
    assert sums > 100 and worst <= TOLERANCE
    comparison = evalkit.compare(tmp_path / "hf", tmp_path / "vllm")
    assert comparison.teacher.manifest.model.fingerprint == comparison.student.manifest.model.fingerprint


@pytest.mark.slow
def test_a_quantised_folder_runs_in_vllms_kernels_and_its_fingerprint_says_so(
    vllm: None, smollm2: str, tmp_path: Path
) -> None:
    """The int4 kernel computes in bfloat16, unpacked weights in float32: scores differ by rounding, choices seldom."""
    quantise(smollm2, tmp_path / "int4", "int4")
    how: dict[str, Any] = {"limit": 12, "mode": "loglikelihood", "device": "cpu"}
    one = evalkit.run(tmp_path / "int4", "quick", dtype="float32", **how)
    other = evalkit.run(tmp_path / "int4", "quick", engine="vllm", engine_options={"enforce_eager": True}, **how)
    models = [run.manifest.model for run in (one, other)]
    assert models[0].fingerprint != models[1].fingerprint and models[0].parameters == models[1].parameters
    assert models[0].parts["tokenizer"] == models[1].parts["tokenizer"]
    assert '"kernel": "run by vLLM on cpu"' in models[1].parts["quantisation"] and "run by vLLM on" in models[1].note
    same, gaps = 0, []
    for item, record in one.records("quick").items():
        [a], [b] = record.outcomes, other.records("quick")[item].outcomes
        same += a.choice == b.choice
        gaps += [abs(x - y) / max(1.0, abs(x)) for x, y in zip(a.logprobs, b.logprobs, strict=True)]
    print(f"{len(gaps)} sums, largest relative difference {max(gaps):.1e}")
    assert same >= 11 and max(gaps) < 0.1


def test_a_gguf_file_is_refused_in_one_line(vllm: None, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(
        ValueError, match="model.gguf is a GGUF file, which can't be run by vLLM on .* here; use --engine hf"
    ):
        open_engine(Spec(model=str(tmp_path / "model.gguf"), engine="vllm"))


def test_without_vllm_one_line_names_the_extra(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else found(name, *rest))
    with pytest.raises(ValueError, match=r"needs vLLM: pip install 'evalkit\[vllm\]'"):
        open_engine(Spec(model=str(tiny_folder), engine="vllm"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs_mode": "raw_logits"}, "'logprobs_mode' is set by evalkit itself"),
        ({"tokenizer_revision": "main"}, "'tokenizer_revision' is set by evalkit itself"),
        ({"hf_config_path": "elsewhere"}, "'hf_config_path' is set by evalkit itself"),
        ({"data_parallel_size": 2}, "'data_parallel_size' needs a server; use --workers N for N replicas"),
        ({"load_format": "dummy"}, "'load_format' is 'dummy', which scores random weights"),
        ({"hf_overrides": "model"}, "'hf_overrides' is 'model': expected names and values, as in --engine-option"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_module.check_options(options)


def test_only_neutral_options_leave_the_fingerprint_alone() -> None:
    plain = {**OPTIONS, "tensor_parallel_size": 2, "quantization": None, "kv_cache_dtype": "auto"}
    assert engine_module.changes_model({**plain, "hf_overrides": {"head_dtype": "model"}}) == {}
    other = {"quantization": "fp8", "mamba_ssm_cache_dtype": "float16", "enable_lora": True, "an_option_to_come": 0}
    overrides = {"head_dtype": "model", "rope": 2}
    found = engine_module.changes_model({**plain, **other, "hf_overrides": overrides})
    assert found == {**other, "hf_overrides": {"rope": 2}}
    parts = {"weights": "w", "quantisation": "none"}
    altered, identity = changed(parts, other)
    assert altered["weights"] == "w" and "fp8" in altered["quantisation"]
    assert identity != changed(parts, {"quantization": "awq"})[1]


def test_neutral_options_are_vllms(vllm: None) -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = {one.name for one in dataclasses.fields(EngineArgs)}
    assert engine_module.NEUTRAL | set(engine_module.OWN_OPTIONS) <= known


def test_an_option_that_vllm_does_not_know_or_another_device_is_told_before_anything_is_loaded(vllm: None) -> None:
    with pytest.raises(ValueError, match="vLLM has no option 'max_model_length'; did you mean 'max_model_len'"):
        open_engine(Spec(model="nobody/nothing", engine="vllm", options={"max_model_length": 10}))
    with pytest.raises(ValueError, match="device 'mps' was asked for, but this vLLM runs on"):
        open_engine(Spec(model="nobody/nothing", engine="vllm", device="mps"))


def test_what_vllm_says_of_an_option_is_one_line(vllm: None, tiny_folder: Path) -> None:
    options = {**OPTIONS, "max_model_len": 10**6}
    with pytest.raises(ValueError, match="vLLM could not start with .*max_model_len") as error:
        engine_module.start_llm(str(tiny_folder), dtype="float32", window=64, options=options)
    assert "\n" not in str(error.value)


class Broken:
    """A ``vllm.LLM`` whose steps fail, and which can't end its requests either."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.llm_engine = self

    def step(self) -> Any:
        raise self.error

    def abort_request(self, names: list[str]) -> None:
        raise RuntimeError("the engine is dead")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("CUDA out of memory.\nTried to"),
            "out of memory. Tried to; give --engine-option max_num_batched",
        ),
        (RuntimeError("no kernel image"), "vLLM failed while it ran: no kernel image; VLLM_LOGGING_LEVEL=INFO"),
    ],
)
def test_a_step_that_fails_is_told_in_one_line_with_its_own_error(
    error: Exception, message: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: Any, job: Any, running: dict[str, Any]) -> None:
        running["1"] = job

    monkeypatch.setattr(engine_module.VLLMEngine, "_start", start)
    engine = engine_module.VLLMEngine(Broken(error), tokenizer, eos=frozenset({1}), window=64)
    with pytest.raises(ValueError, match=message) as caught:
        list(engine.answer([Request(prompt=(5, 6), continuations=((7,),))]))
    assert caught.value.__cause__ is error and "\n" not in str(caught.value)


@dataclass
class Said:
    logprob: float


def output(*, cached: int = 0, preemptions: int = 0, places: int = 4) -> Any:
    """vLLM's, of the tokens 5, 6, 7, 8, of which 9 comes next."""
    rows = [{token: Said(-float(token))} for token in (5, 6, 7, 8)]
    return SimpleNamespace(
        num_cached_tokens=cached,
        metrics=SimpleNamespace(num_preemptions=preemptions),
        prompt_logprobs=rows[len(rows) - places :],
        outputs=[SimpleNamespace(logprobs=[{9: Said(-9.0)}])],
    )


def test_scores_that_a_preemption_or_the_cache_may_have_left_unset_are_asked_for_again() -> None:
    job = engine_module._Scores(0, (5, 6), (7, 8), {9: [0]})
    for unset in (output(preemptions=1), output(cached=2), output(places=1)):
        assert engine_module._read(job, unset) is None
    wanted = [(0, (-7.0, -8.0, -9.0))]
    assert [list(engine_module._read(job, one) or ()) for one in (output(), output(cached=1, places=3))] == [wanted] * 2
    job.fresh = True
    assert list(engine_module._read(job, output(preemptions=1)) or ()) == wanted, "nothing came from the cache"
