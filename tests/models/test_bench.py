"""`evalkit bench kda` at tiny sizes on the CPU: what it counts, says and survives. Times are never judged."""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.bench import inputs, kda, kda_tables, render
from models.bench.kda_settings import Settings as KDASettings
from models.bench.kda_settings import settled
from models.bench.profile import by_kernel
from models.bench.timing import Stopwatch, paired_ratio, race, summary
from tests.models.benches import KDA, check_markdown, need_gpu

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kda_result() -> dict[str, Any]:
    return kda.bench(KDA)


# Time and order


def test_every_repetition_times_all_on_the_same_fresh_inputs_and_the_first_one_changes() -> None:
    seen: list[tuple[str, int]] = []
    made = iter(range(100))
    runs: dict[str, Callable[[int], object]] = {name: lambda x, name=name: seen.append((name, x)) for name in "ABC"}  # type: ignore[misc]
    timed = race(runs, lambda: next(made), Stopwatch(CPU), repeats=4)
    assert [len(one.samples_ms) for one in timed.values()] == [4, 4, 4]
    rounds = [seen[-12:][n : n + 3] for n in range(0, 12, 3)]
    assert ["".join(name for name, _ in turn) for turn in rounds] == ["ABC", "BCA", "CAB", "ABC"]
    assert [{x for _, x in turn} for turn in rounds] == [{3}, {4}, {5}, {6}], (
        "one set a repetition, after three warm-ups"
    )


def test_a_contender_that_fails_says_so_and_the_others_go_on() -> None:
    calls = {"late": 0}

    def late(x: int) -> None:
        calls["late"] += 1
        if calls["late"] > 7:  # the warm-up's five calls, and two repetitions
            raise RuntimeError("an illegal\n memory access")

    def full(x: int) -> None:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    timed = race({"full": full, "late": late, "good": lambda x: None}, lambda: 0, Stopwatch(CPU), repeats=4)
    assert {name: one.status for name, one in timed.items()} == {
        "full": "out of memory",
        "late": "failed",
        "good": "ok",
    }
    assert timed["late"].reason == "RuntimeError: an illegal memory access"
    assert timed["full"].row()["ms"] is timed["late"].row()["ms"] is None
    assert len(timed["good"].samples_ms) == 4


def test_inputs_that_do_not_fit_are_out_of_memory_for_all() -> None:
    def fresh() -> int:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    timed = race({"a": lambda x: None, "b": lambda x: None}, fresh, Stopwatch(CPU), repeats=2)
    assert [one.status for one in timed.values()] == ["out of memory"] * 2


def test_median_quartiles_and_paired_ratio_are_numpys() -> None:
    samples = [3.0, 1.0, 10.0, 2.0, 7.0, 4.0]
    found = summary(samples)
    assert found is not None
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
    assert found == pytest.approx({"median": middle, "p25": low, "p75": high, "min": 1.0, "max": 10.0})
    assert summary([5.0]) == {"median": 5.0, "p25": 5.0, "p75": 5.0, "min": 5.0, "max": 5.0}
    assert summary([]) is None
    # The pairs' ratios are 2, 2 and 0.5; the ratio of the medians would be 1.
    assert paired_ratio([2.0, 4.0, 1.0], [1.0, 2.0, 2.0]) == 2.0
    assert paired_ratio([1.0], []) is None


# The measurement


def test_the_kda_result_keeps_its_schema(kda_result: dict[str, Any]) -> None:
    assert kda_result["schema"] == "evalkit.bench-kda/1" and kda_result["complete"]
    assert set(kda_result) == {
        "schema", "complete", "settings", "environment", "method", "ceilings", "rows", "errors", "kernels", "notes"
    }  # fmt: skip
    assert len(kda_result["rows"]) == 2 * (2 * 2 + 1) * 2, "gates x (lengths x passes + decode) x implementations"
    for row in kda_result["rows"]:
        assert set(row) == {
            "pass", "gate", "batch", "tokens", "impl", "status", "reason", "first_call_s", "host_ms", "peak_bytes",
            "samples_ms", "ms", "first_in_process", "floor", "times_floor", "times_fla",
        }  # fmt: skip
        assert (row["status"], len(row["samples_ms"]), row["peak_bytes"]) == ("ok", 3, None)
        assert row["ms"]["median"] == statistics.median(row["samples_ms"])
        assert row["times_floor"] == pytest.approx(row["ms"]["median"] / row["floor"]["ms"])
    firsts = [(row["pass"], row["impl"]) for row in kda_result["rows"] if row["first_in_process"]]
    assert sorted(firsts) == sorted({(row["pass"], row["impl"]) for row in kda_result["rows"]})
    assert json.loads(json.dumps(kda_result, allow_nan=False))["rows"][0]["samples_ms"]


