"""The hybrid against its teacher, against itself without a cache, and in `generate`."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from models.hybrid import CACHE
from models.kda.layer import KimiDeltaAttention
from tests.models.hybrids import CLOSE, FAMILIES, padded, tiny_hybrid, tiny_teacher, tokens

GREEDY: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_layer_kept_the_hybrid_is_its_teacher_bit_for_bit(family: str, attention: str) -> None:
    teacher = tiny_teacher(family, attn_implementation=attention)
    model = tiny_hybrid(teacher, range(3))
    assert model.config._attn_implementation == teacher.config._attn_implementation == attention
    ids, mask = padded(tokens(9, 17), "left")
    packed = torch.cat([torch.arange(9), torch.arange(8)])[None]
    documents = tokens(17)
    for inputs in (
        {"input_ids": tokens(17)},
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": padded(tokens(9, 17), "right")[0], "attention_mask": padded(tokens(9, 17), "right")[1]},
        {"input_ids": documents, "position_ids": packed, "use_cache": False},
        {"input_ids": documents, "labels": documents, "logits_to_keep": 0},
        {"input_ids": documents, "logits_to_keep": torch.tensor([3, 5])},
    ):
        expected, found = teacher(**inputs), model(**inputs)
        assert torch.equal(expected.logits, found.logits)
        assert expected.loss is None or torch.equal(expected.loss, found.loss)
    for how in ({}, {"num_beams": 3}, {"do_sample": True}):
        said = []
        for one in (teacher, model):
            torch.manual_seed(3)
            said.append(one.generate(ids, attention_mask=mask, **{**GREEDY, **how}))
        assert torch.equal(*said)


def test_kept_sliding_window_layers_are_the_teachers_own() -> None:
    teacher = tiny_teacher("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    model = tiny_hybrid(teacher, range(3))
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    ids = tokens(19)
    assert torch.equal(teacher(ids).logits, model(ids).logits)
    assert torch.equal(teacher.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {"kda_gate": "softplus", "kda_conv_size": 2}),
        ("qwen3", {"kda_rope": True, "kda_output_gate": False}),
        ("llama", {"kda_heads": 6, "kda_kv_heads": 3, "kda_head_dim": 4}),
    ],
)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(family: str, options: dict[str, Any], steps: int) -> None:
    model = tiny_hybrid(tiny_teacher(family), **options)
    for prompt in (1, 2, 70):
        ids = tokens(prompt + steps)
        full = model(ids).logits
        out = model(ids[:, :prompt], use_cache=True)
        found = [out.logits]
        for at in range(prompt, prompt + steps):
            found.append(model(ids[:, at : at + 1], **{CACHE: out[CACHE]}).logits)
        torch.testing.assert_close(torch.cat(found, 1), full, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("cuts", [(64, 65), (3, 5, 66), (1, 2, 3)])
@torch.no_grad()
def test_a_prompt_read_in_pieces_equals_the_prompt_read_at_once(cuts: tuple[int, ...]) -> None:
    model = tiny_hybrid(tiny_teacher("llama"))
    ids, cache = tokens(80), DynamicCache(config=model.config)
    pieces = [model(ids[:, a:b], **{CACHE: cache}).logits for a, b in zip((0, *cuts), (*cuts, 80), strict=True)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=0, atol=CLOSE)


@torch.no_grad()
def test_a_padded_batch_read_in_pieces_equals_each_prompt_alone() -> None:
    model = tiny_hybrid(tiny_teacher("qwen2"))
    rows = tokens(4, 20)
    ids, mask = padded(rows, "left")
    cache = DynamicCache(config=model.config)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    for a, b in ((0, 9), (9, 18), (18, 19), (19, 20)):
        out = model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=position[:, a:b], **{CACHE: cache}).logits
    for r, row in enumerate(rows):
        torch.testing.assert_close(out[r, -1], model(row).logits[0, -1], rtol=0, atol=CLOSE)


@torch.no_grad()
def test_the_state_is_float32_updated_in_place_and_inputs_are_left_alone() -> None:
    model = tiny_hybrid(tiny_teacher("llama"))
    ids, mask = padded(tokens(5, 12), "left")
    before = [ids.clone(), mask.clone()]
    cache = model(ids, attention_mask=mask, use_cache=True)[CACHE]
    state, window = cache.layers[0].recurrent_states[0], cache.layers[0].conv_states[0]
    assert state.dtype == torch.float32 and state.shape == (2, 4, 8, 8)
    assert window.shape == (2, 8 * (4 + 2 + 2), 3)
    old = state.clone()
    model(tokens(2).mT, attention_mask=torch.cat([mask, torch.ones(2, 1)], 1), **{CACHE: cache})
    assert cache.layers[0].recurrent_states[0].data_ptr() == state.data_ptr()
    assert not torch.equal(state, old)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_of_a_left_padded_batch_equals_each_prompt_alone(family: str) -> None:
    model = tiny_hybrid(tiny_teacher(family))
    rows = tokens(2, 5, 11, 70)
    ids, mask = padded(rows, "left")
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for r, row in enumerate(rows):
        alone = model.generate(row, attention_mask=torch.ones_like(row), **GREEDY)
        assert torch.equal(together[r, 70:], alone[0, row.shape[1] :])


def test_beam_search_with_a_cache_equals_beam_search_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_hybrid(tiny_teacher("llama"))
    ids, mask = padded(tokens(6, 13), "left")
    orders = []
    reorder = DynamicCache.reorder_cache

    def watched(cache: Any, order: torch.Tensor) -> None:
        orders.append(order.tolist())
        reorder(cache, order)

    monkeypatch.setattr(DynamicCache, "reorder_cache", watched)
    how = {**GREEDY, "max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 2, "attention_mask": mask}
    found = model.generate(ids, **how)
    assert any(order != sorted(order) for order in orders)
    assert torch.equal(found, model.generate(ids, **how, use_cache=False))


def test_sampling_with_a_cache_equals_sampling_without() -> None:
    model = tiny_hybrid(tiny_teacher("qwen3"))
    said = []
    for cached in (True, False):
        torch.manual_seed(5)
        said.append(model.generate(tokens(8), **{**GREEDY, "do_sample": True, "top_k": 20}, use_cache=cached))
    assert torch.equal(*said)


def test_generation_with_a_static_cache_equals_the_dynamic_one() -> None:
    model = tiny_hybrid(tiny_teacher("llama"))
    ids, mask = padded(tokens(6, 13), "left")
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, cache_implementation="static"), expected)


def test_without_any_attention_left_the_model_still_reads_and_generates() -> None:
    model = tiny_hybrid(tiny_teacher("llama"), keep=())
    ids, mask = padded(tokens(6, 13), "left")
    said = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(said, model.generate(ids, attention_mask=mask, **GREEDY, use_cache=False))


def test_a_cache_without_any_attention_left_is_refused() -> None:
    model = tiny_hybrid(tiny_teacher("llama"), ())
    with pytest.raises(ValueError, match="a cache was given, but no layer keeps attention"):
        model(tokens(5), **{CACHE: DynamicCache(config=model.config)})


def test_both_names_of_the_cache_are_understood() -> None:
    model = tiny_hybrid(tiny_teacher("llama"))
    ids = tokens(9)
    with torch.no_grad():
        full = model(ids).logits[:, -1:]
        for name in ("cache", "past_key_values"):
            out = model(ids[:, :8], use_cache=True)
            torch.testing.assert_close(model(ids[:, 8:], **{name: out[CACHE]}).logits, full, rtol=0, atol=CLOSE)


def test_a_cache_made_without_the_models_config_is_refused() -> None:
    model = tiny_hybrid(tiny_teacher("llama"))
    with pytest.raises(ValueError, match=r"no recurrent state for layer 0: make it with DynamicCache\(config=model"):
        model(tokens(4), **{CACHE: DynamicCache()})


@pytest.mark.parametrize("impl", ["reference", "recurrent"])
def test_an_implementation_can_be_forced(impl: Any) -> None:
    model = tiny_hybrid(tiny_teacher("llama"))
    ids = tokens(20)
    default = model(ids).logits
    model.set_kda_impl(impl)
    assert {m.impl for m in model.modules() if isinstance(m, KimiDeltaAttention)} == {impl}
    found = model(ids).logits
    assert torch.equal(found, default) == (impl == "reference")
    torch.testing.assert_close(found, default, rtol=0, atol=CLOSE)
    with pytest.raises(ValueError, match="impl is 'fast': expected one of triton, reference"):
        model.set_kda_impl("fast")
