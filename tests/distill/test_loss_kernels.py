"""The kernel of KL and cross-entropy: in Triton's interpreter, or on a GPU where there is one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.chunked import FUSED, chunked_loss
from distill.losses import token_loss

pytestmark = pytest.mark.usefixtures("triton_kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def draw(*shape: int, seed: int, spread: float = 3.0) -> Tensor:
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def fused(
    name: str, t: Tensor, s: Tensor, targets: Tensor, weights: Tensor, temperature: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """Losses without weights and the weighted gradient of copies of the logits."""
    from distill.kernels import triton_kl_ce

    loss, gradient = triton_kl_ce(
        None if name == "ce" else t, s.clone(), None if name == "forward-kl" else targets, weights,
        temperature=temperature, alpha=1.0 if name == "ce" else alpha, gradient=torch.float32,
    )  # fmt: skip
    assert gradient is not None
    return loss, gradient


def exact(
    name: str, t: Tensor, s: Tensor, targets: Tensor, weights: Tensor, temperature: float, alpha: float
) -> tuple[Tensor, Tensor]:
    s = s.double().requires_grad_()
    loss = token_loss(name, t.double(), s, targets, temperature=temperature, alpha=alpha)
    [gradient] = torch.autograd.grad((loss * weights).sum(), s)
    return loss.detach(), gradient


@pytest.mark.parametrize("V", [1, 37, 4096, 4097, 9000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", FUSED)
def test_losses_and_gradients_are_those_of_float64(name: str, temperature: float, V: int) -> None:
    n = 4
    t, s = draw(n, V, seed=0), draw(n, V, seed=1)
    targets = torch.tensor([0, V - 1, V // 2, 0], device=DEVICE)
    weights = torch.tensor([1.0, 0.25, 0.0, 2.0], device=DEVICE)
    loss, gradient = fused(name, t, s, targets, weights, temperature, 0.3)
    expected, expected_gradient = exact(name, t, s, targets, weights, temperature, 0.3)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)
    assert (gradient[2] == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", FUSED)
def test_extreme_logits(name: str, temperature: float) -> None:
    """A softmax of 0 and 1, its maximum in the first, the last and a middle block, all others far below."""
    V = 9000
    t, s = torch.full((3, V), -1e4, device=DEVICE), torch.full((3, V), -1e4, device=DEVICE)
    for row, (mine, other) in enumerate([(0, V - 1), (V - 1, 0), (5000, 5000)]):
        t[row, mine] = s[row, other] = 1e4
    targets = torch.tensor([0, 0, 5000], device=DEVICE)
    loss, gradient = fused(name, t, s, targets, torch.ones(3, device=DEVICE), temperature, 0.3)
    expected, expected_gradient = exact(name, t, s, targets, torch.ones(3, device=DEVICE), temperature, 0.3)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FUSED)
def test_nan_and_targets_out_of_range_are_not_hidden(name: str) -> None:
    t, s = draw(4, 5000, seed=0), draw(4, 5000, seed=1)
    s[1, 4500] = math.nan
    t[2, 3] = math.nan
    targets = torch.tensor([0, 0, 0, 5000], device=DEVICE)
    loss, gradient = fused(name, t, s, targets, torch.ones(4, device=DEVICE), 1.0, 0.3)
    assert loss.isnan().tolist() == [False, True, name != "ce", name != "forward-kl"]
    assert gradient[1].isnan().all() and gradient[0].isfinite().all()
    assert gradient[2].isnan().all() == (name != "ce")


def test_a_float32_gradient_is_written_over_the_logits_and_none_is_not_written() -> None:
    from distill.kernels import triton_kl_ce

    t, s = draw(2, 50, seed=0), draw(2, 50, seed=1)
    kept, ones = s.clone(), torch.ones(2, device=DEVICE)
    loss, gradient = triton_kl_ce(t, s, None, ones, temperature=1.0, alpha=0.0, gradient=None)
    assert gradient is None and torch.equal(s, kept)
    again, gradient = triton_kl_ce(t, s, None, ones, temperature=1.0, alpha=0.0, gradient=torch.float32)
    assert gradient is s and not torch.equal(s, kept)
    assert torch.equal(loss, again)


def case(N: int, V: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits of standard deviation 3."""
    return {
        "student_hidden": draw(N, d, seed=0).to(dtype),
        "student_head": draw(V, d, seed=1, spread=d**-0.5).to(dtype),
        "teacher_hidden": draw(N, d, seed=2).to(dtype),
        "teacher_head": draw(V, d, seed=3, spread=d**-0.5).to(dtype),
        "targets": (torch.arange(N) % V).to(DEVICE),
        "weights": (torch.arange(N) % 3 / 2).to(DEVICE),
    }


