"""The dense losses against torch, scipy and closed forms."""

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr
from torch import Tensor
from torch.autograd import gradcheck

from distill.losses import (
    LOSSES,
    cross_entropy,
    forward_kl,
    hidden_alignment,
    jensen_shannon,
    kl_ce,
    qk_alignment,
    reverse_kl,
    token_loss,
    top_k_kl,
)
from distill.stage import ALIGNMENTS, LossName

DIVERGENCES: tuple[Callable[..., Tensor], ...] = (forward_kl, reverse_kl, jensen_shannon, top_k_kl)
OPTIONS: dict[str, Any] = {"temperature": 1.7, "alpha": 0.3, "beta": 0.2, "k": 3}
seeds = st.integers(0, 2**31 - 1)
spreads = st.floats(0.01, 100)


def draw(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(V: int = 7, n: int = 5, seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    return draw(n, V, seed=seed, spread=spread), draw(n, V, seed=seed + 1, spread=spread)


def probabilities(t: Tensor, s: Tensor, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    return (t / temperature).softmax(-1).numpy(), (s / temperature).softmax(-1).numpy()


def same(x: Tensor, y: Tensor | np.ndarray | float) -> None:
    torch.testing.assert_close(x, torch.as_tensor(y, dtype=x.dtype).expand_as(x), rtol=1e-9, atol=1e-12)


def test_the_names_are_those_of_stages() -> None:
    assert set(LOSSES) == set(get_args(LossName)) - set(ALIGNMENTS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_forward_and_reverse_kl_are_torchs_and_scipys(temperature: float) -> None:
    t, s = pair()
    p, q = probabilities(t, s, temperature)
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (t, s))
    forward = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    same(forward_kl(t, s, temperature=temperature), forward)
    same(forward_kl(t, s, temperature=temperature), temperature**2 * rel_entr(p, q).sum(-1))
    same(reverse_kl(t, s, temperature=temperature), temperature**2 * rel_entr(q, p).sum(-1))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_two_relative_entropies_to_the_mixture(beta: float, temperature: float) -> None:
    t, s = pair()
    p, q = probabilities(t, s, temperature)
    m = beta * p + (1 - beta) * q
    expected = beta * rel_entr(p, m).sum(-1) + (1 - beta) * rel_entr(q, m).sum(-1)
    same(jensen_shannon(t, s, temperature=temperature, beta=beta), temperature**2 * expected)


def test_jensen_shannon_tends_to_the_forward_and_to_the_reverse_kl() -> None:
    t, s = pair()
    torch.testing.assert_close(jensen_shannon(t, s, beta=1e-6) / 1e-6, forward_kl(t, s), rtol=1e-3, atol=0)
    torch.testing.assert_close(jensen_shannon(t, s, beta=1 - 1e-6) / 1e-6, reverse_kl(t, s), rtol=1e-3, atol=0)


@given(seed=seeds, spread=spreads)
@settings(max_examples=30, deadline=None)
def test_jensen_shannon_is_symmetric_at_one_half_and_at_most_ln_2(seed: int, spread: float) -> None:
    t, s = pair(seed=seed, spread=spread)
    there, back = jensen_shannon(t, s), jensen_shannon(s, t)
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-12)
    assert (there <= math.log(2) + 1e-12).all()


def test_jensen_shannon_of_disjoint_distributions_is_ln_2() -> None:
    same(jensen_shannon(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])), math.log(2))


@pytest.mark.parametrize("k", [1, 2, 6])
def test_top_k_kl_is_over_the_teachers_k_likeliest_and_one_bin(k: int) -> None:
    t, s = pair()
    p, q = probabilities(t, s, 2.0)
    for n, loss in enumerate(top_k_kl(t, s, temperature=2.0, k=k)):
        top = np.argsort(-p[n])[:k]
        P, Q = (np.append(x[n][top], 1 - x[n][top].sum()) for x in (p, q))
        same(loss, 4 * rel_entr(P, Q).sum())


