"""Agreement with flash-linear-attention: its naive KDA and gates in plain PyTorch, and what our wrapper hands over.

Run by `make test-fla` in an environment of its own: with fla installed, transformers' Kimi Linear takes its kernels on
a CPU too, and fails. fla's chunk kernels can't run there; `test_kda_cuda.py` compares with them on a GPU.
"""

import contextlib
import importlib.util
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import models.kda.fla
from models.kda import kda, kda_step
from models.kda.reference import l2norm, log_decay
from tests.conftest import missing
from tests.models.kda.oracles import (
    GATES,
    GROUPED,
    OVERFLOW_TO_A_LIMIT,
    PLAIN,
    Tensors,
    assert_near,
    draw,
    exact,
    run,
    subject,
)
from tests.models.kda.test_step import one_token

pytestmark = OVERFLOW_TO_A_LIMIT

FLA = subject("fla", torch.float32)


@pytest.fixture
def fla() -> SimpleNamespace:
    """fla's plain PyTorch functions."""
    if importlib.util.find_spec("fla") is None:
        missing("fla", "flash-linear-attention is not installed (make test-fla has an environment with it)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns of the missing GPU and of what torch deprecates
        from fla.ops import kda as package
        from fla.ops.kda import gate, naive
    return SimpleNamespace(
        package=package,
        recurrent=naive.naive_recurrent_kda,
        chunk=naive.naive_chunk_kda,
        softplus=gate.naive_kda_gate,
        bounded=gate.naive_kda_lowerbound_gate,
    )


def theirs(fla: SimpleNamespace, x: Tensors, gate: str, function: str, **options: Any) -> Tensors:
    """fla's naive ones on our inputs: normalised, repeated and activated outside, as they expect them."""
    groups = x["q"].shape[2] // x["k"].shape[2]
    bound = {"lower_bound": -5.0} if gate == "bounded" else {}
    o, state = getattr(fla, function)(
        torch.nn.functional.normalize(x["q"], dim=-1),
        torch.nn.functional.normalize(x["k"], dim=-1).repeat_interleave(groups, 2),
        x["v"].repeat_interleave(groups, 2),
        getattr(fla, gate)(x["g"], x["A_log"], x["dt_bias"].flatten(), **bound),
        torch.sigmoid(x["beta"]),
        initial_state=x["initial_state"],
        output_final_state=True,
        **options,
    )
    return {"o": o, "state": state}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [GROUPED, PLAIN], ids=["grouped", "plain"])
@pytest.mark.parametrize(("function", "T"), [("recurrent", 1), ("recurrent", 65), ("chunk", 64), ("chunk", 128)])
def test_flas_naive_functions_say_the_same(
    fla: SimpleNamespace, function: str, T: int, shape: dict[str, int], gate: str
) -> None:
    x = draw(FLA, T, **shape)
    assert_near(FLA, theirs(fla, x, gate, function), exact(FLA, x, gate=gate), f"fla's naive {function}")
    for impl in ("recurrent", "reference"):
        assert_near(FLA, run(impl, x, gate=gate), theirs(fla, x, gate, function), f"our {impl} and fla's {function}")


@pytest.mark.parametrize("gate", GATES)
def test_flas_naive_gates_are_ours(fla: SimpleNamespace, gate: str) -> None:
    x = draw(FLA, 65, **GROUPED)
    bound = {"lower_bound": -3.0} if gate == "bounded" else {}
    found = getattr(fla, gate)(x["g"], x["A_log"], x["dt_bias"].flatten(), **bound)
    assert_near(FLA, {"o": found}, {"o": log_decay(x["g"].double(), x["A_log"], x["dt_bias"], gate, -3.0)})


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [GROUPED, PLAIN], ids=["grouped", "plain"])
def test_the_wrapped_step_equals_the_recurrence(
    fla: SimpleNamespace, triton_kernels: None, monkeypatch: pytest.MonkeyPatch, gate: str, shape: dict[str, int]
) -> None:
    """fla's own one-token kernel, in the interpreter: it uses nothing that this lacks."""
    monkeypatch.setattr(models.kda.fla, "_check_available", lambda q: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    x = draw(FLA, 1, **shape)
    one = one_token(x)
    address = one["state"].data_ptr()
    o = kda_step(**one, gate=gate, impl="fla")  # type: ignore[arg-type]
    assert one["state"].data_ptr() == address
    assert_near(FLA, {"o": o[:, None], "state": one["state"]}, exact(FLA, x, gate=gate))


def documented_chunk_kda(fla: SimpleNamespace) -> Any:
    """fla's chunk_kda as its documentation has it, on its naive functions."""

    def chunk_kda(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        scale: float,
        initial_state: Tensor | None,
        output_final_state: bool,
        use_qk_l2norm_in_kernel: bool,
        use_gate_in_kernel: bool,
        use_beta_sigmoid_in_kernel: bool,
        safe_gate: bool,
        lower_bound: float | None,
        A_log: Tensor,
        dt_bias: Tensor,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert use_qk_l2norm_in_kernel and use_gate_in_kernel and use_beta_sigmoid_in_kernel and output_final_state
        assert q.shape == k.shape and q.shape[:3] == v.shape[:3] and dt_bias.ndim == 1
        assert safe_gate == (lower_bound is not None and -5 <= lower_bound < 0)
        decay = fla.softplus(g, A_log, dt_bias) if lower_bound is None else fla.bounded(g, A_log, dt_bias, lower_bound)
        values = (l2norm(q), l2norm(k), v, decay, torch.sigmoid(beta))
        if cu_seqlens is None:
            return fla.recurrent(*values, scale, initial_state, True)  # type: ignore[no-any-return]
        assert cu_seqlens_cpu is not None and cu_seqlens.dtype == torch.int64
        assert cu_seqlens.tolist() == cu_seqlens_cpu.tolist()
        outputs, states = [], []
        for n, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
            first = None if initial_state is None else initial_state[n : n + 1]
            o, state = fla.recurrent(*(x[:, start:end] for x in values), scale, first, True)
            outputs.append(o)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    return chunk_kda


@pytest.mark.parametrize("lower_bound", [-5.0, -2.0, -8.0])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("starts", [None, [0, 1, 1, 20]], ids=str)
def test_the_wrapper_hands_over_what_fla_documents(
    fla: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, starts: list[int] | None, gate: str, lower_bound: float
) -> None:
    monkeypatch.setattr(models.kda.fla, "_check_available", lambda q: None)
    monkeypatch.setattr(fla.package, "chunk_kda", documented_chunk_kda(fla))
    options: dict[str, Any] = {"gate": gate, "lower_bound": lower_bound, "cu_seqlens": starts, "scale": 0.3}
    x = draw(FLA, 20, N=3 if starts else 1, **GROUPED)
    assert_near(FLA, run("fla", x, **options), exact(FLA, x, **options))


def test_without_fla_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    x = draw(FLA, 3, **GROUPED)
    for call in (lambda: kda(**x, impl="fla"), lambda: kda_step(**one_token(x), impl="fla")):  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=r"^impl 'fla' needs flash-linear-attention.* pip install 'evalkit\[fla\]'$"
        ):
            call()


def test_on_a_cpu_fla_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("fla") is None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleType(name))
    x = draw(FLA, 3, **GROUPED)
    for call in (lambda: kda(**x, impl="fla"), lambda: kda_step(**one_token(x), impl="fla")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^impl 'fla' needs a CUDA device, and q is on cpu"):
            call()
