"""KDA's kernels at full size on a CUDA GPU, in bfloat16: the properties of `test_kda.py`, with bfloat16's tolerances.

Skipped where there is no GPU; by hand: `python3 -m pytest tests/models/kda/test_kda_cuda.py -s`, from the checkout's
root, nothing installed. It ends with a table of the largest RMS error ratios against float64. The oracle here is the
chunkwise reference in float64, which the first test holds against the recurrence. Where fla is installed its error on
the same input is the bar too; its autotuning takes minutes on a fresh machine (-k "not fla" leaves it out).
"""

import gc
import importlib.util
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from models.kda import kda, kda_step
from models.kda.reference import log_decay
from tests.conftest import missing
from tests.models.kda.oracles import (
    GATES,
    NAMES,
    Subject,
    assert_near,
    draw,
    error,
    exact,
    largest,
    run,
    subject,
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
    check_steps_equal_the_whole,
    check_strides_do_not_matter,
    check_the_future_changes_nothing,
)
from tests.models.kda.test_step import one_token

BF16 = replace(subject("triton", torch.bfloat16, "cuda"), oracle="reference")
FLOAT = replace(subject("triton", torch.float32, "cuda"), oracle="reference")
FLA = replace(subject("fla", torch.bfloat16, "cuda"), oracle="reference")
WIDE = {"H": 16, "HK": 8, "K": 128, "V": 128}
NARROW = {"H": 16, "HK": 8, "K": 64, "V": 64}
SHAPES = pytest.mark.parametrize("shape", [WIDE, NARROW], ids=["K128", "K64"])
BOTH_GATES = pytest.mark.parametrize("gate", GATES)
LONG = 4099
"""No multiple of any block."""
# Kernels compile anew for each number of heads, K, V, gate and dtype, which takes longer than they run: tests share
# these shapes, and the crossings hold every pair of a dtype, a shape and a gate, not all three at once.
FLOAT_CROSSED = [pytest.param(WIDE, "softplus", id="K128-softplus"), pytest.param(NARROW, "bounded", id="K64-bounded")]
CROSSED = [
    pytest.param(BF16, WIDE, "bounded", id="bfloat16-K128-bounded"),
    pytest.param(BF16, NARROW, "softplus", id="bfloat16-K64-softplus"),
    pytest.param(FLOAT, WIDE, "softplus", id="float32-K128-softplus"),
    pytest.param(FLOAT, NARROW, "bounded", id="float32-K64-bounded"),
]

ROUNDED: dict[str, dict[str, float]] = {
    # Measured on an H100: dg 1.3e-2. The gate is flat there, so that its slope is nothing but rounding.
    "A_log = 50, saturated": {"gradient": 2e-2},
    # o 8.8e-3, state 1.0e-2, dbeta 6.7e-2, dk 1.4e-2, dv 5.6e-2. The triangular systems are ill-conditioned:
    # (I + L)^-1 amplifies the rounding of L's factors to bfloat16.
    "nearly equal keys": {"value": 2e-2, "gradient": 1e-1},
}
"""Bounds of their own, in bfloat16, for the extremes whose errors come from bfloat16's rounding alone."""


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        missing("cuda", "there is no CUDA GPU")


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """At the end, what was measured (shown with -s)."""
    yield
    if not torch.cuda.is_available():
        return
    quantities = ("o", "state", *(f"d{name}" for name in NAMES))
    print("\n\nlargest RMS error ratio against float64, " + torch.cuda.get_device_name())
    print(" " * 18 + "".join(f"{name.replace('initial_', ''):>10}" for name in quantities))
    for name in sorted({name for name, _ in largest}):
        cells = (largest.get((name, quantity)) for quantity in quantities)
        print(f"{name:18}" + "".join(f"{cell:10.1e}" if cell is not None else f"{'-':>10}" for cell in cells))


def test_the_oracle_in_chunks_equals_the_recurrence() -> None:
    for gate in GATES:
        x = draw(replace(FLOAT, dtype=torch.float64), 300, **WIDE)
        found, expected = (run(impl, x, gate=gate, gradients=NAMES) for impl in ("reference", "recurrent"))
        assert all(error(found[name], expected[name]) < 1e-11 for name in found)