def test_top_k_kl_keeps_a_rest_too_small_for_float32_to_subtract() -> None:
    t = torch.tensor([[0.0, -20.0, -21.0]])
    s = torch.tensor([[0.0, -30.0, -31.0]])
    expected = top_k_kl(t.double(), s.double(), k=1).float()
    # The first token's log-probability of -3e-9 is 0 in float32, which is the rest of the difference.
    torch.testing.assert_close(top_k_kl(t, s, k=1), expected, rtol=0, atol=3e-9)
    assert expected > 2e-8


@given(seed=seeds, spread=st.floats(0.01, 20))
@settings(max_examples=30, deadline=None)
def test_top_k_kl_never_falls_with_k_and_ends_at_the_forward_kl(seed: int, spread: float) -> None:
    t, s = pair(seed=seed, spread=spread)
    values = torch.stack([top_k_kl(t, s, k=k) for k in range(1, 8)])
    assert (values.diff(dim=0) >= -1e-10 * values[-1]).all()
    same(values[-1], forward_kl(t, s))


@given(seed=seeds, spread=spreads, shift=st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
def test_a_divergence_is_never_negative_is_0_of_equals_and_ignores_a_shift(
    seed: int, spread: float, shift: float
) -> None:
    t, s = pair(seed=seed, spread=spread)
    for divergence in DIVERGENCES:
        options = {"k": 3} if divergence is top_k_kl else {}
        value = divergence(t, s, temperature=2.0, **options)
        assert (value >= -1e-12).all()
        same(divergence(t, t, temperature=2.0, **options), 0.0)
        shifted = divergence(t + shift, s - shift, temperature=2.0, **options)
        torch.testing.assert_close(shifted, value, rtol=1e-8, atol=1e-10)


def test_cross_entropy_and_its_sum_with_the_kl_are_torchs() -> None:
    t, s = pair()
    targets = torch.tensor([0, 6, 3, 3, 1])
    expected = F.cross_entropy(s, targets, reduction="none")
    same(cross_entropy(s, targets), expected)
    same(kl_ce(t, s, targets, temperature=2.0, alpha=0.3), forward_kl(t, s, temperature=2.0) + 0.3 * expected)
    same(kl_ce(t, s, targets, temperature=2.0), forward_kl(t, s, temperature=2.0))


def test_at_a_high_temperature_the_gradient_is_that_of_centred_logits() -> None:
    """(s - t) / V for logits of mean 0: section 2.1 of arXiv:1503.02531, with the temperature's square."""
    t, s = (x - x.mean(-1, keepdim=True) for x in pair())
    s.requires_grad_()
    [gradient] = torch.autograd.grad(forward_kl(t, s, temperature=1e4).sum(), s)
    torch.testing.assert_close(gradient, (s.detach() - t) / 7, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    t, s = pair()
    targets = torch.tensor([0, 6, 3, 3, 1])
    assert gradcheck(lambda x: token_loss(name, t, x, targets, **OPTIONS), s.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_float32_a_token_and_float64_for_float64(name: str) -> None:
    t, s = draw(2, 3, 7), draw(2, 3, 7, seed=1)
    targets = torch.tensor([[0, 1, 2], [3, 4, 5]])
    wide = token_loss(name, t, s, targets, **OPTIONS)
    assert (wide.dtype, wide.shape) == (torch.float64, (2, 3))
    t, s = t.bfloat16(), s.bfloat16()
    low = token_loss(name, t, s, targets, **OPTIONS)
    assert (low.dtype, low.shape) == (torch.float32, (2, 3))
    torch.testing.assert_close(low, token_loss(name, t.float(), s.float(), targets, **OPTIONS), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_give_finite_losses_and_nan_is_not_hidden(name: str) -> None:
    t = torch.tensor([[1e4, -1e4, 0.0, 0.0]] * 2)
    s = torch.tensor([[-1e4, 1e4, 0.0, 0.0], [0.0, math.nan, 0.0, 0.0]], requires_grad=True)
    loss = token_loss(name, t, s, torch.tensor([0, 0]), temperature=1.0, alpha=1.0, k=2)
    loss.sum().backward()
    assert s.grad is not None
    assert loss[0].isfinite() and s.grad[0].isfinite().all()
    assert loss[1].isnan() and s.grad[1].isnan().any()


def test_a_vocabulary_of_one_token_leaves_nothing_to_learn() -> None:
    for name in LOSSES:
        one = torch.tensor([[3.0], [-2.0]])
        same(token_loss(name, one, -one, torch.tensor([0, 0]), temperature=2.0, alpha=1.0, k=1), 0.0)


def test_hidden_alignment_is_the_rms_of_the_difference() -> None:
    s, t = draw(2, 3, 8), draw(2, 3, 8, seed=1)
    same(hidden_alignment(s, t), (s - t).square().mean(-1).sqrt())
    assert gradcheck(lambda x: hidden_alignment(x, t), s.requires_grad_())
    [gradient] = torch.autograd.grad(hidden_alignment(s, s.detach()).sum(), s)
    same(gradient, 0.0)
    assert hidden_alignment(s.bfloat16(), t.bfloat16()).dtype == torch.float32


def test_qk_alignment_is_twice_one_less_the_cosine_of_each_head() -> None:
    s, t = draw(2, 3, 4, 8), draw(2, 3, 4, 8, seed=1)
    expected = 2 - 2 * F.cosine_similarity(s, t, dim=-1)
    assert expected.shape == (2, 3, 4)
    torch.testing.assert_close(qk_alignment(s, t), expected, rtol=1e-5, atol=1e-6)  # its eps is under the root
    torch.testing.assert_close(qk_alignment(5 * s, t), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(qk_alignment(-t, t), torch.full_like(expected, 4.0), rtol=1e-5, atol=0)
    assert gradcheck(lambda x: qk_alignment(x, t), s.requires_grad_())
    nothing = torch.zeros(1, 1, 8, requires_grad=True)
    qk_alignment(nothing, torch.ones(1, 1, 8)).sum().backward()
    assert nothing.grad is not None and nothing.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("forward_kl", {}, "unknown loss 'forward_kl': did you mean 'forward-kl'"),
        ("align-qk", {}, "expected one of forward-kl"),
        ("forward-kl", {"temperature": 0.0}, "temperature is 0.0: expected a finite number above 0"),
        ("reverse-kl", {"temperature": math.nan}, "temperature is nan"),
        ("kl-ce", {"alpha": -0.1}, "alpha is -0.1: expected .* 0 or more"),
        ("jensen-shannon", {"beta": 1.0}, "beta is 1.0: expected .* below 1"),
        ("top-k-kl", {"k": 8}, "k is 8: expected .* at most the vocabulary's 7"),
        ("top-k-kl", {"k": 0}, "k is 0: expected .* 1 or more"),
    ],
)
def test_a_wrong_name_or_option_is_named_with_what_is_expected(
    name: str, options: dict[str, Any], message: str
) -> None:
    t, s = pair()
    with pytest.raises(ValueError, match=message):
        token_loss(name, t, s, torch.zeros(5, dtype=torch.long), **options)


def test_shapes_that_differ_and_missing_inputs_are_named() -> None:
    t, s = pair()
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(5, 6\), student_logits \(5, 7\)"):
        forward_kl(t[:, :6], s)
    with pytest.raises(ValueError, match=r"targets has shape \(1,\): expected \[5\]"):
        cross_entropy(s, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"student has shape \(5, 7\), teacher \(7,\)"):
        hidden_alignment(s, t[0])
    with pytest.raises(ValueError, match="teacher is None: reverse-kl"):
        token_loss("reverse-kl", None, s)
    with pytest.raises(ValueError, match="targets is None: kl-ce"):
        token_loss("kl-ce", t, s)
