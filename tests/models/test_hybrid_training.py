"""Training a hybrid: loss, gradients, checkpointing, what is kept in float32."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models.hybrid import CACHE
from tests.models.hybrids import VOCAB, padded, tiny_hybrid, tiny_teacher, tokens


def gradients(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradient_checkpointing_changes_no_bit_of_the_gradients(family: str, reentrant: bool) -> None:
    model = tiny_hybrid(tiny_teacher(family)).train()
    ids = tokens(70)
    inputs = {"input_ids": ids, "labels": ids, "cu_seqlens": torch.tensor([0, 30, 70])}
    expected = gradients(model, **inputs)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    assert model.model.layers[0].gradient_checkpointing
    found = gradients(model, **inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_parameter_learns() -> None:
    model = tiny_hybrid(tiny_teacher("qwen2")).train()
    ids = tokens(20)
    for name, gradient in gradients(model, input_ids=ids, labels=ids).items():
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


def test_the_loss_is_the_mean_negative_log_likelihood_of_the_labelled_tokens() -> None:
    model = tiny_hybrid(tiny_teacher("llama"))
    ids, mask = padded(tokens(5, 17), "right")
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    target = labels[:, 1:][labels[:, 1:] >= 0]
    logits = out.logits[:, :-1][labels[:, 1:] >= 0]
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, target))
    half = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=2 * len(target))
    torch.testing.assert_close(half.loss, out.loss / 2)


def test_pads_have_no_gradient_and_make_none() -> None:
    model = tiny_hybrid(tiny_teacher("qwen2"))
    mixer = model.model.layers[0].kda
    mask = torch.ones(2, 20)
    mask[0, :6] = 0
    x = torch.randn(2, 20, 32, requires_grad=True)
    (mixer(x, mask=mask) * mask[..., None]).square().sum().backward()
    assert x.grad is not None and x.grad[0, :6].abs().max() == 0 and x.grad[0, 6:].abs().min() > 0
    expected = {name: parameter.grad.clone() for name, parameter in mixer.named_parameters()}
    mixer.zero_grad()
    rows = x.detach()
    (mixer(rows[:1, 6:]).square().sum() + mixer(rows[1:]).square().sum()).backward()
    for name, parameter in mixer.named_parameters():
        if name != "o_proj.bias":
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


def test_one_token_steps_are_differentiable_too() -> None:
    model = tiny_hybrid(tiny_teacher("llama"))
    ids = tokens(12)
    with torch.no_grad():
        cache = model(ids[:, :11], use_cache=True)[CACHE]
        expected = model(ids[:, 11:], **{CACHE: copy.deepcopy(cache)}).logits
    found = model(ids[:, 11:], **{CACHE: cache}).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    found.sum().backward()
    assert model.model.layers[0].kda.A_log.grad.abs().max() > 0


def test_hidden_states_and_attentions_can_be_asked_for() -> None:
    model = tiny_hybrid(tiny_teacher("llama", attn_implementation="eager"))
    out = model(tokens(9), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in out.hidden_states] == [(1, 9, 32)] * 4
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert [tuple(weights.shape) for weights in out.attentions] == [(1, 4, 9, 9)]


def test_logits_are_kept_where_they_are_asked_for() -> None:
    model = tiny_hybrid(tiny_teacher("llama"))
    ids = tokens(9)
    full = model(ids).logits
    assert full.shape == (1, 9, VOCAB)
    for kept, columns in ((1, [8]), (3, [6, 7, 8]), (torch.tensor([2, 5]), [2, 5])):
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, full[:, columns])


def test_autocast_runs_with_the_decay_in_float32() -> None:
    model = tiny_hybrid(tiny_teacher("qwen3")).train()
    ids = tokens(20)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert (out.logits - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()
    assert model.model.layers[0].kda.dt_bias.grad.dtype == torch.float32