def test_errors_are_against_float64_with_every_gradient(kda_result: dict[str, Any]) -> None:
    names = {"o", "state", "step_o", "step_state", "dinitial_state"}
    names |= {f"d{name}" for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")}
    for row in kda_result["errors"]:
        assert not row["failures"]
        assert set(row["rms"]) == names
        assert 0 < max(row["rms"].values()) < 2e-5


def test_an_error_in_one_result_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    true = inputs.kda

    def wrong(*arguments: Any, impl: str, **options: Any) -> Any:
        o, state = true(*arguments, impl=impl, **options)
        return (o * 1.25 if impl == "recurrent" else o), state

    monkeypatch.setattr(inputs, "kda", wrong)
    found = kda.bench(replace(KDA, tokens=(16,), gates=("bounded",), decode_batch=0, backward=False, repeats=1))
    rms = {row["impl"]: row["rms"] for row in found["errors"]}
    assert rms["recurrent"]["o"] == pytest.approx(0.25, rel=1e-3)
    assert rms["reference"]["o"] < 1e-6


def test_a_result_that_is_not_finite_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    true = inputs.kda_step

    def broken(*arguments: Any, impl: str, **options: Any) -> Tensor:
        return true(*arguments, impl=impl, **options) * (float("nan") if impl == "recurrent" else 1.0)

    monkeypatch.setattr(inputs, "kda_step", broken)
    found = kda.bench(replace(KDA, tokens=(16,), gates=("bounded",), backward=False, repeats=1))
    assert [row["failures"] for row in found["errors"]] == [{}, {"decode": "ValueError: step_o is not finite"}]
    assert kda.failed(found) and any("step_o is not finite" in note for note in found["notes"])
    json.dumps(found, allow_nan=False)


def test_out_of_memory_is_said_in_its_row_and_a_broken_implementation_in_the_notes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = inputs.kda

    def scarce(q: Tensor, *arguments: Any, impl: str, **options: Any) -> Any:
        if q.shape[1] == 70 and impl == "recurrent":
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        if q.shape[1] == 16 and impl == "reference" and torch.is_grad_enabled():
            raise RuntimeError("no backward | here")
        return true(q, *arguments, impl=impl, **options)

    monkeypatch.setattr(inputs, "kda", scarce)
    found = kda.bench(replace(KDA, gates=("softplus",), decode_batch=0))
    status = {(row["pass"], row["tokens"], row["impl"]): row["status"] for row in found["rows"]}
    assert {key for key, value in status.items() if value == "out of memory"} == {
        ("forward", 70, "recurrent"),
        ("forward+backward", 70, "recurrent"),
    }
    assert {key for key, value in status.items() if value == "failed"} == {("forward+backward", 16, "reference")}
    text = render.markdown(found, kda_tables.TITLE, kda_tables.grids(found))
    assert "| 70 | recurrent | out of memory |" in text and "| 16 | reference | failed |" in text
    assert "RuntimeError: no backward \\| here" in text
    assert kda.failed(found), "a failure is more than a lack of memory"


def test_a_lack_of_memory_alone_is_no_failure(kda_result: dict[str, Any]) -> None:
    row = kda_result["rows"][0]
    assert not kda.failed(kda_result)
    assert not kda.failed(kda_result | {"rows": [row | {"status": "out of memory"}]})
    assert kda.failed(kda_result | {"rows": [row | {"status": "failed"}]})


def test_what_is_measured_is_saved_as_it_grows() -> None:
    saved: list[tuple[bool, int]] = []
    settings = replace(KDA, tokens=(16,), gates=("bounded",), impls=("reference",), repeats=1)
    steps: list[tuple[str, int, int]] = []
    kda.bench(
        settings,
        save=lambda result: saved.append((result["complete"], len(result["rows"]))),
        report=lambda *step: steps.append(step),
    )
    assert saved == [(False, 1), (False, 2), (False, 3), (False, 3), (True, 3)]
    assert steps[-1] == ("done", 4, 4) and all(done <= total for _, done, total in steps)


def test_random_inputs_spread_the_half_lives() -> None:
    for gate in ("bounded", "softplus"):
        bias = inputs._biases(gate, 128).double()
        rate = 5 * torch.sigmoid(bias) if gate == "bounded" else torch.nn.functional.softplus(bias)
        half_lives = 0.6931471805599453 / rate
        assert half_lives[[0, -1]].tolist() == pytest.approx([2.0, 2048.0], rel=1e-3)


def test_first_calls_compile_into_an_empty_cache_which_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    gpu = torch.device("cuda")
    with kda._compiled_anew(gpu, KDA):
        folder = Path(os.environ["TRITON_CACHE_DIR"])
        assert folder.is_dir() and not list(folder.iterdir())
    assert os.environ["TRITON_CACHE_DIR"] == "mine" and not folder.exists()
    with kda._compiled_anew(gpu, replace(KDA, keep_compiled=True)):
        assert os.environ["TRITON_CACHE_DIR"] == "mine"


def test_a_trace_is_summed_by_kernel_and_launch_for_one_call() -> None:
    def event(name: str, dur: float, grid: int, category: str = "kernel") -> dict[str, Any]:
        args = {"grid": [grid, 1, 1], "block": [128, 1, 1], "registers per thread": 64, "shared memory": 1024}
        return {"ph": "X", "cat": category, "name": name, "dur": dur, "args": args}

    trace = [
        {"ph": "M", "name": "process_name", "args": {}},
        event("chunk", 300.0, 64),
        event("chunk", 500.0, 64),
        event("chunk", 100.0, 8),
        event("chunk", 100.0, 8),
        event("aten::mm", 9999.0, 1, "cpu_op"),
        {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "dur": 1000.0, "args": {"bytes": 4}},
        {"ph": "f", "cat": "ac2g", "name": "ac2g"},
    ]
    rows = by_kernel(trace, calls=2)
    assert [(row["kernel"], row["grid"], row["launches"], row["ms"], row["share"]) for row in rows] == [
        ("Memset (Device)", None, 0.5, pytest.approx(0.5), pytest.approx(0.5)),
        ("chunk", [64, 1, 1], 1.0, pytest.approx(0.4), pytest.approx(0.4)),
        ("chunk", [8, 1, 1], 1.0, pytest.approx(0.1), pytest.approx(0.1)),
    ]
    assert (rows[1]["registers"], rows[1]["shared_bytes"], rows[0]["registers"]) == (64, 1024, None)
    grid = kda_tables.kernel_grid("a call", {"kernels": rows, "reason": ""})
    assert grid.title == "Kernels of a call: 1.000 ms"
    assert grid.rows[1][:6] == ("chunk", "1", "0.4000", "40.0%", "64x1x1", "128x1x1")


def test_the_kda_report_names_what_was_measured(kda_result: dict[str, Any]) -> None:
    check_markdown(kda_result, kda_tables.TITLE, kda_tables.grids(kda_result))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (replace(KDA, impls=("tritn",)), "unknown impl 'tritn'.*did you mean 'triton'"),
        (replace(KDA, impls=("reference", "reference")), "impl 'reference' is named twice"),
        (replace(KDA, impls=("fla",)), "impl fla needs a CUDA GPU"),
        (replace(KDA, gates=("hard",)), "unknown gate 'hard': expected bounded, softplus"),
        (replace(KDA, gates=()), "no gate is named"),
        (replace(KDA, tokens=(16, 0)), "tokens is 0: expected 1 or more"),
        (replace(KDA, heads=6, kv_heads=4), "kv_heads is 4: expected a divisor of heads, which is 6"),
        (replace(KDA, heads=0), "heads is 0"),
        (replace(KDA, batch=-1), "batch is -1"),
        (replace(KDA, decode_batch=-1), "decode_batch is -1"),
        (replace(KDA, dtype="int8"), "unknown dtype 'int8'"),
        (replace(KDA, profile=True), "kernels can be profiled on a CUDA GPU only"),
        (replace(KDA, device="tpu"), "unknown device 'tpu'"),
    ],
)
def test_bad_kda_input_is_told(settings: KDASettings, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        kda.bench(settings)


def test_triton_on_a_cpu_needs_the_interpreter_and_its_times_are_called_meaningless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl triton needs a CUDA GPU"):
        settled(replace(KDA, impls=("triton",)))
    assert settled(replace(KDA, impls=()))[0].impls == ("reference",)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    settings, _, notes = settled(replace(KDA, impls=()))
    assert settings.impls == ("triton", "reference") and "its times mean nothing" in notes[0]
    with pytest.raises(ValueError, match="right in float32 only"):
        settled(replace(KDA, impls=("triton",), dtype="bfloat16"))


def test_on_a_gpu_kernels_are_profiled_and_memory_counted() -> None:
    need_gpu()
    settings = KDASettings(
        tokens=(256,), heads=2, gates=("bounded",), impls=("triton", "reference"), backward=False, decode_batch=4,
        repeats=3, device="cuda", profile=True,
    )  # fmt: skip
    found = kda.bench(settings)
    assert not kda.failed(found), found["notes"]
    output = 256 * 2 * 128 * 2
    assert all(row["peak_bytes"] >= output for row in found["rows"] if row["pass"] == "forward")
    assert all(profile["kernels"] for profile in found["kernels"]), found["kernels"]
    limits = found["ceilings"]
    assert limits["copy_bytes_per_s"] > 1e11 and limits["matmul_flop_per_s"] > 1e12
