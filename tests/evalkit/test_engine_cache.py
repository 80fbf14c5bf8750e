"""Caches, trees and the decode loop against an engine that runs every text by itself, on four kinds of model."""

import functools
import gc
import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from evalkit.engines.cache import Slots
from evalkit.engines.decode import Decoder
from evalkit.engines.hf import HFEngine
from evalkit.records import Generation, Reply, Request
from tests.models.hybrids import tiny_hybrid, tiny_teacher
from tests.naive import NaiveEngine
from tests.oracles import assert_same_replies
from tests.tiny import tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOCABULARY = len(TOKENIZER)


def hybrid() -> Any:
    return tiny_hybrid(tiny_teacher("llama", vocab_size=VOCABULARY, initializer_range=0.3))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(VOCABULARY),
    "qwen3": lambda: tiny_qwen3(VOCABULARY),
    "gpt2": lambda: tiny_gpt2(VOCABULARY),
    "hybrid": hybrid,
}
LAYOUTS = [(name, layout) for name in MODELS for layout in ("tree", "rows") if (name, layout) != ("hybrid", "tree")]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: make() for name, make in MODELS.items()}


def random_requests(seed: int) -> list[Request]:
    """Prompts that begin alike, repeat, or are the beginning of another; continuations that begin alike or are the
    beginning of another; one text split in two ways; limits, stop strings and temperatures of each one's own."""
    rng = random.Random(seed)

    def words(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randint(4, VOCABULARY - 1) for _ in range(rng.randint(least, most)))

    headers = [words(0, 3), words(20, 40), words(5, 9)]
    requests: list[Request] = []
    for _ in range(rng.randint(3, 12)):
        kind = rng.random()
        prompt = (*rng.choice(headers), *words(1, 12))
        if requests and kind < 0.2:
            prompt = rng.choice(requests).prompt
        elif requests and kind < 0.4:
            prompt = (*rng.choice(requests).prompt, *words(1, 2))
        tails = [words(1, 1), words(1, 6), words(2, 3)][: rng.randint(0, 3)]
        if tails and rng.random() < 0.5:
            tails += [tails[-1] + words(1, 3), tails[-1][:1] + words(1, 2), tails[0]]
        if tails and len(prompt) > 1 and rng.random() < 0.3:  # the same text, split one token earlier
            requests.append(Request(prompt=prompt[:-1], continuations=((prompt[-1], *tails[0]),)))
        generation = Generation(
            max_tokens=rng.choice([1, 2, 5, 9]),
            stops=tuple(rng.sample(["a", "\n", " the", "qu", "1"], rng.randint(0, 2))),
            temperature=rng.choice([0.0, 0.0, 0.7]),
            seed=rng.randint(0, 1),
        )
        wanted = generation if not tails or rng.random() < 0.6 else None
        requests.append(Request(prompt=prompt, continuations=tuple(tails), generation=wanted))
    return requests


def replies(engine: Any, requests: Sequence[Request]) -> dict[int, Reply]:
    pairs = list(engine.answer(requests))
    assert len(pairs) == len(requests)
    return dict(pairs)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([1, 2, 5, 16]))
def test_any_requests_get_the_replies_of_the_naive_engine(
    models: dict[str, Any], name: str, layout: Any, seed: int, size: int
) -> None:
    requests = random_requests(seed)
    engine = HFEngine(models[name], TOKENIZER, batch_size=size, layout=layout)
    engine._limits.tokens = random.Random(seed).choice([8, 40, 512])
    engine._decoder.static = bool(seed % 2)
    expected = replies(NaiveEngine(models[name], TOKENIZER), requests)
    assert_same_replies(requests, expected, replies(engine, requests))
    assert engine.profile.layout == layout
    random.Random(seed).shuffle(requests)
    again = replies(engine, requests)
    assert_same_replies(requests, replies(NaiveEngine(models[name], TOKENIZER), requests), again)


def test_a_kind_of_layout_is_chosen_by_the_model(models: dict[str, Any]) -> None:
    request = Request(prompt=(5, 6), continuations=((7,),))
    for name, model in models.items():
        engine = HFEngine(model, TOKENIZER)
        replies(engine, [request])
        assert engine.profile.layout == ("rows" if name == "hybrid" else "tree")


def test_a_sliding_window_is_run_without_our_cache_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    requests = random_requests(5)
    engine = HFEngine(model, TOKENIZER, batch_size=3)
    assert_same_replies(requests, replies(NaiveEngine(model, TOKENIZER), requests), replies(engine, requests))
    assert engine.profile.layout == "plain" and "DynamicSlidingWindowLayer" in engine.profile.why
    assert "every text is run by itself, without a cache" in caplog.text


