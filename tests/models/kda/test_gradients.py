"""KDA's gradients against autograd through the float64 recurrence: of both outputs, with respect to every input."""

import pytest
import torch
from torch import Tensor

from models.kda import kda
from models.kda.reference import chunk_kda, recurrent_kda
from tests.models.kda.oracles import (
    GATES,
    GROUPED,
    NAMES,
    OVERFLOW_TO_A_LIMIT,
    PLAIN,
    REFERENCES,
    TRITON,
    Subject,
    assert_bitwise,
    assert_near,
    cotangents,
    draw,
    exact,
    run,
)
from tests.models.kda.properties import (
    EXTREMES,
    check_equals_the_oracle,
    check_extreme,
    check_inputs_are_left_alone,
    check_packed_equals_a_loop,
    check_padding_changes_nothing,
    check_runs_are_bitwise_equal,
    check_strides_do_not_matter,
)

pytestmark = OVERFLOW_TO_A_LIMIT


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("body", [recurrent_kda, chunk_kda])
@pytest.mark.parametrize("starts", [None, [0, 2, 2, 5]])
def test_autograd_of_both_references_equals_finite_differences(body, gate: str, starts: list[int] | None) -> None:  # type: ignore[no-untyped-def]
    x = draw(REFERENCES[0], 5, H=2, HK=1, K=3, V=2, N=3 if starts else 1)

    def both(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(x, values, strict=True))
        return body(**named, gate=gate, lower_bound=-5.0, scale=0.5, cu_seqlens=starts)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(both, [t.requires_grad_() for t in x.values()])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [1, 17, 64, 130])
def test_gradients_equal_the_recurrences(subject: Subject, T: int, gate: str) -> None:
    shape = PLAIN if T == 17 else GROUPED
    check_equals_the_oracle(subject, draw(subject, T, **shape), gate, gradients=NAMES)


@pytest.mark.parametrize("gate", GATES)
def test_gradients_of_packed_sequences_equal_a_loops(subject: Subject, gate: str) -> None:
    lengths = (1, 17, 0, 64, 1, 5)
    check_packed_equals_a_loop(subject, draw(subject, 88, N=6, **GROUPED), gate, lengths, gradients=NAMES)


@pytest.mark.parametrize("gate", GATES)
def test_padding_gets_no_gradient_and_changes_none(subject: Subject, gate: str) -> None:
    x = draw(subject, 40, **PLAIN)
    check_padding_changes_nothing(subject, x, gate, (3, 35), gradients=NAMES)


@pytest.mark.parametrize("used", ["outputs", "final state"])
def test_gradients_of_one_result_alone(subject: Subject, used: str) -> None:
    """Of a plain sum, whose cotangent is expanded from one number: no kernel may take it for contiguous."""
    x = draw(subject, 70, **GROUPED)

    def of(impl: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: t.detach().requires_grad_() for name, t in x.items()}
        o, state = kda(**leaves, output_final_state=True, impl=impl)  # type: ignore[arg-type]
        total = o.sum() if used == "outputs" else state.sum()  # type: ignore[union-attr]
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {f"d{name}": g if g is not None else torch.zeros_like(x[name]) for name, g in zip(x, grads, strict=True)}

    expected = of("recurrent", {name: t.double() for name, t in x.items()})
    assert_near(subject, of(subject.impl, x), expected, used)


@pytest.mark.parametrize("wanted", [("v",), ("A_log", "dt_bias"), ("q", "initial_state")], ids=str)
def test_gradients_of_some_inputs_alone(subject: Subject, wanted: tuple[str, ...]) -> None:
    check_equals_the_oracle(subject, draw(subject, 20, **GROUPED), "bounded", gradients=wanted)


def test_gradients_have_their_inputs_dtype_and_device(subject: Subject) -> None:
    x = draw(subject, 3, **GROUPED)
    for name, grad in run(subject.impl, x, gradients=NAMES).items():
        if name.startswith("d"):
            assert (grad.dtype, grad.device) == (x[name[1:]].dtype, x[name[1:]].device), name


