"""What can't be run is refused in one line that names the argument, what was found and what is expected."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.kda import kda, kda_step
from tests.models.kda.oracles import GROUPED, NAMES, TRITON, draw, subject
from tests.models.kda.test_step import one_token

ROOT = Path(__file__).resolve().parents[3]
FLOAT = subject("reference", torch.float32)

Change = Callable[[dict[str, Any]], dict[str, Any]]


def cut(name: str, dim: int) -> Change:
    """``name`` without its last entry in ``dim``."""
    return lambda x: {name: x[name].narrow(dim, 0, x[name].shape[dim] - 1)}


def cast(name: str, dtype: torch.dtype) -> Change:
    return lambda x: {name: x[name].to(dtype)}


def flat(name: str) -> Change:
    return lambda x: {name: x[name].flatten(-2)}


def given(**options: Any) -> Change:
    return lambda x: options


def packed(starts: list[int], dtype: torch.dtype = torch.int64) -> Change:
    return lambda x: {"cu_seqlens": torch.tensor(starts, dtype=dtype)}


WRONG: list[tuple[Change, str]] = [
    (given(impl="cuda"), r"impl is 'cuda': expected one of triton, reference, recurrent, fla"),
    (given(gate="sigmoid"), r"gate is 'sigmoid': expected bounded or softplus"),
    (given(lower_bound=0.0), r"lower_bound is 0\.0: .* below 0"),
    (given(lower_bound=5.0), r"lower_bound is 5\.0: .* below 0"),
    (given(lower_bound=float("nan")), r"lower_bound is nan: .* finite and below 0"),
    (given(lower_bound=float("-inf")), r"lower_bound is -inf: .* finite and below 0"),
    (given(scale=float("nan")), r"scale is nan: expected a finite number"),
    (given(scale=float("-inf")), r"scale is -inf: expected a finite number"),
    *((given(**{name: None}), rf"{name} is of type NoneType: expected a tensor") for name in NAMES[:-1]),
    (given(q=[[1.0]]), r"q is of type list: expected a tensor"),
    (given(A_log=0.5), r"A_log is of type float: expected a tensor"),
    (given(initial_state=0), r"initial_state is of type int: expected a tensor"),
    (lambda x: {"q": x["q"][0, 0, 0, 0]}, r"q has shape \(\): expected \[batch, tokens, heads, key dim\]"),
    (
        lambda x: {n: x[n][..., :0] for n in ("q", "k", "g", "dt_bias")},
        r"q has shape \(1, 6, 4, 0\): expected a key dim",
    ),
    (flat("q"), r"q has shape \(1, 6, 64\): expected \[batch, tokens, heads, key dim\]"),
    (flat("k"), r"k has shape \(1, 6, 32\): expected \[1, 6, k/v heads, 16\], like q"),
    (cut("k", 1), r"k has shape \(1, 5, 2, 16\): expected \[1, 6, k/v heads, 16\]"),
    (cut("k", 3), r"k has shape \(1, 6, 2, 15\): expected \[1, 6, k/v heads, 16\]"),
    (lambda x: {"k": x["k"].repeat(2, 1, 1, 1)}, r"k has shape \(2, 6, 2, 16\): expected \[1, 6, k/v heads, 16\]"),
    (lambda x: {"k": x["q"][:, :, :3]}, r"k has 3 heads: expected a number that divides q's 4 heads"),
    (lambda x: {"k": x["q"].repeat(1, 1, 2, 1)}, r"k has 8 heads: expected a number that divides q's 4 heads"),
    (lambda x: {"k": x["k"][:, :, :0]}, r"k has 0 heads: expected a number that divides q's 4 heads"),
    (flat("v"), r"v has shape \(1, 6, 64\): expected \[1, 6, 2, value dim\], like k"),
    (cut("v", 1), r"v has shape \(1, 5, 2, 32\): expected \[1, 6, 2, value dim\]"),
    (cut("v", 2), r"v has shape \(1, 6, 1, 32\): expected \[1, 6, 2, value dim\]"),
    (lambda x: {"v": x["v"].repeat(1, 1, 2, 1)}, r"v has shape \(1, 6, 4, 32\): expected \[1, 6, 2, value dim\]"),
    (cut("g", 1), r"g has shape \(1, 5, 4, 16\): expected \[1, 6, 4, 16\]"),
    (cut("g", 2), r"g has shape \(1, 6, 3, 16\): expected \[1, 6, 4, 16\]"),
    (lambda x: {"g": x["g"][..., 0]}, r"g has shape \(1, 6, 4\): expected \[1, 6, 4, 16\]"),
    (cut("beta", 2), r"beta has shape \(1, 6, 3\): expected \[1, 6, 4\]"),
    (lambda x: {"beta": x["beta"][..., None]}, r"beta has shape \(1, 6, 4, 1\): expected \[1, 6, 4\]"),
    (cut("A_log", 0), r"A_log has shape \(3,\): expected \[4\]"),
    (lambda x: {"A_log": x["A_log"].view(1, 1, 4, 1)}, r"A_log has shape \(1, 1, 4, 1\): expected \[4\]"),
    (flat("dt_bias"), r"dt_bias has shape \(64,\): expected \[4, 16\]"),
    (cut("dt_bias", 0), r"dt_bias has shape \(3, 16\): expected \[4, 16\]"),
    (cut("initial_state", 1), r"initial_state has shape \(1, 3, 16, 32\): expected \[1, 4, 16, 32\]"),
    (
        lambda x: {"initial_state": x["initial_state"].mT},
        r"initial_state has shape \(1, 4, 32, 16\): expected \[1, 4, 16, 32\]",
    ),
    (
        lambda x: {"initial_state": x["initial_state"].repeat(2, 1, 1, 1)},
        r"initial_state has shape \(2, 4, 16, 32\): expected \[1, 4, 16, 32\]",
    ),
    (
        packed([0, 2, 6]),
        r"initial_state has shape \(1, 4, 16, 32\): expected \[2, 4, 16, 32\]",
    ),
    (cast("k", torch.bfloat16), r"k is torch\.bfloat16, q is torch\.float32: expected one dtype"),
    (cast("q", torch.float64), r"k is torch\.float32, q is torch\.float64: expected one dtype"),
    (cast("v", torch.float64), r"v is torch\.float64, q is torch\.float32: expected one dtype"),
    (cast("g", torch.bfloat16), r"g is torch\.bfloat16, q is torch\.float32: expected one dtype"),
    (cast("beta", torch.bfloat16), r"beta is torch\.bfloat16, q is torch\.float32: expected one dtype"),
    (cast("A_log", torch.bfloat16), r"A_log is torch\.bfloat16: expected float32"),
    (cast("A_log", torch.float64), r"A_log is torch\.float64: expected float32"),
    (cast("dt_bias", torch.bfloat16), r"dt_bias is torch\.bfloat16: expected float32"),
    (cast("initial_state", torch.bfloat16), r"initial_state is torch\.bfloat16: expected float32"),
    (lambda x: {n: x[n].long() for n in ("q", "k", "v", "g", "beta")}, r"q is torch\.int64: expected a floating-point"),
    (lambda x: {"k": x["k"].to("meta")}, r"k is on meta, q is on cpu: expected one device"),
    (lambda x: {"dt_bias": x["dt_bias"].to("meta")}, r"dt_bias is on meta, q is on cpu: expected one device"),
    (
        lambda x: {"initial_state": x["initial_state"].to("meta")},
        r"initial_state is on meta, q is on cpu: expected one device",
    ),
    (packed([0, 5]), r"cu_seqlens is \[0, 5\]: expected .* to end at T = 6"),
    (packed([0, 7]), r"cu_seqlens is \[0, 7\]: expected .* to end at T = 6"),
    (packed([1, 6]), r"cu_seqlens is \[1, 6\]: expected to begin with 0"),
    (packed([0, 4, 2, 6]), r"cu_seqlens is \[0, 4, 2, 6\]: expected .* never to fall"),
    (packed([0, -2, 6]), r"cu_seqlens is \[0, -2, 6\]: expected .* never to fall"),
    (packed([*range(6), 6, 6, 6, 7]), r"cu_seqlens is \[0, 1, 2, 3, \.\.\., 7\]: expected .* to end at T = 6"),
    (packed([0]), r"cu_seqlens has shape \(1,\) .* expected \[sequences \+ 1\] integers"),
    (packed([0, 6], torch.float32), r"cu_seqlens has shape \(2,\) and dtype torch\.float32: expected"),
    (packed([0, 6], torch.complex64), r"cu_seqlens has shape \(2,\) and dtype torch\.complex64: expected .* integers"),
    (packed([0, 1], torch.bool), r"cu_seqlens has shape \(2,\) and dtype torch\.bool: expected .* integers"),
    (lambda x: {"cu_seqlens": torch.tensor([[0, 6]])}, r"cu_seqlens has shape \(1, 2\) .* expected"),
    (given(cu_seqlens=[0, 6]), r"cu_seqlens is of type list: expected a tensor of integers"),
]


@pytest.mark.parametrize(("change", "told"), WRONG, ids=[told[:40] for _, told in WRONG])
def test_a_wrong_argument_is_named(change: Change, told: str) -> None:
    x = draw(FLOAT, 6, **GROUPED)
    with pytest.raises(ValueError, match=f"^{told}"):
        kda(**{**x, **change(x)})  # type: ignore[arg-type]


def test_packed_sequences_come_in_a_batch_of_one() -> None:
    x = draw(FLOAT, 6, **{**GROUPED, "B": 2})
    with pytest.raises(
        ValueError, match=r"^q has a batch of 2: packed sequences \(cu_seqlens\) come in a batch of one"
    ):
        kda(**x, cu_seqlens=torch.tensor([0, 6]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: {"q": x["q"][:, None]}, r"q has shape \(1, 1, 4, 16\): expected \[batch, heads, key dim\]"),
        (lambda x: {"q": x["q"][0, 0, 0]}, r"q has shape \(\): expected \[batch, heads, key dim\]"),
        (lambda x: {"k": x["q"][:, :3]}, r"k has 3 heads: expected a number that divides q's 4 heads"),
        (cut("k", 2), r"k has shape \(1, 2, 15\): expected \[1, k/v heads, 16\], like q"),
        (cut("v", 1), r"v has shape \(1, 1, 32\): expected \[1, 2, value dim\], like k"),
        (cut("g", 1), r"g has shape \(1, 3, 16\): expected \[1, 4, 16\]"),
        (cut("beta", 1), r"beta has shape \(1, 3\): expected \[1, 4\]"),
        (cast("state", torch.bfloat16), r"state is torch\.bfloat16: expected float32"),
        (cut("state", 1), r"state has shape \(1, 3, 16, 32\): expected \[1, 4, 16, 32\]"),
        (lambda x: {"state": x["state"].to("meta")}, r"state is on meta, q is on cpu: expected one device"),
        (given(scale=float("inf")), r"scale is inf: expected a finite number"),
        (given(gate="sigmoid"), r"gate is 'sigmoid'"),
        (given(impl="cuda"), r"impl is 'cuda'"),
    ],
)
def test_a_wrong_argument_of_a_step_is_named(change: Change, told: str) -> None:
    x = one_token(draw(FLOAT, 1, **GROUPED))
    before = x["state"].clone()
    with pytest.raises(ValueError, match=f"^{told}"):
        kda_step(**{**x, **change(x)})  # type: ignore[arg-type]
    assert torch.equal(x["state"], before)


@pytest.mark.parametrize("wrong", [None, 0])
def test_a_step_without_a_state_is_refused(wrong: Any) -> None:
    x = one_token(draw(FLOAT, 1, **GROUPED))
    with pytest.raises(ValueError, match=rf"^state is of type {type(wrong).__name__}: expected a tensor"):
        kda_step(**{**x, "state": wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda x: (
                {n: x[n][..., :12].contiguous() for n in ("q", "k", "g", "dt_bias")}
                | {"initial_state": x["initial_state"][:, :, :12].contiguous()}
            ),
            r"q's last dimension is 12: impl='triton' takes 16, 32, 64, 128; use impl='reference'",
        ),
        (
            lambda x: {n: x[n][..., :24].contiguous() for n in ("v", "initial_state")},
            r"v's last dimension is 24: impl='triton' takes 16, 32, 64, 128; use impl='reference'",
        ),
        (
            lambda x: {n: x[n].double() for n in ("q", "k", "v", "g", "beta")},
            r"q is torch\.float64: impl='triton' takes float32 or bfloat16; use impl='reference'",
        ),
        (given(lower_bound=-5.5), r"lower_bound is -5\.5: impl='triton' takes -5 to 0.* use impl='reference'"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_though_the_reference_does_it(
    triton_kernels: None, change: Change, told: str
) -> None:
    x = draw(TRITON, 6, **GROUPED)
    x |= change(x)
    with pytest.raises(ValueError, match=f"^{told}"):
        kda(**x, impl="triton")  # type: ignore[arg-type]
    one = one_token({name: t for name, t in x.items() if name != "lower_bound"})
    one |= {name: value for name, value in x.items() if name == "lower_bound"}
    before = one["state"].clone()
    with pytest.raises(ValueError, match=f"^{told}"):
        kda_step(**one, impl="triton")  # type: ignore[arg-type]
    assert torch.equal(one["state"], before)
    assert kda(**x, impl="reference")[0].isfinite().all()  # type: ignore[arg-type]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**kept, **environment}
    )


CALL = """
import sys, torch
{before}
from models.kda import kda, kda_step
x = torch.zeros(1, 3, 1, 16)
gates = (torch.zeros(1), torch.zeros(1, 16))
for call in (
    lambda: kda(x, x, x, x, x[..., 0], *gates, impl="triton"),
    lambda: kda_step(*[x[:, 0]] * 4, x[:, 0, :, 0], *gates, torch.zeros(1, 1, 16, 16), impl="triton"),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(TRITON.device == "cuda", reason="on a GPU the kernels run")
@pytest.mark.parametrize("value", ["", "0", "off", "false"])
def test_kernels_on_a_cpu_without_the_interpreter_are_refused(triton_kernels: None, value: str) -> None:
    done = python(CALL.format(before=""), TRITON_INTERPRET=value)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.count("TRITON_INTERPRET=1") for line in done.stdout.splitlines()] == [1, 1]