class Deaf(LlamaForCausalLM):
    """Takes a mask and does not read it."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **kwargs)


class Trips(LlamaForCausalLM):
    """Its own code knows masks of two dimensions only."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.ndim != 2:
            raise TypeError("mask of an unknown shape")
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize(("kind", "path"), [(Deaf, "plain"), (Trips, "rows")])
def test_what_a_model_makes_of_a_cache_is_tried_before_it_is_trusted(kind: Any, path: str) -> None:
    plain = tiny_llama(VOCABULARY)
    model = kind(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    requests = [request for request in random_requests(3) if request.generation is None or kind is Trips]
    engine = HFEngine(model, TOKENIZER, batch_size=4)
    assert_same_replies(requests, replies(NaiveEngine(plain, TOKENIZER), requests), replies(engine, requests))
    assert engine.profile.layout == path
    assert ("scores differ by" if kind is Deaf else "TypeError: mask of an unknown shape") in engine.profile.why


def test_an_empty_continuation_has_no_log_probabilities(models: dict[str, Any]) -> None:
    for layout in ("tree", "rows", "plain"):
        engine = HFEngine(models["llama"], TOKENIZER, layout=layout)  # type: ignore[arg-type]
        [(_, reply)] = engine.answer([Request(prompt=(5, 6), continuations=((), (7,)))])
        assert [len(row) for row in reply.logprobs] == [0, 1]


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_a_bfloat16_model_has_a_float32_head_in_every_layout(layout: Any) -> None:
    model = tiny_llama(VOCABULARY).bfloat16()
    requests = [request for seed in range(4) for request in random_requests(seed) if request.continuations]
    found, plain = (
        [value for _, reply in sorted(replies(engine, requests).items()) for row in reply.logprobs for value in row]
        for engine in (HFEngine(model, TOKENIZER, layout=layout), HFEngine(model, TOKENIZER, layout="plain"))
    )
    assert max(abs(a - b) for a, b in zip(found, plain, strict=True)) < 0.5
    assert len({abs(value) % 0.0078125 for value in found}) > len(found) // 2, "bfloat16 logits lie on a grid"


# --- work that is not done twice ---


class Counted(LlamaForCausalLM):
    """Counts what it runs, padding included."""

    tokens = 0
    widest = 0

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        self.tokens += input_ids.numel()
        self.widest = max(self.widest, input_ids.shape[0])
        return super().forward(input_ids, **kwargs)


def counted(requests: Sequence[Request], **options: Any) -> tuple[int, HFEngine]:
    model = Counted(tiny_llama(VOCABULARY).config).eval()
    engine = HFEngine(model, TOKENIZER, **options)
    replies(engine, requests[:1])
    model.tokens = 0
    before = engine.profile.tokens.total()
    replies(engine, requests)
    assert engine.profile.tokens.total() - before == model.tokens, "the profile counts what was run"
    return model.tokens, engine


def test_a_prompt_is_run_once_for_all_its_choices_and_its_reply() -> None:
    prompts = [tuple(range(10 * i, 10 * i + 30)) for i in range(1, 9)]
    choices = ((3, 4, 5), (3, 4, 9), (200,))
    generation = Generation(max_tokens=1)
    requests = [Request(prompt=p, continuations=choices, generation=generation) for p in prompts]
    run, _ = counted([*requests, *requests])
    assert run == sum(map(len, prompts)) + 8 * 2, "3 and 4 are run once, the last token of a choice never"


def test_a_header_is_run_once_for_all_prompts_that_begin_with_it() -> None:
    header = tuple(range(5, 305))
    requests = [Request(prompt=(*header, i, i + 1), continuations=((7,), (8,))) for i in range(20)]
    run, engine = counted(requests, batch_size=4)
    assert run == 300 + 20 * 2
    assert engine.profile.cached > 0.9 * engine.profile.asked.total()


def test_rows_that_end_make_room_for_others() -> None:
    """8 short replies and 2 long ones over 4 slots: a batch that waits for its longest would take 3 x 30 steps."""
    limits = [30, 2, 2, 2, 2, 2, 2, 2, 2, 30]
    requests = [Request(prompt=(5 + i, 9), generation=Generation(max_tokens=limit)) for i, limit in enumerate(limits)]
    model = tiny_llama(VOCABULARY)
    model.generation_config.eos_token_id = None
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    engine = HFEngine(model, tokenizer, batch_size=4)
    found = replies(engine, requests)
    assert_same_replies(requests, replies(NaiveEngine(model, tokenizer, frozenset()), requests), found)
    assert engine.profile.passes["decode"] < 45


# --- memory ---


class Small(LlamaForCausalLM):
    """Has memory for so many tokens at once, and so many rows."""

    most_tokens, most_rows = 10**9, 10**9

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if input_ids.numel() > self.most_tokens or input_ids.shape[0] > self.most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize("layout", ["tree", "rows", "plain"])
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_that_finds_no_memory_is_halved_and_changes_no_reply(layout: Any, seed: int) -> None:
    plain = tiny_llama(VOCABULARY)
    model = Small(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    requests = [request for s in range(3) for request in random_requests(10 * seed + s)]
    engine = HFEngine(model, TOKENIZER, batch_size=16, layout=layout)
    replies(engine, requests[:1])
    assert engine.profile.layout == layout
    longest = max(len(r.prompt) + max(map(len, r.continuations), default=0) for r in requests)
    model.most_tokens, model.most_rows = longest + 5 * seed, 1 + seed
    found = replies(engine, requests)
    assert_same_replies(requests, replies(NaiveEngine(plain, TOKENIZER), requests), found)
    assert engine.profile.halvings > 0
    calm = engine.profile.halvings
    replies(engine, requests)
    assert engine.profile.halvings - calm <= calm, "what was learnt of the memory is kept"


def test_a_halved_batch_still_begins_with_its_header() -> None:
    header = tuple(range(5, 305))
    requests = [Request(prompt=(*header, *range(i, i + 40)), continuations=((7,), (8,))) for i in range(1, 17)]
    model = Small(tiny_llama(VOCABULARY).config).eval()
    engine = HFEngine(model, TOKENIZER)
    engine._limits.tokens = 512
    replies(engine, requests[:1])
    model.most_tokens = 300
    replies(engine, requests)
    assert engine.profile.halvings > 0
    assert engine.profile.tokens.total() < 3 * 300 + 2 * 16 * 40 + 340, "each prompt by itself would be 16 times 340"


@pytest.mark.parametrize("place", ["put", "move"])
def test_slots_that_find_no_memory_lose_no_reply(
    models: dict[str, Any], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = getattr(Slots, place), []

    def fails(self: Slots, *args: Any) -> None:
        asked.append(place)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        real(self, *args)

    limits = [2 + 5 * i % 9 for i in range(40)]  # short ones stand between long ones
    requests = [
        Request(prompt=(*[9] * (12 - n), i), generation=Generation(max_tokens=n)) for i, n in enumerate(limits, 4)
    ]
    engine = HFEngine(models["llama"], TOKENIZER, batch_size=6)
    replies(engine, requests[:1])
    monkeypatch.setattr(Slots, place, fails)
    found = replies(engine, requests)
    assert_same_replies(requests, replies(NaiveEngine(models["llama"], TOKENIZER), requests), found)
    assert len(asked) >= 2 and engine.profile.halvings == 1


def test_slots_that_wait_for_replies_make_room_for_scores(models: dict[str, Any]) -> None:
    """As on a GPU, where they stay after a call."""
    model = Small(models["llama"].config).eval()
    model.load_state_dict(models["llama"].state_dict())
    engine = HFEngine(model, TOKENIZER, batch_size=4)
    engine._decoder.rest = lambda: None  # type: ignore[method-assign]
    replies(engine, [Request(prompt=(5, 6), generation=Generation(max_tokens=4))])
    slots = weakref.ref(engine._decoder.slots)
    assert slots() is not None
    real = model.forward

    def forward(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if slots() is not None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(input_ids, **kwargs)

    model.forward = forward
    requests = [Request(prompt=(9, i), continuations=((7, 8), (5,))) for i in range(4, 12)]
    gc.disable()  # nothing but references keeps them
    try:
        replies(engine, requests)
    finally:
        gc.enable()
    assert engine.profile.halvings == 0


# --- the decode loop's fixed shapes ---


@pytest.mark.parametrize("name", MODELS)
def test_fixed_shapes_change_no_reply(models: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA GPU but for the graphs: rows a power of two, all columns, the same memory at each step."""
    shapes, pointers = set(), set()
    real = Decoder._pass

    def spied(self: Decoder, used: int) -> torch.Tensor:
        assert isinstance(self.slots, Slots)
        out = real(self, used)
        shapes.add((used, self.slots.width))
        pointers.add(
            (self.slots.next.data_ptr(), *(t.data_ptr() for layer in self.slots.cache.layers for t in layer.tensors()))
        )
        return out

    requests = [request for request in random_requests(8) if request.generation] * 2
    requests += [Request(prompt=(9, i), generation=Generation(max_tokens=4 + i % 7)) for i in range(4, 30)]
    engine = HFEngine(models[name], TOKENIZER, batch_size=6)
    replies(engine, requests[:1])
    engine._decoder.static = True
    monkeypatch.setattr(Decoder, "_pass", spied)
    assert_same_replies(requests, replies(NaiveEngine(models[name], TOKENIZER), requests), replies(engine, requests))
    assert {used for used, _ in shapes} <= {1, 2, 4, 6}
    assert len({width for _, width in shapes}) == len(pointers) <= 2


class Uncapturable(TorchDispatchMode):
    """Raises where the host would wait for a value, or give one: neither can be in a CUDA graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_a_decode_pass_could_be_captured_in_a_cuda_graph(
    models: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, passes = Decoder._pass, []

    def watched(self: Decoder, used: int) -> Any:
        passes.append(used)
        if len(passes) == 1:  # what is made once is made by the pass that warms up
            return real(self, used)
        with Uncapturable():
            return real(self, used)

    engine = HFEngine(models[name], TOKENIZER, batch_size=4)
    replies(engine, [Request(prompt=(5, 6), continuations=((7,),))])
    engine._decoder.static = True
    monkeypatch.setattr(Decoder, "_pass", watched)
    replies(engine, [Request(prompt=(9, i), generation=Generation(max_tokens=6)) for i in range(4, 10)])
    assert len(passes) > 2