@pytest.mark.parametrize("A_log", [30.0, 50.0, 120.0])
def test_a_saturated_bounded_gate_has_finite_gradients(subject: Subject, A_log: float) -> None:
    """Past exp(88) the rate alone is infinite in float32, and 0 * inf is no number; nor may a gate input of 0 hurt."""
    x = draw(subject, 20, **GROUPED)
    x = {**x, "A_log": torch.full_like(x["A_log"], A_log), "dt_bias": torch.zeros_like(x["dt_bias"])}
    found, expected = run(subject.impl, x, gradients=NAMES), exact(subject, x, gradients=NAMES)
    assert_near(subject, found, expected, f"A_log = {A_log}")
    x["g"][:, 3] = 0
    for name, value in run(subject.impl, x, gradients=NAMES).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("segments", [1, 2, 3, 5])
def test_gradients_in_segments_equal_the_oracles(triton_kernels: None, segments: int) -> None:
    x = draw(TRITON, 300, H=2, HK=1, K=16, V=16)
    found = run("triton", x, gate="softplus", segments=segments, gradients=NAMES)
    assert_near(TRITON, found, exact(TRITON, x, gate="softplus", gradients=NAMES), f"{segments} segments")
    lengths = (1, 0, 130, 64, 105)
    x = draw(TRITON, 300, N=len(lengths), H=2, HK=1, K=16, V=16)
    check_packed_equals_a_loop(TRITON, x, "bounded", lengths, segments=segments, gradients=NAMES)


@pytest.mark.parametrize("name", EXTREMES)
def test_gradients_at_extremes(subject: Subject, name: str) -> None:
    check_extreme(subject, draw(subject, 70, **GROUPED), name, gradients=NAMES)


def test_gradients_of_strided_inputs(subject: Subject) -> None:
    check_strides_do_not_matter(subject, draw(subject, 20, **{**GROUPED, "B": 2}), "bounded", gradients=NAMES)


@pytest.mark.parametrize("gate", GATES)
def test_no_input_is_mutated(subject: Subject, gate: str) -> None:
    check_inputs_are_left_alone(subject, draw(subject, 20, **GROUPED), gate, gradients=NAMES)


def test_three_runs_are_bitwise_equal(subject: Subject) -> None:
    check_runs_are_bitwise_equal(subject, draw(subject, 70, **GROUPED), "bounded", gradients=NAMES)


def test_outputs_do_not_depend_on_what_gradients_are_wanted(subject: Subject) -> None:
    x = draw(subject, 20, **GROUPED)
    some, every = run(subject.impl, x, gradients=("v",)), run(subject.impl, x, gradients=NAMES)
    for found in (run(subject.impl, x), some, every):
        assert_bitwise({name: found[name] for name in ("o", "state")}, run(subject.impl, x))
    assert torch.equal(some["dv"], every["dv"])


def test_a_call_in_inference_mode_does_not_spoil_training(subject: Subject) -> None:
    """What a call keeps for the next ones (tables by shape) must serve autograd too."""
    x = draw(subject, 21, **GROUPED)
    with torch.inference_mode():
        run(subject.impl, x)
    check_equals_the_oracle(subject, x, "bounded", gradients=NAMES)


def test_two_backward_passes_through_one_graph_are_the_same(subject: Subject) -> None:
    x = {name: t.requires_grad_() for name, t in draw(subject, 20, **GROUPED).items()}
    outputs = kda(**x, output_final_state=True, impl=subject.impl)  # type: ignore[arg-type]
    first, second = (torch.autograd.grad(outputs, list(x.values()), cotangents(x), retain_graph=True) for _ in range(2))
    for name, a, b in zip(x, first, second, strict=True):
        assert torch.equal(a, b), name