def loss_and_gradients(name: str, given: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    wanted = [given[f"student_{one}"].detach().requires_grad_() for one in ("hidden", "head")]
    given = {**given, "student_hidden": wanted[0], "student_head": wanted[1]}
    loss = chunked_loss(name, **given, temperature=1.5, alpha=0.3, **options)
    return (loss.detach(), *torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("name", FUSED)
def test_in_chunks_both_implementations_agree(name: str) -> None:
    given = case(N=11, V=300, d=16, dtype=torch.float32)
    found = loss_and_gradients(name, given, chunk=4, impl="triton")
    expected = loss_and_gradients(name, given, chunk=4, impl="torch")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        loss = chunked_loss(name, **given, temperature=1.5, alpha=0.3, chunk=4, impl="triton")
    torch.testing.assert_close(loss, found[0], rtol=0, atol=0)
    given["weights"].zero_()
    assert all((x == 0).all() for x in loss_and_gradients(name, given, impl="triton"))


def test_what_the_kernel_cant_do_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import distill.kernels

    wide = case(N=3, V=5, d=2, dtype=torch.float64)
    with pytest.raises(ValueError, match="student_hidden is torch.float64: impl='triton' takes float32 or bfloat16"):
        chunked_loss("ce", **wide, impl="triton")
    monkeypatch.setattr(distill.kernels, "interpreted", lambda: True)
    with pytest.raises(ValueError, match="bfloat16, in which Triton's interpreter is silently wrong"):
        chunked_loss("ce", **case(N=3, V=5, d=2, dtype=torch.bfloat16), impl="triton")
    if DEVICE == "cpu":
        monkeypatch.setattr(distill.kernels, "interpreted", lambda: False)
        with pytest.raises(ValueError, match="student_hidden is on cpu: impl='triton' needs a GPU, or TRITON_INTERPRE"):
            chunked_loss("ce", **case(N=3, V=5, d=2, dtype=torch.float32), impl="triton")


@needs_gpu
@pytest.mark.parametrize("V", [49_152, 151_936, 50_257])
@pytest.mark.parametrize("name", FUSED)
def test_bfloat16_on_a_gpu_is_near_float64(name: str, V: int) -> None:
    """Inputs are the same bfloat16 numbers. The loss is off by float32's rounding of logits and sums; gradients by
    bfloat16's (2^-9 a rounding: of the logits' gradient, of the result, and of the result scaled): RMS error ratios."""
    given = case(N=300, V=V, d=64, dtype=torch.bfloat16)
    found = loss_and_gradients(name, given, chunk=128)
    wide = {key: x.double() if x.dtype == torch.bfloat16 else x for key, x in given.items()}
    student = [wide[f"student_{one}"].requires_grad_() for one in ("hidden", "head")]
    logits = [wide[f"{who}_hidden"] @ wide[f"{who}_head"].T for who in ("teacher", "student")]
    loss = (token_loss(name, *logits, wide["targets"], temperature=1.5, alpha=0.3) * wide["weights"]).sum()
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == torch.bfloat16
    torch.testing.assert_close(found[0].double(), loss.detach(), rtol=1e-5, atol=0)
    for low, right in zip(found[1:], torch.autograd.grad(loss, student), strict=True):
        assert (low.double() - right).norm() < 5e-3 * right.norm()


@needs_gpu
@pytest.mark.parametrize("name", FUSED)
def test_float64_on_a_gpu_is_left_to_torch(name: str) -> None:
    given = case(N=11, V=300, d=16, dtype=torch.float64)
    found = loss_and_gradients(name, given)
    torch.testing.assert_close(found, loss_and_gradients(name, given, impl="torch"), rtol=0, atol=0)
