"""KDA's oracle: the recurrence in float64, and how far an implementation is from it.

Inputs are a dictionary of the arguments of `models.kda.kda` by name; results are a dictionary of "o", "state" and,
where gradients were asked for, "dq", "dk", ... of a fixed random linear function of both outputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kda import PAD_LOGIT, kda

Tensors = dict[str, Tensor]
TOKENWISE = ("q", "k", "v", "g", "beta")
PARAMETERS = ("A_log", "dt_bias")
NAMES = (*TOKENWISE, *PARAMETERS, "initial_state")
GATES = ("bounded", "softplus")

GROUPED = {"B": 1, "H": 4, "HK": 2, "K": 16, "V": 32}
PLAIN = {"B": 2, "H": 2, "HK": 2, "K": 32, "V": 16}


@dataclass(frozen=True)
class Subject:
    """An implementation under test, and the RMS error ratios it must keep to."""

    name: str
    impl: str
    dtype: torch.dtype
    device: str
    value: float
    """Of outputs and states."""
    gradient: float
    gate_parameter: float
    """Of the gradients of A_log and dt_bias: sums over all tokens."""
    oracle: str = "recurrent"
    """Run in float64. The recurrence itself where it is quick enough."""

    def tolerance(self, quantity: str) -> float:
        if quantity in ("o", "state"):
            return self.value
        return self.gate_parameter if quantity[1:] in PARAMETERS else self.gradient

    def __str__(self) -> str:
        return self.name


def subject(impl: str, dtype: torch.dtype, device: str = "cpu") -> Subject:
    """With the tolerances of its dtype."""
    values = {torch.float64: (1e-12,) * 3, torch.float32: (2e-5,) * 3, torch.bfloat16: (5e-3, 1e-2, 2e-2)}[dtype]
    return Subject(f"{impl}-{str(dtype).removeprefix('torch.')}", impl, dtype, device, *values)


# Where there is no GPU, Triton's kernels run in its interpreter (tests/conftest.py), and there in float32, since it
# gets bfloat16 wrong without a word.
TRITON = subject("triton", torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
REFERENCES = (
    subject("recurrent", torch.float64),
    subject("reference", torch.float64),
    subject("reference", torch.float32),
)
SUBJECTS = (*REFERENCES, TRITON)

OVERFLOW_TO_A_LIMIT = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
"""The interpreter computes with numpy, which warns where a GPU gives the right limit: sigmoid(-1e20) = 1 / (1 + inf).
An infinity that matters shows in the results, or as numpy's "invalid value", which stays an error."""

largest: dict[tuple[str, str], float] = {}
"""(subject, quantity) -> the largest RMS error ratio that `assert_near` has seen."""


def draw(
    subject: Subject,
    T: int,
    *,
    B: int = 1,
    H: int = 2,
    HK: int = 2,
    K: int = 16,
    V: int = 16,
    N: int | None = None,
    seed: int = 0,
) -> Tensors:
    """Random inputs whose channels remember from one token to thousands; N initial states, B by default."""
    random = torch.Generator(subject.device).manual_seed(seed)
    wide = torch.float64 if subject.dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = subject.dtype) -> Tensor:
        return torch.randn(*shape, generator=random, device=subject.device, dtype=wide).to(dtype)

    return {
        "q": normal(B, T, H, K),
        "k": normal(B, T, HK, K),
        "v": normal(B, T, HK, V),
        "g": normal(B, T, H, K),
        "beta": normal(B, T, H),
        "A_log": torch.linspace(-0.5, 0.5, H, device=subject.device, dtype=wide),
        "dt_bias": torch.linspace(-7, 1, K, device=subject.device, dtype=wide).repeat(H, 1),
        "initial_state": normal(N or B, H, K, V, dtype=wide),
    }


def cotangents(x: Tensors, seed: int = 1) -> tuple[Tensor, Tensor]:
    """What the outputs' and the final states' gradients are taken with: fixed, random, in v's dtype and in float32."""
    random = torch.Generator(x["q"].device).manual_seed(seed)
    state = x["initial_state"]
    shape = (*x["q"].shape[:3], x["v"].shape[-1])
    do = torch.randn(*shape, generator=random, device=state.device, dtype=state.dtype).to(x["v"])
    return do, torch.randn(*state.shape, generator=random, device=state.device, dtype=state.dtype)


