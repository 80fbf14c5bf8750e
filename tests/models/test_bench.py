"""The measurements themselves, at tiny sizes on the CPU: what they count, say, and survive. Times are never judged."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.bench import inputs, kda, kda_tables, provenance, render, ttft, ttft_tables
from models.bench.arguments import numbers
from models.bench.kda_settings import Settings as KDASettings
from models.bench.profile import by_kernel
from models.bench.shapes import SHAPES, named_shape
from models.bench.sides import Runner
from models.bench.timing import Stopwatch, paired_ratio, race, summary
from models.bench.ttft_settings import Settings as TTFTSettings
from tests.conftest import missing

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
KDA = KDASettings(
    tokens=(16, 70), heads=2, kv_heads=1, head_dim=16, decode_batch=2, impls=("reference", "recurrent"), repeats=3,
    device="cpu",
)  # fmt: skip


def tiny_config(folder: Path, family: str = "qwen3", **more: Any) -> str:
    config = {
        "model_type": family,
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 61,
        "max_position_embeddings": 64,
    }
    file = folder / f"{family}.json"
    file.write_text(json.dumps(config | more))
    return str(file)


@pytest.fixture(scope="module")
def kda_result() -> dict[str, Any]:
    return kda.bench(KDA)


@pytest.fixture(scope="module")
def ttft_result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = tiny_config(tmp_path_factory.mktemp("config"))
    return ttft.bench(
        TTFTSettings(config=config, keep="1", tokens=(2, 70), decode_steps=3, repeats=2, device="cpu", dtype="bfloat16")
    )


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


# bench kda


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


# bench ttft


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_cache_holds_what_the_formula_says(family: str, tmp_path: Path) -> None:
    settings = TTFTSettings(
        config=tiny_config(tmp_path, family), keep="0", tokens=(3, 66), batch=2, decode_steps=1, repeats=1, device="cpu"
    )
    found = ttft.bench(settings)
    for row in found["rows"]:
        a_layer = 2 * 2 * row["tokens"] * 2 * 8 * 4  # k and v x batch x tokens x k/v heads x head_dim x bytes
        states = 2 * 2 * (4 * 8 * 8 * 4 + 3 * (4 + 2 + 2) * 8 * 4)  # layers x batch x (states + conv inputs)
        for side, kv_cache, state in (("teacher", 3 * a_layer, 0), ("hybrid", a_layer, states)):
            one = row[side]
            assert one["status"] == "ok", one["reason"]
            assert one["kv_cache_bytes"] == one["kv_cache_formula_bytes"] == kv_cache
            assert one["kda_state_bytes"] == one["kda_state_formula_bytes"] == state
        assert row["kv_cache_saved"] == pytest.approx(2 / 3)
        assert row["cache_saved"] == pytest.approx(1 - (a_layer + states) / (3 * a_layer))


def test_the_ttft_result_keeps_its_schema(ttft_result: dict[str, Any]) -> None:
    assert ttft_result["schema"] == "evalkit.bench-ttft/1" and ttft_result["complete"]
    assert set(ttft_result) == {
        "schema", "complete", "settings", "environment", "method", "models", "rows", "kernels", "notes"
    }  # fmt: skip
    (model,) = ttft_result["models"]
    assert set(model) == {"name", "family", "layers", "kept", "parameters", "weights", "config"}
    assert (model["kept"], model["weights"]) == ([1], "random")
    assert [row["tokens"] for row in ttft_result["rows"]] == [2, 70]
    for row in ttft_result["rows"]:
        assert set(row) == {
            "model", "batch", "tokens", "teacher", "hybrid", "ttft_ratio", "decode_ratio", "kv_cache_saved",
            "cache_saved", "same_attention",
        }  # fmt: skip
        for side in ttft.SIDES:
            one = row[side]
            assert set(one) == {
                "status", "reason", "ttft_ms", "decode_ms", "first_prefill_s", "kv_cache_bytes", "kda_state_bytes",
                "peak_bytes", "attention", "ttft_samples_ms", "decode_samples_ms", "kv_cache_formula_bytes",
                "kda_state_formula_bytes",
            }  # fmt: skip
            assert [len(steps) for steps in one["decode_samples_ms"]] == [3, 3]
            assert one["ttft_ms"]["median"] == statistics.median(one["ttft_samples_ms"])
            steps = [step for repetition in one["decode_samples_ms"] for step in repetition]
            assert one["decode_ms"]["median"] == statistics.median(steps)
        pairs = zip(row["teacher"]["ttft_samples_ms"], row["hybrid"]["ttft_samples_ms"], strict=True)
        assert row["ttft_ratio"] == statistics.median(a / b for a, b in pairs)
    json.dumps(ttft_result, allow_nan=False)


def test_positions_beyond_the_models_window_are_raised_and_said(ttft_result: dict[str, Any]) -> None:
    assert ttft_result["models"][0]["config"]["max_position_embeddings"] == 70 + 3 + 1
    assert "made for 64 positions; raised to 74 for both sides" in " ".join(ttft_result["notes"])


def test_both_sides_use_the_attention_that_was_asked_for(tmp_path: Path) -> None:
    asked = TTFTSettings(
        config=tiny_config(tmp_path), keep="1", tokens=(9,), decode_steps=1, repeats=1, device="cpu", attention="math"
    )
    (row,) = ttft.bench(asked)["rows"]
    assert row["teacher"]["attention"] == row["hybrid"]["attention"] == ["math"]
    assert row["same_attention"]
    (row,) = ttft.bench(replace(asked, attention="sdpa", keep="none"))["rows"]
    assert row["teacher"]["attention"] == ["flash_attention_for_cpu"]
    assert row["hybrid"]["attention"] == [] and row["same_attention"] is None


def test_only_the_last_positions_logits_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    true = AutoModelForCausalLM.from_config

    def watched(*arguments: Any, **options: Any) -> Any:
        model = true(*arguments, **options)
        model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", watched)
    config = tiny_config(tmp_path)
    ttft.bench(TTFTSettings(config=config, keep="1", tokens=(40,), batch=2, decode_steps=2, repeats=1, device="cpu"))
    assert shapes and set(shapes) == {(2, 1, 61)}


def test_a_side_out_of_memory_is_said_in_its_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = Runner._next

    def scarce(self: Runner, tokens: Tensor, cache: Any) -> Tensor:
        if tokens.shape[1] == 20 and self.model.config.model_type == "qwen3":
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return true(self, tokens, cache)

    monkeypatch.setattr(Runner, "_next", scarce)
    config = tiny_config(tmp_path)
    found = ttft.bench(TTFTSettings(config=config, keep="1", tokens=(20, 30), decode_steps=2, repeats=1, device="cpu"))
    short, long = found["rows"]
    assert (short["teacher"]["status"], short["hybrid"]["status"]) == ("out of memory", "ok")
    assert short["ttft_ratio"] is None and short["hybrid"]["ttft_ms"] and long["ttft_ratio"]
    assert short["kv_cache_saved"] == pytest.approx(2 / 3), "by formula, where the teacher does not fit"
    assert not ttft.failed(found)
    assert "| 20 | teacher | out of memory |" in render.markdown(found, ttft_tables.TITLE, ttft_tables.grids(found))


def test_a_cache_unlike_the_formula_fails_its_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.bench.sides.cache_bytes", lambda cache: (123, 0))
    config = tiny_config(tmp_path)
    found = ttft.bench(TTFTSettings(config=config, keep="1", tokens=(9,), decode_steps=1, repeats=1, device="cpu"))
    assert ttft.failed(found)
    assert "the cache holds (123, 0) bytes" in found["rows"][0]["teacher"]["reason"]


def test_a_hybrids_own_configuration_gives_its_layers_and_its_teacher(
    ttft_result: dict[str, Any], tmp_path: Path
) -> None:
    known = ttft_result["models"][0]["config"]
    file = tmp_path / "hybrid.json"
    file.write_text(json.dumps(known | {"kda_conv_size": 3, "kda_gate": "softplus"}))
    found = ttft.bench(TTFTSettings(config=str(file), tokens=(9,), decode_steps=1, repeats=1, device="cpu"))
    (model,) = found["models"]
    assert (model["kept"], model["family"]) == ([1], "qwen3")
    assert (model["config"]["kda_conv_size"], model["config"]["kda_gate"]) == (3, "softplus")
    assert model["parameters"]["teacher"] == ttft_result["models"][0]["parameters"]["teacher"]
    assert not ttft.failed(found)


def test_a_models_folder_gives_its_shapes(tiny_folder: Path) -> None:
    found = ttft.bench(TTFTSettings(model=str(tiny_folder), tokens=(9,), keep="0", repeats=1, device="cpu"))
    (model,) = found["models"]
    assert (model["name"], model["family"], model["layers"]) == (str(tiny_folder), "llama", 2)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_built_in_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(named_shape(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert name in SHAPES


# Reports


def test_markdown_names_device_versions_and_method(
    kda_result: dict[str, Any], ttft_result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for result, tables in ((kda_result, kda_tables), (ttft_result, ttft_tables)):
        text = render.markdown(result, tables.TITLE, tables.grids(result))
        device = result["environment"]["device"]["name"]
        for words in (device, torch.__version__, "triton", "transformers", "flash-linear-attention (not installed)"):
            assert words in text
        assert f"dtype {result['settings']['dtype']}, seed 0, {result['environment']['date']}" in text
        assert all(line in text for line in result["method"])
        for block in text.split("\n\n"):
            if block.startswith("|"):
                assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1, block
    unfinished = kda_result | {"complete": False}
    assert "UNFINISHED" in render.markdown(unfinished, kda_tables.TITLE, kda_tables.grids(unfinished))


def test_sizes_and_times_are_told_in_their_unit() -> None:
    assert [render.size(n) for n in (0, 1023, 1024, 14 * 2**30, None)] == ["0 B", "1023 B", "1.0 KiB", "14.0 GiB", "–"]
    assert [render.milliseconds(t) for t in (0.03091, 4.3, 1493.21, None)] == ["0.0309", "4.300", "1493.2", "–"]
    assert render.median({"median": 2.0, "p25": 1.9, "p75": 2.1}) == ("2.000", "10.0%")


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "bench-kda.json"
    provenance.write(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        provenance.write(file, "new")
    assert [(p.name, p.read_text()) for p in file.parent.iterdir()] == [("bench-kda.json", "old")]


# The commands

BARE = """
import json, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "pydantic_core", "datasets", "lm_eval"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Missing())
import typer
from evalkit import cli
try:
    getattr(cli, sys.argv[1])(**json.loads(sys.argv[2]))
