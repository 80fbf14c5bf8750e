"""What stands beside a text changes nothing: padding on either side, other documents in the same row."""

from typing import Any

import pytest
import torch

from models.hybrid import CACHE
from models.kda.layer import short_conv
from tests.models.hybrids import CLOSE, FAMILIES, padded, tiny_hybrid, tiny_teacher, tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_padded_batch_equals_each_text_alone(family: str, side: str) -> None:
    model = tiny_hybrid(tiny_teacher(family))
    rows = tokens(1, 3, 17, 70)
    ids, mask = padded(rows, side)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    for inputs in ({"position_ids": position}, {"position_ids": position, "use_cache": False}):
        found = model(ids, attention_mask=mask, **inputs).logits
        for r, row in enumerate(rows):
            torch.testing.assert_close(found[r][mask[r].bool()], model(row).logits[0], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_what_the_pads_are_changes_no_bit(side: str) -> None:
    model = tiny_hybrid(tiny_teacher("qwen2"))
    ids, mask = padded(tokens(5, 17), side)
    found = model(ids, attention_mask=mask).logits[mask.bool()]
    other = model(ids.masked_fill(mask == 0, 33), attention_mask=mask).logits[mask.bool()]
    assert torch.equal(found, other)
    mixer = model.model.layers[0].kda
    x = torch.randn(2, 17, 32)
    assert torch.equal(mixer(x, mask=mask), mixer(x.masked_fill(~mask.bool()[..., None], torch.nan), mask=mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_in_half_precision_pads_write_nothing_and_forget_nothing(dtype: torch.dtype) -> None:
    mixer = tiny_hybrid(tiny_teacher("qwen2")).model.layers[0].kda.to(dtype)
    for name in ("A_log", "dt_bias", "o_norm"):
        setattr(mixer, name, torch.nn.Parameter(getattr(mixer, name).float()))
    torch.manual_seed(0)
    x, mask = torch.randn(1, 30, 32, dtype=dtype), torch.ones(1, 30)
    mask[:, :9] = 0
    torch.testing.assert_close(mixer(x, mask=mask)[:, 9:], mixer(x[:, 9:]), rtol=0, atol=4 * torch.finfo(dtype).eps)


def state(layer: Any) -> torch.Tensor:
    """What a KDA layer remembers of each row [rows, numbers]."""
    return torch.cat([layer.recurrent_states[0].flatten(1), layer.conv_states[0].flatten(1)], 1)


@torch.no_grad()
def test_the_state_after_a_padded_batch_is_each_texts_own() -> None:
    model = tiny_hybrid(tiny_teacher("qwen2"))
    rows = tokens(5, 66, 1, 2)
    alone = [state(model(row, use_cache=True)[CACHE].layers[0]) for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        out = model(ids, attention_mask=mask, position_ids=position, use_cache=True)
        torch.testing.assert_close(state(out[CACHE].layers[0]), torch.cat(alone), rtol=0, atol=1e-5)


@torch.no_grad()
def test_texts_padded_on_the_right_go_on_from_their_cache() -> None:
    """In three padded pieces, the last shorter than the convolution; logits and states are those of the whole texts."""
    model = tiny_hybrid(tiny_teacher("qwen3"), keep=(1,))
    pieces = [tokens(5, 20, 2, 9), tokens(3, 1, 40, 2, seed=3), tokens(2, 1, 1, 2, seed=4)]
    seen, lengths, cache = torch.zeros(4, 0, dtype=torch.long), torch.zeros(4, 1, dtype=torch.long), None
    for piece in pieces:
        ids, mask = padded(piece, "right")
        seen = torch.cat([seen, mask], 1)
        position = lengths + torch.arange(ids.shape[1])
        given = {} if cache is None else {CACHE: cache}
        out = model(ids, attention_mask=seen, position_ids=position, use_cache=True, **given)
        cache, lengths = out[CACHE], lengths + mask.sum(1, keepdim=True)
    for r in range(4):
        whole = model(torch.cat([piece[r] for piece in pieces], 1), use_cache=True)
        end = pieces[-1][r].shape[1] - 1
        torch.testing.assert_close(out.logits[r, end], whole.logits[0, -1], rtol=0, atol=CLOSE)
        for layer in (0, 2):
            found, expected = (state(one.layers[layer]) for one in (cache, whole[CACHE]))
            torch.testing.assert_close(found[r], expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_each_document_alone(family: str, attention: str) -> None:
    model = tiny_hybrid(tiny_teacher(family, attn_implementation=attention), kda_rope=True)
    documents = tokens(1, 2, 17, 66, 3)
    expected = torch.cat([model(document).logits for document in documents], 1)
    row = torch.cat(documents, 1)
    starts = torch.tensor([0, 1, 3, 20, 86, 89])
    position = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    found = model(row, cu_seqlens=starts)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=CLOSE)
    assert found[CACHE] is None if CACHE in found else True
    for inputs in (
        {"position_ids": position},
        {"position_ids": position, "cu_seqlens": starts.int(), "use_cache": False},
        {"cu_seqlens": starts, "attention_mask": torch.ones_like(row)},
        {"cu_seqlens": torch.tensor([0, 0, 1, 3, 20, 20, 86, 89])},
    ):
        assert torch.equal(model(row, **inputs).logits, found.logits)


@torch.no_grad()
def test_rows_of_a_batch_may_each_be_packed() -> None:
    model = tiny_hybrid(tiny_teacher("qwen3"))
    rows = [tokens(4, 9), tokens(10, 3, seed=4)]
    ids = torch.cat([torch.cat(row, 1) for row in rows])
    position = torch.stack([torch.cat([torch.arange(document.shape[1]) for document in row]) for row in rows])
    found = model(ids, position_ids=position).logits
    for r, row in enumerate(rows):
        expected = torch.cat([model(document).logits for document in row], 1)
        torch.testing.assert_close(found[r : r + 1], expected, rtol=0, atol=CLOSE)


@torch.no_grad()
def test_another_document_before_it_changes_no_bit_of_a_packed_one() -> None:
    model = tiny_hybrid(tiny_teacher("llama"))
    first, second = tokens(20, 9)
    starts = torch.tensor([0, 20, 29])
    found = model(torch.cat([first, second], 1), cu_seqlens=starts).logits[:, 20:]
    other = model(torch.cat([first.flip(1), second], 1), cu_seqlens=starts).logits[:, 20:]
    assert torch.equal(found, other)


@pytest.mark.parametrize("taps", [2, 4])
def test_the_convolution_is_causal_depthwise_and_stops_at_documents(taps: int) -> None:
    torch.manual_seed(0)
    x, weight, before = torch.randn(2, 11, 6), torch.randn(6, taps), torch.randn(2, taps - 1, 6)

    def oracle(x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv1d(torch.cat([before, x], 1).mT, weight[:, None], groups=6).mT

    torch.testing.assert_close(short_conv(x, weight), oracle(x, torch.zeros_like(before)))
    torch.testing.assert_close(short_conv(x, weight, before), oracle(x, before))
    position = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 0, 1, 2, 3, *range(11)]])
    packed = short_conv(x, weight, position=position)
    for row, begin, end in ((0, 0, 4), (0, 4, 5), (0, 5, 7), (0, 7, 11), (1, 0, 11)):
        own = x[row : row + 1, begin:end]
        torch.testing.assert_close(packed[row : row + 1, begin:end], oracle(own, torch.zeros(1, taps - 1, 6)))


@torch.no_grad()
def test_later_tokens_change_no_bit_of_earlier_outputs() -> None:
    model = tiny_hybrid(tiny_teacher("llama", attn_implementation="eager"))
    ids = tokens(70)
    other = ids.clone()
    other[:, 40:] = 3
    assert torch.equal(model(ids).logits[:, :40], model(other).logits[:, :40])


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (
            {"cu_seqlens": [0, 5, 8]},
            r"cu_seqlens is \[0, 5, 8\]: expected to begin with 0, never to fall, and to end at 9",
        ),
        ({"cu_seqlens": [0, 5, 4, 9]}, "cu_seqlens is .* never to fall"),
        ({"cu_seqlens": [[0, 9]]}, r"cu_seqlens has shape \(1, 2\) .*: expected \[documents \+ 1\] integers"),
        ({"cu_seqlens": [0, 5, 9], "rows": 2}, "cu_seqlens is .* and to end at 18"),
        ({"cu_seqlens": [0, 5, 18], "rows": 2}, "cu_seqlens has no document that begins at 9, where a row of 9 tokens"),
        ({"cu_seqlens": [0, 5, 9], "attention_mask": [[0, 1, 1, 1, 1, 1, 1, 1, 1]]}, "attention_mask has padding"),
        (
            {"cu_seqlens": [0, 5, 9], "position_ids": [[0, 1, 2, 3, 0, 1, 2, 3, 4]]},
            r"position_ids begin anew at \[0, 4\]: expected the starts of cu_seqlens \[0, 5\]",
        ),
        ({"attention_mask": [[[[1] * 9] * 9]]}, r"attention_mask has shape \(1, 1, 9, 9\): expected \[batch, tokens\]"),
        ({"inputs_embeds": [[[0.0] * 32]]}, "input_ids and inputs_embeds: expected exactly one of them"),
    ],
)
def test_what_can_not_be_read_is_refused(inputs: dict[str, Any], says: str) -> None:
    model = tiny_hybrid(tiny_teacher("llama"))
    ids = tokens(9).expand(inputs.pop("rows", 1), -1)
    with pytest.raises(ValueError, match=says):
        model(ids, **{name: torch.tensor(value) for name, value in inputs.items()})


def test_packed_documents_can_not_go_on_from_a_cache() -> None:
    model = tiny_hybrid(tiny_teacher("llama"))
    cache = model(tokens(9), use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="a cache was given beside cu_seqlens"):
        model(tokens(9), cu_seqlens=torch.tensor([0, 4, 9]), **{CACHE: cache})