def run(
    impl: str,
    x: Mapping[str, Tensor],
    *,
    gate: str = "bounded",
    cu_seqlens: Sequence[int] | None = None,
    segments: int | None = None,
    gradients: Iterable[str] = (),
    by: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensors:
    """One call of ``impl``. ``segments`` forces that many segments in time (Triton only).

    ``gradients``: of which inputs; ``by``: the cotangents of (o, state), if not the usual ones.
    """
    leaves = {name: t.detach().requires_grad_(name in set(gradients)) for name, t in x.items()}
    if segments is None:
        starts = None if cu_seqlens is None else torch.tensor(list(cu_seqlens), dtype=torch.int32)
        o, state = kda(
            **leaves,
            gate=gate,
            cu_seqlens=starts,
            output_final_state=True,
            impl=impl,
            **options,  # type: ignore[arg-type]
        )
    else:
        from models.kda.kernels.autograd import triton_kda

        starts = None if cu_seqlens is None else list(cu_seqlens)
        settings = {"gate": gate, "lower_bound": -5.0, "scale": x["q"].shape[-1] ** -0.5, **options}
        o, state = triton_kda(**{"initial_state": None, **leaves}, cu_seqlens=starts, segments=segments, **settings)
    found = {"o": o.detach(), "state": state.detach()}
    if wanted := [name for name in leaves if leaves[name].requires_grad]:
        do, dstate = by or cotangents(dict(x))
        along = [do.to(o), dstate.to(state)]
        # Of no tokens at all nothing but the state has a gradient: zeros.
        grads = torch.autograd.grad([o, state], [leaves[n] for n in wanted], along, materialize_grads=True)
        found |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return found


def exact(
    subject: Subject, x: Mapping[str, Tensor], *, by: tuple[Tensor, Tensor] | None = None, **options: Any
) -> Tensors:
    """The same call in float64, of the subject's oracle."""
    wide = {name: t.double() for name, t in x.items()}
    by = by or (cotangents(dict(x)) if "initial_state" in x else None)
    return run(subject.oracle, wide, by=by and (by[0].double(), by[1].double()), **options)


def error(found: Tensor, expected: Tensor) -> float:
    """rms(found - expected) / rms(expected); 0 where both are all zero."""
    difference = (found.double() - expected.double()).square().mean().sqrt().item()
    return difference and difference / expected.double().square().mean().sqrt().item()


def assert_near(subject: Subject, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str = "") -> None:
    """Each quantity within the subject's tolerance; all that are not are told at once."""
    assert found.keys() == expected.keys()
    wrong = []
    for name, value in found.items():
        assert value.shape == expected[name].shape, f"{name}: {tuple(value.shape)}, not {tuple(expected[name].shape)}"
        if not value.numel():
            continue
        assert expected[name].any() or not value.any(), f"{name} should be exactly 0 {what}"
        ratio = error(value, expected[name])
        largest[str(subject), name] = max(ratio, largest.get((str(subject), name), 0.0))
        if not ratio <= subject.tolerance(name):
            wrong.append(f"{name} {ratio:.1e} (at most {subject.tolerance(name):.0e})")
    if wrong:
        pytest.fail(f"{subject} {what}: RMS error ratios against float64: {', '.join(wrong)}")


def assert_bitwise(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str = "") -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), f"{name} differs {what}"


def tokens(x: Mapping[str, Tensor], start: int, end: int) -> Tensors:
    """Only these tokens of each sequence."""
    return {name: t[:, start:end] if name in TOKENWISE else t for name, t in x.items()}


def only_row(x: Mapping[str, Tensor], row: int, start: int, end: int) -> Tensors:
    """One sequence of a batch alone, from ``start`` to ``end``, with its initial state."""
    part = {name: t[row : row + 1, start:end] if name in TOKENWISE else t for name, t in x.items()}
    return part | {"initial_state": x["initial_state"][row : row + 1]} if "initial_state" in x else part


def pad(x: Mapping[str, Tensor], is_pad: Tensor) -> Tensors:
    """Zero q, k and v, and PAD_LOGIT for g and beta, at the padding tokens (``is_pad`` [B, T])."""
    fill = {"q": 0.0, "k": 0.0, "v": 0.0, "g": PAD_LOGIT, "beta": PAD_LOGIT}
    return {
        name: t.masked_fill(is_pad.view(*is_pad.shape, *[1] * (t.ndim - 2)), fill[name]) if name in fill else t
        for name, t in x.items()
    }
