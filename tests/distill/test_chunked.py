"""The losses in chunks of tokens against the dense ones: values, gradients, and what is never held."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from distill.chunked import chunked_loss, default_chunk
from distill.losses import LOSSES, token_loss

OPTIONS: dict[str, Any] = {"temperature": 1.7, "alpha": 0.3, "beta": 0.2, "k": 5}
Case = dict[str, Tensor]


def make(N: int = 13, V: int = 23, dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """Hidden states and heads of both models, targets, and weights of which some are 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = torch.rand(N, generator=generator) * (torch.rand(N, generator=generator) < 0.7)
    return {
        "student_hidden": draw(N, 6),
        "student_head": draw(V, 6),
        "teacher_hidden": draw(N, 4),
        "teacher_head": draw(V, 4),
        "targets": torch.randint(V, (N,), generator=generator),
        "weights": weights,
    }


def leaves(case: Case, *names: str) -> list[Tensor]:
    """The student's tensors, made to require gradients."""
    return [case[f"student_{name}"].requires_grad_() for name in names]


def dense(name: str, case: Case, **options: Any) -> Tensor:
    student, teacher = (case[f"{who}_hidden"] @ case[f"{who}_head"].T for who in ("student", "teacher"))
    return (token_loss(name, teacher, student, case["targets"], **options) * case["weights"]).sum()


def assert_close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
@pytest.mark.parametrize("chunk", [1, 4, 100, None])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_the_dense_ones(name: str, chunk: int | None, trained: str, dtype: torch.dtype) -> None:
    case = make(dtype=dtype)
    wanted = leaves(case, *(["hidden", "head"] if trained == "both" else [trained]))
    expected = dense(name, case, **OPTIONS)
    found = chunked_loss(name, **case, chunk=chunk, **OPTIONS)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert (found.dtype, found.shape) == (dtype, ())
    assert_close(found, expected, tolerance)
    assert_close(torch.autograd.grad(3 * found, wanted), torch.autograd.grad(3 * expected, wanted), tolerance)


@given(
    name=st.sampled_from(LOSSES),
    N=st.integers(1, 9),
    V=st.integers(1, 20),
    chunk=st.integers(1, 10),
    seed=st.integers(0, 2**31 - 1),
    temperature=st.floats(0.25, 4),
)
@settings(max_examples=60, deadline=None)
def test_any_sizes(name: str, N: int, V: int, chunk: int, seed: int, temperature: float) -> None:
    case = make(N, V, seed=seed)
    wanted = leaves(case, "hidden", "head")
    options = {**OPTIONS, "temperature": temperature, "k": min(5, V)}
    expected, found = dense(name, case, **options), chunked_loss(name, **case, chunk=chunk, **options)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    case = make(5, 7)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return chunked_loss(name, **{**case, "student_hidden": hidden, "student_head": head}, chunk=2, **OPTIONS)

    assert gradcheck(loss, tuple(leaves(case, "hidden", "head")))