@BOTH_GATES
@SHAPES
@pytest.mark.parametrize("T", [1, 15, 17, 64, 65, 1000, LONG])
def test_values_equal_the_oracles(T: int, shape: dict[str, int], gate: str) -> None:
    check_equals_the_oracle(BF16, draw(BF16, T, **shape), gate)


@BOTH_GATES
@SHAPES
@pytest.mark.parametrize("T", [1, 17, 130, LONG])
def test_gradients_equal_the_oracles(T: int, shape: dict[str, int], gate: str) -> None:
    check_equals_the_oracle(BF16, draw(BF16, T, B=1 if T == LONG else 2, **shape), gate, gradients=NAMES)


@pytest.mark.parametrize(("shape", "gate"), FLOAT_CROSSED)
@pytest.mark.parametrize("T", [65, 1000])
def test_float32_inputs_keep_float32s_tolerance(T: int, shape: dict[str, int], gate: str) -> None:
    check_equals_the_oracle(FLOAT, draw(FLOAT, T, **shape), gate, gradients=NAMES)


def test_one_head_for_each_and_values_of_another_width() -> None:
    shape = {"B": 2, "H": 16, "HK": 16, "K": 64, "V": 128}
    check_equals_the_oracle(BF16, draw(BF16, 300, **shape), "bounded", gradients=NAMES)


def test_without_an_initial_state_it_begins_with_zeros() -> None:
    x = draw(BF16, LONG, **WIDE)
    x.pop("initial_state")
    check_equals_the_oracle(BF16, x, "bounded")


@BOTH_GATES
def test_split_with_carried_state_equals_the_whole(gate: str) -> None:
    check_split_with_carried_state(BF16, draw(BF16, LONG, **WIDE), gate, (1, 1000, 3008))


@BOTH_GATES
def test_packed_equals_a_loop(gate: str) -> None:
    lengths = (1, 0, 1000, 64, 2500, 17, 517, 0)
    x = draw(BF16, sum(lengths), N=len(lengths), **WIDE)
    check_packed_equals_a_loop(BF16, x, gate, lengths, gradients=NAMES)


def test_cu_seqlens_on_either_device() -> None:
    x = draw(BF16, 700, N=2, **WIDE)
    starts = torch.tensor([0, 300, 700])
    there, here = (kda(**x, cu_seqlens=s)[0] for s in (starts.cuda(), starts))  # type: ignore[arg-type]
    assert torch.equal(there, here)


@BOTH_GATES
def test_padding_on_either_side_equals_alone(gate: str) -> None:
    x = draw(BF16, 1100, B=3, **WIDE)
    check_padding_changes_nothing(BF16, x, gate, (5, 700, 1087), gradients=NAMES)


@BOTH_GATES
@SHAPES
def test_later_tokens_leave_earlier_outputs_bitwise_equal(gate: str, shape: dict[str, int]) -> None:
    check_the_future_changes_nothing(BF16, draw(BF16, LONG, **shape), gate, (1, 16, 40, 100, 2048, 4000))


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name: str) -> None:
    one = replace(BF16, name="bfloat16, rounded", **ROUNDED[name]) if name in ROUNDED else BF16
    check_extreme(one, draw(one, 300, **WIDE), name, gradients=NAMES)


@pytest.mark.parametrize("A_log", [30.0, 50.0, 120.0])
def test_a_saturated_bounded_gate_has_finite_gradients(A_log: float) -> None:
    x = draw(BF16, 130, **WIDE)
    x = {**x, "A_log": torch.full_like(x["A_log"], A_log), "dt_bias": torch.zeros_like(x["dt_bias"])}
    x["g"][:, 3] = 0
    for name, value in run("triton", x, gradients=NAMES).items():
        assert value.isfinite().all(), name


def test_with_equal_keys_the_last_write_wins() -> None:
    check_later_write_wins(BF16, draw(BF16, 300, **WIDE))


@BOTH_GATES
def test_with_beta_0_the_initial_state_only_fades(gate: str) -> None:
    x = draw(BF16, 300, **WIDE)
    check_nothing_written(BF16, x, gate, log_decay(x["g"].double(), x["A_log"], x["dt_bias"], gate, -5.0))


