"""The kernels around the recurrence against plain PyTorch: in Triton's interpreter, or on a GPU where there is one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.hybrid import CACHE
from models.kda.layer import gated_norm, short_conv
from tests.models.hybrids import CLOSE, padded, tiny_hybrid, tiny_teacher, tokens
from tests.models.kda.oracles import OVERFLOW_TO_A_LIMIT

pytestmark = [pytest.mark.usefixtures("triton_kernels"), OVERFLOW_TO_A_LIMIT]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]  # the interpreter errs in bfloat16


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def assert_same(found: Tensor, expected: Tensor) -> None:
    """RMS error ratio to float64."""
    error = (found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < (5e-3 if found.dtype == torch.bfloat16 else 2e-6), error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 63, 64, 130])
@pytest.mark.parametrize("before", [False, True])
def test_the_convolution(T: int, before: bool, dtype: torch.dtype) -> None:
    from models.kda.kernels.mixer import triton_conv

    x, weight = draw(2, T, 72, dtype=dtype), draw(72, 4, dtype=dtype, seed=1)
    early = draw(2, 80, 3, dtype=dtype, seed=2).mT[..., 4:76] if before else None
    assert_same(triton_conv(x, weight, early), short_conv(x.double(), weight.double(), wide(early)))
    strided = draw(T, 2, 72, dtype=dtype).transpose(0, 1)
    assert_same(triton_conv(strided, weight), short_conv(strided.double(), weight.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_the_convolutions_gradients(packed: bool, taps: int, dtype: torch.dtype) -> None:
    from models.kda.kernels.mixer import triton_conv

    x, weight, dy = draw(2, 70, 72, dtype=dtype), draw(72, taps, seed=1), draw(2, 70, 72, dtype=dtype, seed=2)
    places = torch.cat([torch.arange(n) for n in (1, 2, 60, 7, 70)])[None].to(DEVICE) if packed else None
    results = []
    for conv, of in ((triton_conv, lambda t: t), (short_conv, lambda t: t.double())):
        leaves = [of(t).detach().requires_grad_() for t in (x, weight)]
        y = conv(*leaves, position=places)
        y.backward(of(dy))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [16, 24, 128])
@pytest.mark.parametrize("gated", [False, True])
def test_the_gated_norm_and_its_gradients(gated: bool, V: int, dtype: torch.dtype) -> None:
    from models.kda.kernels.mixer import triton_norm

    o, dy = draw(2, 37, 3, V, dtype=dtype), draw(2, 37, 3, V, dtype=dtype, seed=1)
    o[0, :3] = 0
    z = draw(2, 37, 3, V, dtype=dtype, seed=2) * 3 if gated else None
    weight = draw(3, V, seed=3)
    results: list[list[Tensor]] = []
    for norm, of in ((triton_norm, lambda t: t), (gated_norm, lambda t: t.double())):
        leaves = [None if t is None else of(t).detach().requires_grad_() for t in (o, z, weight)]
        y = norm(*leaves, 1e-5)
        y.backward(of(dy))
        results.append([y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)


def test_three_runs_are_bitwise_equal() -> None:
    from models.kda.kernels.mixer import triton_conv, triton_norm

    def once() -> list[Tensor]:
        x, weight, z = (t.requires_grad_() for t in (draw(2, 130, 64), draw(64, 4, seed=1), draw(2, 130, 64, seed=2)))
        norm_weight = draw(4, 16, seed=3).requires_grad_()
        y = triton_norm(triton_conv(x, weight).unflatten(-1, (4, 16)), z.unflatten(-1, (4, 16)), norm_weight, 1e-5)
        y.square().sum().backward()
        return [y.detach(), *(t.grad for t in (x, weight, z, norm_weight))]  # type: ignore[misc]

    first = once()
    assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(once(), first, strict=True))


def test_a_second_gradient_is_refused_not_wrong() -> None:
    from models.kda.kernels.mixer import triton_conv, triton_norm

    x, z = draw(1, 5, 32).requires_grad_(), draw(1, 5, 2, 16, seed=1).requires_grad_()
    for y in (triton_conv(x, draw(32, 4)), triton_norm(x.unflatten(-1, (2, 16)), z, draw(2, 16), 1e-5)):
        (once,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            once.sum().backward()


@torch.no_grad()
def test_a_hybrid_on_the_kernels_equals_the_reference() -> None:
    teacher = tiny_teacher("qwen2", hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    model = tiny_hybrid(teacher, kda_conv_size=4).to(DEVICE)
    ids, mask = (t.to(DEVICE) for t in padded(tokens(5, 40), "left"))
    row = tokens(33).to(DEVICE)

    def everything() -> list[Any]:
        cache = model(row[:, :30], use_cache=True)[CACHE]
        return [
            model(ids, attention_mask=mask).logits,
            model(row, cu_seqlens=torch.tensor([0, 7, 33])).logits,
            model(row[:, 30:32], **{CACHE: cache}).logits,
            model(row[:, 32:], **{CACHE: cache}).logits,
        ]

    model.set_kda_impl("reference")
    expected = everything()
    model.set_kda_impl("triton")
    for found, wanted in zip(everything(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE)