except typer.Exit as done:
    sys.exit(done.exit_code)
"""
"""A bare GPU machine. The command's function is called as such: newer versions of typer parse with pydantic."""


def child(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "TRITON_INTERPRET": "0"}
    arguments = [sys.executable, *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)


def test_bench_kda_writes_its_reports(tmp_path: Path) -> None:
    small = (
        "--heads",
        2,
        "--head-dim",
        16,
        "--decode-batch",
        2,
        "--repeats",
        2,
        "--gate",
        "bounded",
        "--device",
        "cpu",
    )
    out = tmp_path / "a b"
    done = child("-m", "evalkit", "bench", "kda", "--tokens", "16,1k", *small, "--no-backward", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "forward, bounded gate, 2 heads of 16, batch 1, float32" in done.stdout
    assert "Traceback" not in done.stderr
    found = json.loads((out / "bench-kda.json").read_text())
    assert [row["tokens"] for row in found["rows"]] == [16, 1024, 1] and found["complete"]
    assert (out / "bench-kda.md").read_text().startswith("# Kimi Delta Attention")
    assert sorted(p.name for p in out.iterdir()) == ["bench-kda.json", "bench-kda.md"]


def test_bench_ttft_prints_json_alone(tmp_path: Path) -> None:
    asked = ("--config", tiny_config(tmp_path), "--keep", "1", "--tokens", 9, "--repeats", 1, "--device", "cpu")
    done = child("-m", "evalkit", "bench", "ttft", *asked, "--decode-steps", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == "evalkit.bench-ttft/1"
    assert list(tmp_path.iterdir()) == [tmp_path / "qwen3.json"], "nothing is written without --out"


def test_bad_usage_is_one_line(tmp_path: Path) -> None:
    done = child("-m", "evalkit", "bench", "ttft", "--shapes", "qwen-0.6b", "--device", "cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "did you mean 'qwen3-0.6b'?" in done.stderr


def test_both_run_without_pydantic_and_datasets(tmp_path: Path) -> None:
    small = {"tokens": "16", "heads": 2, "head_dim": 16, "decode_batch": 2, "repeats": 1, "device": "cpu"}
    done = child("-c", BARE, "bench_kda", json.dumps(small | {"gate": "softplus", "out": None}))
    assert (done.returncode, "softplus gate" in done.stdout) == (0, True), done.stderr
    small = {"config": tiny_config(tmp_path), "keep": "1", "tokens": "9", "repeats": 1, "device": "cpu"}
    done = child("-c", BARE, "bench_ttft", json.dumps(small | {"decode_steps": 1}))
    assert (done.returncode, "qwen3, random weights" in done.stdout) == (0, True), done.stderr


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
    from models.bench.kda_settings import settled

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl triton needs a CUDA GPU"):
        settled(replace(KDA, impls=("triton",)))
    assert settled(replace(KDA, impls=()))[0].impls == ("reference",)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    settings, _, notes = settled(replace(KDA, impls=()))
    assert settings.impls == ("triton", "reference") and "its times mean nothing" in notes[0]
    with pytest.raises(ValueError, match="right in float32 only"):
        settled(replace(KDA, impls=("triton",), dtype="bfloat16"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (TTFTSettings(shapes=("qwen-0.6b",)), "unknown shape 'qwen-0.6b'.*did you mean 'qwen3-0.6b'"),
        (TTFTSettings(shapes=("smollm2-135m",), keep="0,30"), "keep names layer 30: expected 0 to 29"),
        (TTFTSettings(shapes=("smollm2-135m",), keep="qwen3-0.6b"), "a preset for a teacher of 28 layers"),
        (TTFTSettings(tokens=(0,)), "tokens is 0"),
        (TTFTSettings(decode_steps=0), "decode_steps is 0"),
        (TTFTSettings(attention="flsh"), "unknown attention 'flsh'.*did you mean 'flash'"),
        (TTFTSettings(impl="fla"), "impl fla needs a CUDA GPU"),
        (TTFTSettings(gate="hard"), "unknown gate 'hard'"),
        (TTFTSettings(config="nowhere.json"), "config nowhere.json can't be read as JSON"),
        (TTFTSettings(model="./nowhere"), "there is no model folder"),
        (TTFTSettings(profile=True), "kernels can be profiled on a CUDA GPU only"),
    ],
)
def test_bad_ttft_input_is_told(settings: TTFTSettings, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ttft.bench(replace(settings, device="cpu"))


def test_a_configuration_that_is_no_teachers_is_told(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text, told in (
        ("[]", "has no model_type"),
        ('{"model_type": "gpt2"}', "family 'gpt2': expected one of llama, qwen2, qwen3, hybrid_kda"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=told):
            ttft.bench(TTFTSettings(config=str(file), device="cpu"))
    sliding = tiny_config(tmp_path, "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    with pytest.raises(ValueError, match="sliding window"):
        ttft.bench(TTFTSettings(config=sliding, keep="0", device="cpu"))


def test_lengths_are_read_from_text() -> None:
    assert numbers("tokens", "4096, 8k,128K") == (4096, 8192, 131072)
    for text in ("", "8q", "1.5k", "-4", "8,,9"):
        with pytest.raises(ValueError, match="tokens is .*expected whole numbers between commas"):
            numbers("tokens", text)


# On a GPU


@pytest.fixture
def gpu() -> None:
    if not torch.cuda.is_available():
        missing("cuda", "there is no CUDA GPU")


def test_on_a_gpu_kernels_are_profiled_and_memory_counted(gpu: None) -> None:
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


def test_on_a_gpu_both_sides_take_the_same_attention_kernel(gpu: None, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, head_dim=64)
    settings = TTFTSettings(
        config=config, keep="1", tokens=(256,), decode_steps=2, repeats=2, device="cuda", profile=True
    )
    found = ttft.bench(settings)
    assert not ttft.failed(found), found["notes"]
    assert found["rows"][0]["same_attention"] and all(profile["kernels"] for profile in found["kernels"])