def test_strides_do_not_matter() -> None:
    check_strides_do_not_matter(BF16, draw(BF16, 130, B=2, **WIDE), "bounded", gradients=NAMES)


def test_no_input_is_mutated() -> None:
    check_inputs_are_left_alone(BF16, draw(BF16, 300, **WIDE), "bounded", gradients=NAMES)


@BOTH_GATES
@SHAPES
def test_three_runs_are_bitwise_equal(gate: str, shape: dict[str, int]) -> None:
    check_runs_are_bitwise_equal(BF16, draw(BF16, LONG, **shape), gate, gradients=NAMES)


@pytest.mark.parametrize("segments", [1, 2, 5, 16])
def test_segments_in_time_equal_the_oracle(segments: int) -> None:
    x = draw(BF16, LONG, **WIDE)
    found = run("triton", x, segments=segments, gradients=NAMES)
    assert_near(BF16, found, exact(BF16, x, gradients=NAMES), f"{segments} segments")
    lengths = (1, 0, 2500, 64, 1500)
    x = draw(BF16, sum(lengths), N=len(lengths), **WIDE)
    check_packed_equals_a_loop(BF16, x, "softplus", lengths, segments=segments, gradients=NAMES)


@pytest.mark.parametrize(("one", "shape", "gate"), CROSSED)
def test_steps_equal_the_whole(one: Subject, shape: dict[str, int], gate: str) -> None:
    check_steps_equal_the_whole(one, draw(one, 70, B=64, **shape), gate, 7)


def test_offsets_beyond_32_bits() -> None:
    """Nine equal rows, the last of which begins 2^31 elements on: it reads and writes as the first does."""
    T = 131_072
    if torch.cuda.mem_get_info()[0] < 70 * 2**30:
        missing("cuda", "less than 70 GiB of GPU memory are free")
    one = draw(BF16, T, **WIDE)
    x = {name: t.repeat(9, *[1] * (t.ndim - 1)) if t.ndim > 2 else t for name, t in one.items()}
    assert x["q"][8].data_ptr() - x["q"].data_ptr() >= 2 * 2**31
    with torch.no_grad():
        o, state = kda(**x, output_final_state=True)  # type: ignore[arg-type]
    assert state is not None
    assert torch.equal(o[8], o[0]) and torch.equal(state[8], state[0])
    found = {"o": o[:1, :1000]}
    assert_near(
        BF16, found, {"o": exact(BF16, {n: t[:, :1000] if t.shape[1] == T else t for n, t in one.items()})["o"]}
    )
    del x, o, state, found
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def fla() -> Subject:
    if importlib.util.find_spec("fla") is None:
        missing("fla", "flash-linear-attention is not installed: pip install 'evalkit[fla]'")
    return FLA


@pytest.mark.filterwarnings("ignore")
@BOTH_GATES
def test_no_worse_than_fla_on_the_same_input(fla: Subject, gate: str) -> None:
    x = draw(BF16, LONG, **WIDE)
    ours, theirs = (run(impl, x, gate=gate) for impl in ("triton", "fla"))
    expected = exact(BF16, x, gate=gate)
    for name in ("o", "state"):
        a, b = error(ours[name], expected[name]), error(theirs[name], expected[name])
        largest[f"fla-{gate}", name] = b
        assert b < 1e-2, f"fla is wrapped wrongly: {name} {b:.1e}"
        assert a <= 1.1 * b, f"{name}: ours {a:.2e}, fla's {b:.2e}"


@pytest.mark.filterwarnings("ignore")
def test_fla_takes_packed_sequences_and_steps(fla: Subject) -> None:
    x = draw(BF16, LONG, N=3, **WIDE)
    starts = [0, 1000, 1001, LONG]
    found, expected = run("fla", x, cu_seqlens=starts), exact(BF16, x, cu_seqlens=starts)
    assert max(error(found[name], expected[name]) for name in found) < 1e-2
    x = draw(BF16, 1, B=64, **WIDE)
    for gate in GATES:
        one = one_token(x)
        o = kda_step(**one, gate=gate, impl="fla")  # type: ignore[arg-type]
        assert_near(FLA, {"o": o[:, None], "state": one["state"]}, exact(FLA, x, gate=gate), "a step by fla")