@pytest.mark.parametrize("name", LOSSES)
def test_a_tied_head_gets_both_gradients(name: str) -> None:
    case = make()
    embedding = nn.Embedding(23, 6, dtype=torch.float64)
    hidden = embedding(torch.arange(13)).tanh()
    tied = {**case, "student_hidden": hidden, "student_head": embedding.weight}
    [expected] = torch.autograd.grad(dense(name, tied, **OPTIONS), embedding.weight, retain_graph=True)
    [found] = torch.autograd.grad(chunked_loss(name, **tied, chunk=4, **OPTIONS), embedding.weight)
    assert_close(found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_tokens_of_weight_0_are_not_read(name: str) -> None:
    case = make()
    wanted = leaves(case, "hidden", "head")
    out = case["weights"] == 0
    assert 0 < out.sum() < len(out)
    expected = torch.autograd.grad(dense(name, case, **OPTIONS), wanted)
    spoilt = {**case, "student_hidden": case["student_hidden"].masked_fill(out[:, None], torch.nan)}
    spoilt["teacher_hidden"] = case["teacher_hidden"].masked_fill(out[:, None], torch.nan)
    spoilt["targets"] = case["targets"].masked_fill(out, -100)
    found = torch.autograd.grad(chunked_loss(name, **spoilt, chunk=4, **OPTIONS), wanted)
    assert_close(found, expected)
    assert (found[0][out] == 0).all()


def test_rows_are_the_tokens_to_look_at() -> None:
    case = make()
    wanted = leaves(case, "hidden", "head")
    for rows in (case["weights"].nonzero()[:, 0], torch.arange(13)):
        found = chunked_loss("kl-ce", **case, rows=rows, chunk=4, **OPTIONS)
        expected = dense("kl-ce", case, **OPTIONS)
        assert_close(found, expected)
        assert_close(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted))
    some = {name: x[:3] if len(x) == 13 else x for name, x in case.items()}
    assert_close(
        chunked_loss("ce", **case, rows=torch.arange(3), **OPTIONS),
        dense("ce", some, **OPTIONS),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_without_weights_or_tokens_the_loss_and_its_gradients_are_0(name: str) -> None:
    case = make()
    case["weights"] = torch.zeros(13)
    nothing = {key: x[:0] if len(x) == 13 else x.detach() for key, x in make().items()}
    for given_case in (case, nothing):
        wanted = leaves(given_case, "hidden", "head")
        loss = chunked_loss(name, **given_case, **OPTIONS)
        assert loss.item() == 0
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_gets_bfloat16_gradients_of_float32_logits(name: str) -> None:
    case = make(dtype=torch.bfloat16)
    wanted = leaves(case, "hidden", "head")
    found = chunked_loss(name, **case, chunk=4, **OPTIONS)
    gradients = torch.autograd.grad(found, wanted)
    assert found.dtype == torch.float32
    wide = {key: x.detach().double() if x.dtype == torch.bfloat16 else x for key, x in case.items()}
    expected = dense(name, wide | dict(zip(("student_hidden", "student_head"), (w := leaves(wide, "hidden", "head")),
                                           strict=True)), **OPTIONS)  # fmt: skip
    assert_close(found.double(), expected, 1e-5)
    for low, right in zip(gradients, torch.autograd.grad(expected, w), strict=True):
        assert low.dtype == torch.bfloat16
        assert (low.double() - right).norm() < 4e-3 * right.norm()  # one rounding to 8 bits, and one by the scale


def test_an_evaluation_keeps_no_gradient() -> None:
    case = make()
    leaves(case, "hidden", "head")
    with torch.no_grad():
        loss = chunked_loss("forward-kl", **case, **OPTIONS)
    assert not loss.requires_grad
    assert_close(loss, dense("forward-kl", case, **OPTIONS).detach(), 1e-9)
    assert not chunked_loss("forward-kl", **make(), **OPTIONS).requires_grad


def test_no_gradient_reaches_the_teacher_or_the_weights() -> None:
    case = make()
    [hidden] = leaves(case, "hidden")
    for name in ("teacher_hidden", "teacher_head", "weights"):
        case[name].requires_grad_()
    chunked_loss("kl-ce", **case, **OPTIONS).backward()
    assert hidden.grad is not None
    assert all(case[name].grad is None for name in ("teacher_hidden", "teacher_head", "weights", "student_head"))


def test_backward_can_run_twice() -> None:
    case = make()
    wanted = leaves(case, "hidden", "head")
    loss = chunked_loss("forward-kl", **case, **OPTIONS)
    first = torch.autograd.grad(2 * loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert_close(first, tuple(2 * x for x in second), 1e-12)


def test_autocast_has_no_effect() -> None:
    case = make(dtype=torch.float32)
    wanted = leaves(case, "hidden", "head")
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = chunked_loss("forward-kl", **case, **OPTIONS)
            results.append((loss, *torch.autograd.grad(loss, wanted)))
    assert_close(*results, tolerance=0)


def test_tensors_may_have_any_strides() -> None:
    case = make()
    expected = dense("kl-ce", case, **OPTIONS)
    strided = {name: torch.stack([x, x], -1)[..., 0] for name, x in case.items()}
    assert not strided["student_hidden"].is_contiguous()
    assert_close(chunked_loss("kl-ce", **strided, chunk=4, **OPTIONS), expected)


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operation gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("name", LOSSES)
def test_the_logits_of_all_tokens_are_never_held(name: str) -> None:
    case = make(N=64, V=40)
    wanted = leaves(case, "hidden", "head")
    with Largest() as largest:
        torch.autograd.grad(chunked_loss(name, **case, chunk=8, **OPTIONS), wanted)
    assert largest.numel <= max(8 * 40, 64 * 6)


@pytest.mark.parametrize(("V", "itemsize", "tokens"), [(49_152, 4, 1280), (151_936, 4, 384), (151_936, 8, 128)])
def test_the_default_chunk_of_logits_takes_at_most_256_mib(V: int, itemsize: int, tokens: int) -> None:
    assert default_chunk(V, itemsize) == tokens
    assert V * itemsize * tokens <= 256 * 2**20
    assert default_chunk(10**7) == 128


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("forwrd-kl", {}, "unknown loss 'forwrd-kl': did you mean 'forward-kl'"),
        ("forward-kl", {"teacher_head": None}, "the teacher is None: forward-kl"),
        ("ce", {"targets": None}, "targets is None: ce"),
        ("forward-kl", {"student_hidden": torch.ones(13)}, r"student_hidden has shape \(13,\): expected \[tokens, wid"),
        ("ce", {"student_head": torch.ones(23, 5).double()}, r"student_head has shape \(23, 5\): expected \[.*, 6\]"),
        ("reverse-kl", {"teacher_hidden": torch.ones(12, 4).double()}, r"teacher_hidden has shape \(12, 4\).*\[13, w"),
        ("reverse-kl", {"teacher_head": torch.ones(22, 4).double()}, "teacher_head has a vocabulary of 22, student_he"),
        ("ce", {"student_head": torch.ones(23, 6)}, r"student_head is torch.float32, student_hidden torch.float64"),
        ("ce", {"student_hidden": torch.ones(13, 6).half()}, "student_hidden is torch.float16: expected bfloat16"),
        ("ce", {"targets": torch.zeros(12).long()}, r"targets has shape \(12,\): expected \[13\]"),
        ("ce", {"targets": torch.zeros(13)}, "targets is torch.float32: expected int64"),
        ("ce", {"targets": torch.full((13,), 23)}, "targets has the id 23 .* expected 0 to 22"),
        ("kl-ce", {"targets": torch.full((13,), -100)}, "targets has the id -100 .* expected 0 to 22"),
        ("ce", {"weights": torch.ones(13, 1)}, r"weights has shape \(13, 1\): expected \[13\]"),
        ("ce", {"weights": torch.ones(13).long()}, "weights is torch.int64: expected float32"),
        ("ce", {"rows": torch.tensor([0, 13])}, "rows is .*: expected ascending numbers from 0 to 12"),
        ("ce", {"rows": torch.tensor([3, 3])}, "rows is .* each once"),
        ("ce", {"rows": torch.tensor([0.0])}, "rows is torch.float32"),
        ("top-k-kl", {"k": 24}, "k is 24: expected .* at most the vocabulary's 23"),
        ("forward-kl", {"temperature": -1.0}, "temperature is -1.0"),
        ("forward-kl", {"chunk": 0}, "chunk is 0: expected"),
        ("forward-kl", {"impl": "fast"}, "impl is 'fast': expected one of triton, torch"),
        ("reverse-kl", {"impl": "triton"}, "impl='triton' computes forward-kl, kl-ce, ce, not reverse-kl"),
    ],
)
def test_what_cant_be_computed_is_named(name: str, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {**make(), **change}
    with pytest.raises(ValueError, match=message):
        chunked_loss(name, **arguments)
