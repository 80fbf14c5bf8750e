"""`evalkit bench ttft` at tiny sizes on the CPU: what it counts, says and survives. Times are never judged."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.bench import render, ttft, ttft_tables
from models.bench.shapes import SHAPES, named_shape
from models.bench.sides import Runner
from models.bench.ttft_settings import Settings as TTFTSettings
from tests.models.benches import check_markdown, need_gpu, tiny_config


@pytest.fixture(scope="module")
def ttft_result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = tiny_config(tmp_path_factory.mktemp("config"))
    return ttft.bench(
        TTFTSettings(config=config, keep="1", tokens=(2, 70), decode_steps=3, repeats=2, device="cpu", dtype="bfloat16")
    )


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
    (row,) = ttft.bench(replace(asked, attention="sdpa"))["rows"]
    assert row["teacher"]["attention"] == ["flash_attention_for_cpu"]
    with pytest.raises(ValueError, match="would keep no attention"):
        ttft.bench(replace(asked, keep="none"))


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


def test_the_ttft_report_names_what_was_measured(ttft_result: dict[str, Any]) -> None:
    check_markdown(ttft_result, ttft_tables.TITLE, ttft_tables.grids(ttft_result))


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


def test_on_a_gpu_both_sides_take_the_same_attention_kernel(tmp_path: Path) -> None:
    need_gpu()
    config = tiny_config(tmp_path, head_dim=64)
    settings = TTFTSettings(
        config=config, keep="1", tokens=(256,), decode_steps=2, repeats=2, device="cuda", profile=True
    )
    found = ttft.bench(settings)
    assert not ttft.failed(found), found["notes"]
    assert found["rows"][0]["same_attention"] and all(profile["kernels"] for profile in found["kernels"])
