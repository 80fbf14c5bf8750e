"""KDA's values, on the CPU: each implementation has the properties of the recurrence, in float64 the oracle.

Triton's kernels run in its interpreter here (on the GPU where there is one); `test_kda_cuda.py` has their full sizes.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.kda import kda
from models.kda.reference import chunk_kda, log_decay, recurrent_kda
from tests.models.kda.oracles import (
    GATES,
    GROUPED,
    OVERFLOW_TO_A_LIMIT,
    PLAIN,
    REFERENCES,
    TRITON,
    Subject,
    assert_bitwise,
    assert_near,
    draw,
    error,
    exact,
    run,
    subject,
    tokens,
)
from tests.models.kda.properties import (
    EXTREMES,
    check_equals_the_oracle,
    check_extreme,
    check_inputs_are_left_alone,
    check_later_write_wins,
    check_nothing_written,
    check_packed_equals_a_loop,
    check_padding_changes_nothing,
    check_runs_are_bitwise_equal,
    check_split_with_carried_state,
    check_strides_do_not_matter,
    check_the_future_changes_nothing,
)

pytestmark = OVERFLOW_TO_A_LIMIT


LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130)


def test_the_oracle_is_the_formula() -> None:
    """The recurrence written out in plain numbers, one head and one channel after the other."""
    H, HK, K, V, T = 4, 2, 3, 2, 5
    x = draw(REFERENCES[0], T, H=H, HK=HK, K=K, V=V)
    for gate in GATES:
        found = run("recurrent", x, gate=gate)
        plain = {name: t.tolist() for name, t in x.items()}
        for h in range(H):
            n = h // (H // HK)
            rate = math.exp(plain["A_log"][h])
            S = [row[:] for row in plain["initial_state"][0][h]]
            for t in range(T):
                q, k, v = plain["q"][0][t][h], plain["k"][0][t][n], plain["v"][0][t][n]
                q = [a / math.sqrt(sum(c * c for c in q) + 1e-6) for a in q]
                k = [a / math.sqrt(sum(c * c for c in k) + 1e-6) for a in k]
                beta = 1 / (1 + math.exp(-plain["beta"][0][t][h]))
                for d in range(K):
                    a = plain["g"][0][t][h][d] + plain["dt_bias"][h][d]
                    bounded, softplus = -5 / (1 + math.exp(-rate * a)), -rate * math.log1p(math.exp(a))
                    decay = math.exp(bounded if gate == "bounded" else softplus)
                    S[d] = [decay * s for s in S[d]]
                u = [beta * (v[j] - sum(S[d][j] * k[d] for d in range(K))) for j in range(V)]
                S = [[S[d][j] + k[d] * u[j] for j in range(V)] for d in range(K)]
                o = [sum(S[d][j] * q[d] for d in range(K)) / math.sqrt(K) for j in range(V)]
                assert found["o"][0, t, h].tolist() == pytest.approx(o, rel=1e-12, abs=1e-14)
            assert error(found["state"][0, h], torch.tensor(S, dtype=torch.float64)) < 1e-14


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", LENGTHS)
def test_values_equal_the_recurrence(subject: Subject, T: int, gate: str) -> None:
    for shape in (GROUPED, PLAIN):
        check_equals_the_oracle(subject, draw(subject, T, **shape), gate)


@pytest.mark.parametrize("T", [1, 65])
def test_without_an_initial_state_it_begins_with_zeros(subject: Subject, T: int) -> None:
    x = draw(subject, T, **GROUPED)
    x.pop("initial_state")
    check_equals_the_oracle(subject, x, "bounded")


@pytest.mark.parametrize("impl", ["recurrent", "reference", TRITON.impl])
def test_scale_and_lower_bound_are_heeded(impl: str, request: pytest.FixtureRequest) -> None:
    one = TRITON if impl == TRITON.impl else subject(impl, torch.float32)
    if impl == TRITON.impl:
        request.getfixturevalue("triton_kernels")
    x = draw(one, 20, **GROUPED)
    usual = exact(one, x)
    for options in ({"scale": 0.7}, {"lower_bound": -1.5}):
        found, expected = run(impl, x, **options), exact(one, x, **options)
        assert_near(one, found, expected, str(options))
        assert error(expected["o"], usual["o"]) > 0.01
    fourfold = kda(**x, scale=4 * 16**-0.5, impl=impl)[0]  # type: ignore[arg-type]
    assert error(fourfold, 4 * usual["o"]) < one.value


def test_the_final_state_is_returned_only_when_asked_for(subject: Subject) -> None:
    x = draw(subject, 3, **GROUPED)
    assert kda(**x, impl=subject.impl)[1] is None  # type: ignore[arg-type]


def test_dtypes_of_the_results(subject: Subject) -> None:
    x = draw(subject, 3, **GROUPED)
    found = run(subject.impl, x)
    assert found["o"].dtype == subject.dtype
    assert found["state"].dtype == (torch.float64 if subject.dtype == torch.float64 else torch.float32)


def test_the_reference_in_bfloat16_rounds_only_its_inputs_and_output() -> None:
    one = subject("reference", torch.bfloat16)
    x = draw(one, 130, **GROUPED)
    found, expected = run("reference", x), exact(one, x)
    assert (found["o"].dtype, found["state"].dtype) == (torch.bfloat16, torch.float32)
    assert_near(one, found, expected)
    assert error(found["state"], expected["state"]) < 2e-5


@pytest.mark.parametrize("impl", ["reference", "recurrent"])
def test_autocast_does_not_reach_the_references(impl: str) -> None:
    x = draw(subject(impl, torch.float32), 70, **GROUPED)
    x = {name: t.requires_grad_() for name, t in x.items()}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = kda(**x, output_final_state=True, impl=impl)  # type: ignore[arg-type]
        grads = torch.autograd.grad(found, list(x.values()), [torch.ones_like(t) for t in found])
        results.append([*found, *grads])
    for plain, autocast in zip(*results, strict=True):
        assert torch.equal(plain, autocast)


@pytest.mark.parametrize("gate", GATES)
def test_split_with_carried_state_equals_the_whole(subject: Subject, gate: str) -> None:
    x = draw(subject, 80, **GROUPED)
    for cuts in ((1,), (64,), (15, 32, 79)):
        check_split_with_carried_state(subject, x, gate, cuts)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_split_anywhere_equals_the_whole(data: Any) -> None:
    T = data.draw(st.integers(2, 150))
    cuts = data.draw(st.sets(st.integers(1, T - 1), min_size=1, max_size=4))
    one = data.draw(st.sampled_from(REFERENCES))
    shape = data.draw(st.sampled_from([PLAIN, GROUPED]))
    x = draw(one, T, seed=data.draw(st.integers(0, 9)), **shape)
    check_split_with_carried_state(one, x, data.draw(st.sampled_from(GATES)), sorted(cuts))


@pytest.mark.parametrize("lengths", [(1, 17, 0, 64, 1, 5), (0, 70, 0), (88,)], ids=str)
def test_packed_equals_a_loop(subject: Subject, lengths: tuple[int, ...]) -> None:
    x = draw(subject, sum(lengths), N=len(lengths), **GROUPED)
    for gate in GATES:
        check_packed_equals_a_loop(subject, x, gate, lengths)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_packed_in_any_lengths_equals_a_loop(data: Any) -> None:
    lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any))
    one = data.draw(st.sampled_from(REFERENCES))
    x = draw(one, sum(lengths), N=len(lengths), **GROUPED)
    check_packed_equals_a_loop(one, x, data.draw(st.sampled_from(GATES)), lengths)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_cu_seqlens_of_either_width(subject: Subject, dtype: torch.dtype) -> None:
    x = draw(subject, 9, N=2, **GROUPED)
    starts = torch.tensor([0, 4, 9], dtype=dtype)
    o = kda(**x, cu_seqlens=starts, impl=subject.impl)[0]  # type: ignore[arg-type]
    assert torch.equal(o, run(subject.impl, x, cu_seqlens=[0, 4, 9])["o"])


def test_no_tokens_leave_the_state_as_it_was(subject: Subject) -> None:
    x = draw(subject, 0, **GROUPED)
    found = run(subject.impl, x)
    assert found["o"].shape == (1, 0, 4, 32)
    assert torch.equal(found["state"], x["initial_state"])


@pytest.mark.parametrize("gate", GATES)
def test_padding_on_either_side_equals_alone(subject: Subject, gate: str) -> None:
    lengths = (1, 30, 66)
    check_padding_changes_nothing(subject, draw(subject, 70, **{**PLAIN, "B": 3}), gate, lengths)


@pytest.mark.parametrize("gate", GATES)
def test_later_tokens_leave_earlier_outputs_bitwise_equal(subject: Subject, gate: str) -> None:
    check_the_future_changes_nothing(subject, draw(subject, 100, **GROUPED), gate, (1, 16, 40, 64, 71))


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(subject: Subject, name: str) -> None:
    check_extreme(subject, draw(subject, 70, **GROUPED), name)


def test_with_equal_keys_the_last_write_wins(subject: Subject) -> None:
    check_later_write_wins(subject, draw(subject, 70, **GROUPED))


@pytest.mark.parametrize("gate", GATES)
def test_with_beta_0_the_initial_state_only_fades(subject: Subject, gate: str) -> None:
    x = draw(subject, 70, **GROUPED)
    decay = log_decay(x["g"].double(), x["A_log"], x["dt_bias"], gate, -5.0)
    check_nothing_written(subject, x, gate, decay)


def test_strides_do_not_matter(subject: Subject) -> None:
    check_strides_do_not_matter(subject, draw(subject, 20, **{**GROUPED, "B": 2}), "bounded")


@pytest.mark.parametrize("gate", GATES)
def test_no_input_is_mutated(subject: Subject, gate: str) -> None:
    check_inputs_are_left_alone(subject, draw(subject, 20, **GROUPED), gate)


def test_three_runs_are_bitwise_equal(subject: Subject) -> None:
    check_runs_are_bitwise_equal(subject, draw(subject, 70, **GROUPED), "bounded")


@pytest.mark.parametrize("segments", [1, 2, 3, 5])
def test_segments_in_time_equal_the_oracle(triton_kernels: None, segments: int) -> None:
    x = draw(TRITON, 300, H=2, HK=1, K=16, V=16)
    assert_near(TRITON, run("triton", x, segments=segments), exact(TRITON, x), f"{segments} segments")
    lengths = (1, 0, 130, 64, 105)
    x = draw(TRITON, 300, N=len(lengths), H=2, HK=1, K=16, V=16)
    check_packed_equals_a_loop(TRITON, x, "softplus", lengths, segments=segments)


def test_the_default_goes_by_the_device() -> None:
    x = draw(subject("reference", torch.float32), 20, **GROUPED)
    assert_bitwise({"o": kda(**x)[0]}, {"o": kda(**x, impl="reference")[0]})  # type: ignore[arg-type]


def test_both_references_take_what_the_check_lets_through() -> None:
    """The two bodies alone, as `kda` calls them: the second is only used where the first is the same."""
    x = draw(REFERENCES[0], 33, **GROUPED)
    options: dict[str, Any] = {"gate": "bounded", "lower_bound": -5.0, "scale": 0.25, "cu_seqlens": None}
    for a, b in zip(chunk_kda(**x, **options), recurrent_kda(**x, **options), strict=True):
        assert error(a, b) < 1e-12


def test_a_prefix_of_the_tokens_gives_a_prefix_of_the_outputs(subject: Subject) -> None:
    x = draw(subject, 66, **PLAIN)
    expected = exact(subject, x)["o"]
    for end in (1, 16, 33, 64):
        found = run(subject.impl, tokens(x, 0, end))["o"]
        assert_near(subject, {"o": found}, {"o": expected[:, :end]}, f"{end} tokens")
