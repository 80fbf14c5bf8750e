"""The transformers engine against plain forward passes and transformers' own ``generate``."""

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPT2LMHeadModel, LlamaForCausalLM

from evalkit.engines.hf import HFEngine
from evalkit.records import Generated, Generation, Reply, Request
from tests.oracles import assert_same_replies
from tests.tiny import chain_llama, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer

FAMILIES = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen3": tiny_qwen3}
BATCHINGS = [(size, padding) for size in (1, 3, 16) for padding in ("right", "left")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return FAMILIES[request.param](len(tokenizer))


@pytest.fixture(scope="module")
def llama(tokenizer: Any) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer))


def ids_of(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def mixed_requests(tokenizer: Any) -> list[Request]:
    """20 requests of many lengths: scores alone, a reply alone, both; short and long continuations and limits."""
    texts = [
        "Answer:",
        "Question: Which animal barks?\nAnswer:",
        "Question: What is the capital of France?\nAnswer: Paris\n\nQuestion: Which animal barks?\nAnswer:",
        "1, 2, 3, 4,",
        "Copy: anchor, apple, arrow.",
    ]
    answers = [" a dog", " Paris", " the number 12 belongs to the golden falcon", " 7", " Think step by step."]
    requests = []
    for i in range(20):
        prompt = ids_of(tokenizer, texts[i % 5] + " falcon" * (i // 5))
        tails = tuple(ids_of(tokenizer, answer) for answer in answers[: 2 + i % 4])
        generation = Generation(max_tokens=1 + 3 * (i % 4), stops=("\n", " a")[: i % 3])
        kind = i % 3
        requests.append(
            Request(
                prompt=prompt,
                continuations=tails if kind != 1 else (),
                generation=generation if kind != 0 else None,
            )
        )
    return requests


def answers(engine: HFEngine, requests: Sequence[Request]) -> dict[int, Reply]:
    pairs = list(engine.answer(requests))
    assert len(pairs) == len(requests)
    return dict(pairs)


def plain_scores(model: Any, request: Request) -> list[list[float]]:
    """One forward pass a continuation, nothing padded; log-softmax in float64."""
    rows = []
    for tail in request.continuations:
        with torch.inference_mode():
            logits = model(torch.tensor([request.prompt + tail])).logits[0].double()
        logprobs = logits.log_softmax(-1)
        start = len(request.prompt)
        rows.append([float(logprobs[start + k - 1, token]) for k, token in enumerate(tail)])
    return rows


def assert_scores(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for a, b in zip(row, wanted, strict=True):
            assert abs(a - b) <= 1e-5 * max(1.0, abs(b)), (a, b)


# --- scores ---


@pytest.mark.parametrize("padding", ["right", "left"])
def test_scores_are_those_of_one_plain_forward_per_text(model: Any, tokenizer: Any, padding: Any) -> None:
    requests = mixed_requests(tokenizer)
    found = answers(HFEngine(model, tokenizer, batch_size=7, padding=padding), requests)
    for i, request in enumerate(requests):
        assert_scores(found[i].logprobs, plain_scores(model, request))


def test_batch_size_and_padding_change_no_reply(model: Any, tokenizer: Any) -> None:
    requests = mixed_requests(tokenizer)
    alone = answers(HFEngine(model, tokenizer, batch_size=1), requests)
    found = []
    for size, padding in BATCHINGS:
        other = answers(HFEngine(model, tokenizer, batch_size=size, padding=padding), requests)
        found.append(assert_same_replies(requests, alone, other))
    print(f"largest relative difference {max(d for d, _ in found):.1e}, near-ties {max(n for _, n in found)}")
    assert max(n for _, n in found) == 0, "random weights should not tie"


def test_one_request_scores_many_one_token_continuations(llama: Any, tokenizer: Any) -> None:
    prompt = ids_of(tokenizer, "Question: Which animal barks?\nAnswer:")
    request = Request(prompt=prompt, continuations=tuple((token,) for token in range(40)))
    with torch.inference_mode():
        logprobs = llama(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
    [(_, reply)] = HFEngine(llama, tokenizer, batch_size=16).answer([request])
    assert_scores(reply.logprobs, [[float(logprobs[token])] for token in range(40)])


def test_a_text_split_in_two_ways_is_scored_in_both(llama: Any, tokenizer: Any) -> None:
    """Equal context + continuation[:-1], another cut: lm-eval's cache of logits mixes these up."""
    text = ids_of(tokenizer, "Copy: anchor, apple, arrow.")
    requests = [
        Request(prompt=text[:cut], continuations=(text[cut:], (*text[cut:-1], (text[-1] + 1) % 300)))
        for cut in (len(text) - 1, len(text) - 2, 3, 1)
    ]
    found = answers(HFEngine(llama, tokenizer, batch_size=16), requests)
    for i, request in enumerate(requests):
        assert_scores(found[i].logprobs, plain_scores(llama, request))


def test_a_prompt_of_one_token_is_enough(llama: Any, tokenizer: Any) -> None:
    request = Request(prompt=(0,), continuations=((5,), (6, 7)))
    [(_, reply)] = HFEngine(llama, tokenizer).answer([request])
    assert_scores(reply.logprobs, plain_scores(llama, request))


def test_a_bfloat16_model_is_scored_by_a_float32_head(tokenizer: Any) -> None:
    model = tiny_llama(len(tokenizer)).bfloat16()
    requests = [request for request in mixed_requests(tokenizer) if request.continuations]
    # Text by text: in another layout bfloat16 rounds otherwise on the way to the head.
    found = answers(HFEngine(model, tokenizer, batch_size=1, layout="plain"), requests)
    coarse = 0.0
    for i, request in enumerate(requests):
        expected = []
        for tail, row in zip(request.continuations, plain_scores(model, request), strict=True):
            with torch.inference_mode():  # the tokens the engine runs, so that bfloat16 rounds alike
                hidden = model.model(torch.tensor([(request.prompt + tail)[:-1]])).last_hidden_state[0]
                logprobs = (hidden.float() @ model.lm_head.weight.float().T).double().log_softmax(-1)
            start = len(request.prompt)
            expected.append([float(logprobs[start + k - 1, token]) for k, token in enumerate(tail)])
            coarse = max(coarse, max(abs(a - b) for a, b in zip(expected[-1], row, strict=True)))
        assert_scores(found[i].logprobs, expected)
    assert coarse > 1e-2, "a bfloat16 head would have given the same: the test shows nothing"


# --- replies ---


def test_greedy_replies_are_those_of_generate_for_each_prompt_alone(model: Any, tokenizer: Any) -> None:
    prompts = sorted({request.prompt for request in mixed_requests(tokenizer)})
    requests = [Request(prompt=prompt, generation=Generation(max_tokens=12)) for prompt in prompts]
    found = answers(HFEngine(model, tokenizer, batch_size=16), requests)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=1
        )
        tokens = out[0, len(prompt) :].tolist()
        ended = 1 in tokens
        tokens = tokens[: tokens.index(1)] if ended else tokens
        assert found[i].generated == Generated(
            text=tokenizer.decode(tokens, skip_special_tokens=True),
            tokens=tuple(tokens),
            finish="eos" if ended else "length",
        )


def test_shipped_generation_defaults_do_not_apply_and_the_model_is_left_as_it_was(model: Any, tokenizer: Any) -> None:
    requests = mixed_requests(tokenizer)
    plain = answers(HFEngine(model, tokenizer, batch_size=3), requests)
    shipped = copy.deepcopy(model)
    shipped.generation_config = GenerationConfig(
        repetition_penalty=1.8, do_sample=True, temperature=0.3, top_k=3, eos_token_id=1, bos_token_id=0
    )
    own, before = shipped.generation_config, shipped.generation_config.to_dict()
    weights = {name: value.clone() for name, value in shipped.state_dict().items()}
    shipped.train()  # with GPT-2's dropout on, scores would differ
    found = answers(HFEngine(shipped, tokenizer, batch_size=3), requests)
    assert_same_replies(requests, plain, found)
    assert shipped.training
    assert shipped.generation_config is own and own.to_dict() == before
    assert "forward" not in vars(shipped.get_output_embeddings())
    assert all(torch.equal(value, weights[name]) for name, value in shipped.state_dict().items())


def test_the_head_of_a_bfloat16_model_is_given_back(tokenizer: Any) -> None:
    model = tiny_llama(len(tokenizer)).bfloat16()
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        before = model(ids).logits
        answers(HFEngine(model, tokenizer), mixed_requests(tokenizer))
        after = model(ids).logits
    assert before.dtype == after.dtype == torch.bfloat16 and torch.equal(before, after)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_each_request_has_its_own_length_limit(llama: Any, tokenizer: Any) -> None:
    prompt = ids_of(tokenizer, "1, 2, 3, 4,")
    limits = (9, 1, 4, 12)
    requests = [Request(prompt=prompt, generation=Generation(max_tokens=limit)) for limit in limits]
    found = answers(HFEngine(llama, tokenizer, batch_size=16), requests)
    replies = [found[i].generated for i in range(len(limits))]
    longest = replies[3]
    assert longest is not None and len(set(longest.tokens)) > 1
    for limit, reply in zip(limits, replies, strict=True):
        assert reply is not None
        assert reply.finish == "length" and reply.tokens == longest.tokens[:limit]


def said(
    chains: Sequence[Sequence[int]], tokenizer: Any, stops: tuple[str, ...] = (), **engine: Any
) -> list[Generated]:
    """What the chains' models say after each chain's first token, all in one batch."""
    model = chain_llama(len(tokenizer), *chains)
    if "eos" in engine:
        model.generation_config.eos_token_id = engine.pop("eos")
    generation = Generation(max_tokens=20, stops=stops)
    requests = [Request(prompt=(0, chain[0]), generation=generation) for chain in chains]
    found = answers(HFEngine(model, tokenizer, batch_size=16), requests)
    replies = [found[i].generated for i in range(len(chains))]
    assert all(reply is not None for reply in replies)
    return [reply for reply in replies if reply is not None]


def byte_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Every byte a token of its own, whatever the tokenizer would merge."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names = bytes_to_unicode()
    return tuple(tokenizer.convert_tokens_to_ids(names[byte]) for byte in text.encode())


@pytest.mark.parametrize("stop", ["xyz", "\nQ:", "。", "→¶", "z"])
def test_a_stop_string_may_be_split_over_tokens(tokenizer: Any, stop: str) -> None:
    until = byte_ids(tokenizer, "ok" + stop)
    start, other = byte_ids(tokenizer, "#%")
    after, end = byte_ids(tokenizer, "!;"), 1
    rows = [(start, *until, *after, end), (other, *byte_ids(tokenizer, "abcdefghij"), end)]
    stopped, whole = said(rows, tokenizer, stops=("never said", stop))
    assert stopped == Generated(text="ok", tokens=until, finish="stop")
    assert whole.text == "abcdefghij" and whole.finish == "eos"


def test_the_first_of_two_stop_strings_ends_the_reply(tokenizer: Any) -> None:
    [reply] = said([(*byte_ids(tokenizer, "#abcdefgh"), 1)], tokenizer, stops=("fg", "cd", "de"))
    assert reply == Generated(text="ab", tokens=byte_ids(tokenizer, "abcd"), finish="stop")


def test_a_reply_that_is_only_eos_is_empty(tokenizer: Any) -> None:
    rows = [(*byte_ids(tokenizer, "#"), 1), (*byte_ids(tokenizer, "%helo"), 1)]
    empty, other = said(rows, tokenizer, stops=("\n",))
    assert empty == Generated(text="", tokens=(), finish="eos")
    assert other.text == "helo" and other.finish == "eos"


def test_every_end_token_that_model_or_tokenizer_names_ends_a_reply(tokenizer: Any) -> None:
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = [(*byte_ids(tokenizer, "#ab"), turn_end, *byte_ids(tokenizer, "cd")), (*byte_ids(tokenizer, "%ef"), 1)]
    replies = said(rows, tokenizer, eos=[turn_end])
    assert [(reply.text, reply.finish) for reply in replies] == [("ab", "eos"), ("ef", "eos")]


def test_without_any_end_token_a_reply_ends_at_its_stop_string_or_limit(tokenizer: Any) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    until = byte_ids(tokenizer, "ok.")
    rows = [
        (*byte_ids(tokenizer, "#"), *until, *byte_ids(tokenizer, "!;")),
        byte_ids(tokenizer, "%abcdefghijlmnpqrstuvwxyz"),
    ]
    stopped, whole = said(rows, endless, stops=(".",), eos=None)
    assert stopped == Generated(text="ok", tokens=until, finish="stop")
    assert whole == Generated(text="abcdefghijlmnpqrstuv", tokens=rows[1][1:21], finish="length")


def test_sampling_repeats_with_its_seed(llama: Any, tokenizer: Any) -> None:
    prompt = ids_of(tokenizer, "1, 2, 3, 4,")

    def sample(seed: int) -> Generated | None:
        generation = Generation(max_tokens=30, temperature=1.0, seed=seed)
        [(_, reply)] = HFEngine(llama, tokenizer).answer([Request(prompt=prompt, generation=generation)])
        return reply.generated

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


# --- models of other kinds ---


class NoPositions(GPT2LMHeadModel):
    """A forward without ``position_ids`` and ``logits_to_keep``, as custom models have it."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        # transformers 5.24 calls "cache" what was "past_key_values" before.
        known = {"past_key_values": past_key_values, "cache": cache}
        given = {name: value for name, value in known.items() if value is not None}
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache, **given)


@pytest.fixture(scope="module")
def no_positions(tokenizer: Any) -> Any:
    """Shares the weights of the GPT-2 with absolute positions, so that a wrong position shows."""
    gpt2 = tiny_gpt2(len(tokenizer))
    model = NoPositions(gpt2.config).eval()
    model.load_state_dict(gpt2.state_dict())
    return model


def test_a_model_without_positions_gives_the_same_replies(no_positions: Any, tokenizer: Any) -> None:
    requests = mixed_requests(tokenizer)
    expected = answers(HFEngine(tiny_gpt2(len(tokenizer)), tokenizer, batch_size=1), requests)
    for size in (1, 3, 16):
        found = answers(HFEngine(no_positions, tokenizer, batch_size=size), requests)
        assert assert_same_replies(requests, expected, found)[1] == 0


def test_a_model_without_positions_refuses_left_padding(no_positions: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="NoPositions takes no position_ids.*use padding='right'"):
        HFEngine(no_positions, tokenizer, padding="left")


def test_max_length_is_the_models_window(tokenizer: Any) -> None:
    assert HFEngine(tiny_llama(len(tokenizer), window=77), tokenizer).max_length == 77
    assert HFEngine(tiny_gpt2(len(tokenizer), window=99), tokenizer).max_length == 99
    assert HFEngine(tiny_qwen3(len(tokenizer)), tokenizer).max_length == 512


class OutOfMemory(LlamaForCausalLM):
    """Has no memory for token 99."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if (input_ids == 99).any():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize("layout", ["tree", "rows", "plain"])
def test_out_of_memory_at_one_row_says_so_and_keeps_what_is_done(tokenizer: Any, layout: Any) -> None:
    model = OutOfMemory(tiny_llama(len(tokenizer)).config).train()
    own = model.generation_config
    requests = [Request(prompt=(0, 5, 7, 8, 9)[: 5 - i], continuations=((6,),)) for i in range(4)]
    requests.append(Request(prompt=(99,), continuations=((6,),)))
    engine = HFEngine(model, tokenizer, batch_size=3, layout=layout)
    done = []
    with pytest.raises(ValueError, match="out of memory on cpu with a single row; use fewer --shots") as error:
        for index, reply in engine.answer(requests):
            done.append(index)
            assert math.isfinite(reply.logprobs[0][0])
    assert sorted(done) == [0, 1, 2, 3] and engine.profile.layout == layout
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    assert model.training and model.generation_config is own


def test_a_closing_tag_that_is_a_special_token_ends_the_thought() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    close = tokenizer.convert_tokens_to_ids("</think>")
    [thought] = said([(20, 21, 22, close, 23, 24)], tokenizer, ("</think>",))
    assert thought.finish == "stop" and thought.tokens == (21, 22, close) and "</think>" not in thought.text
    [reply] = said([(20, 21, 22, close, 23, 24)], tokenizer, ("never",))
    assert reply.finish == "eos" and "</think>" not in reply.text, "special tokens are no part of an answer"