@pytest.mark.skipif(TRITON.device == "cuda", reason="on a GPU the kernels run")
def test_the_interpreter_asked_for_after_tritons_import_is_refused(triton_kernels: None) -> None:
    done = python(CALL.format(before="import os, triton.language; os.environ['TRITON_INTERPRET'] = '1'"))
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.count("before the start") for line in done.stdout.splitlines()] == [1, 1]


@pytest.mark.skipif(TRITON.device == "cuda", reason="on a GPU the kernels run")
@pytest.mark.parametrize("value", ["1", "TRUE", "on", "yes"])
def test_tritons_own_words_for_yes_start_the_interpreter(triton_kernels: None, value: str) -> None:
    done = python(CALL.format(before=""), TRITON_INTERPRET=value)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(TRITON.device == "cuda", reason="on a GPU bfloat16 is right")
def test_bfloat16_in_the_interpreter_is_refused(triton_kernels: None) -> None:
    x = draw(subject("triton", torch.bfloat16), 6, **GROUPED)
    one = one_token(x)
    told = r"^q is torch\.bfloat16, in which Triton's interpreter is silently wrong: use float32, or impl='reference'"
    with pytest.raises(ValueError, match=told):
        kda(**x, impl="triton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=told):
        kda_step(**one, impl="triton")  # type: ignore[arg-type]
    assert torch.equal(one["state"], x["initial_state"])


def test_more_chunks_than_a_grid_holds_are_refused(triton_kernels: None) -> None:
    x = torch.zeros(1, device=TRITON.device).expand(1, 65_536 * 64, 1, 16)
    gates = (torch.zeros(1, device=TRITON.device), torch.zeros(1, 16, device=TRITON.device))
    with pytest.raises(
        ValueError, match=r"q has 4,194,304 tokens in 1 sequences, 65,536 chunks .* takes 65,535 a call"
    ):
        kda(x, x, x, x, x[..., 0], *gates, impl="triton")


def test_kernels_without_triton_are_refused() -> None:
    done = python(CALL.format(before="sys.modules['triton'] = None"))
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.count("pip install 'evalkit[kda]'") for line in done.stdout.splitlines()] == [1, 1]
