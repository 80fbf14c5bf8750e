"""Configuration, first weights, saving and loading of a hybrid."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from models.hybrid import HybridKDAForCausalLM
from models.hybrid_config import HybridKDAConfig
from models.kda.reference import log_decay
from models.load import describe, load
from tests.models.hybrids import FAMILIES, tiny_hybrid, tiny_teacher, tokens
from tests.tiny import tiny_tokenizer

SHAPE = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_students_config_has_the_teachers_fields_and_says_what_is_kept(tmp_path: Path) -> None:
    teacher = Qwen3Config(**SHAPE, head_dim=32, rope_theta=1e6, eos_token_id=[1, 2], tie_word_embeddings=True)
    config = HybridKDAConfig.from_teacher(teacher, [0, 2], kda_gate="softplus")
    assert config.layer_types == ["full_attention", "linear_attention"] * 2
    assert config.kept_layers == [0, 2] and config.kda_layers == [1, 3]
    assert (config.kda_heads, config.kda_kv_heads, config.kda_head_dim) == (4, 2, 32)
    for name in ("rope_parameters", "head_dim", "eos_token_id", "tie_word_embeddings", "vocab_size", "rms_norm_eps"):
        assert getattr(config, name) == getattr(teacher, name)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["hidden_act"] == "silu" and written["attention_bias"] is False  # defaults are written too


@pytest.mark.parametrize(
    ("keep", "options", "says"),
    [
        ([4], {}, "keep names layer 4: the teacher's 4 layers are 0 to 3"),
        ([-1], {}, "keep names layer -1: the teacher's 4 layers are 0 to 3"),
        ([1, 1], {}, "keep names layer 1 twice"),
        ([0], {"kda_heads": 3}, r"kda_kv_heads is 2: expected a divisor of kda_heads \(3\)"),
        ([0], {"kda_kv_heads": 0}, "kda_kv_heads is 0: expected 1 or more"),
        ([0], {"num_key_value_heads": 3}, r"num_key_value_heads is 3: expected a divisor of num_attention_heads \(4\)"),
        ([0], {"kda_gate": "linear"}, "kda_gate is 'linear': expected bounded or softplus"),
        ([0], {"kda_lower_bound": 0.0}, "kda_lower_bound is 0.0: expected a log-decay below 0"),
        ([0], {"kda_conv_size": 1}, "kda_conv_size is 1: expected 2 taps or more"),
        (
            [0],
            {"kda_rope": True, "kda_head_dim": 8},
            "kda_head_dim is 8: expected the teacher's 16 where kda_rope is on",
        ),
        ([0], {"layer_types": ["full_attention"]}, "layer_types has 1 entries: expected 4, one a layer"),
        (
            [0],
            {"layer_types": ["conv"] * 4},
            r"layer_types\[0\] is 'conv': expected linear_attention or full_attention",
        ),
        (
            [0],
            {"layer_types": ["sliding_attention"] * 4},
            r"layer_types\[0\] is .*: the teacher's layer 0 is 'full_att",
        ),
        ([0], {"teacher_type": "mistral"}, "teacher_type is 'mistral': expected one of llama, qwen2, qwen3"),
    ],
)
def test_a_config_that_can_not_be_is_refused(keep: list[int], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        HybridKDAConfig.from_teacher(LlamaConfig(**SHAPE), keep, **options)


def test_a_teacher_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="the teacher is of the family 'gpt2': expected one of llama, qwen2, qwen3"):
        HybridKDAConfig.from_teacher(GPT2Config(), [0])


def test_sliding_window_layers_stay_what_they_are() -> None:
    teacher = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    config = HybridKDAConfig.from_teacher(teacher, [0, 3])
    assert config.layer_types == ["full_attention", "linear_attention", "linear_attention", "sliding_attention"]
    assert config.sliding_window == 8


@pytest.mark.parametrize("gate", ["bounded", "softplus"])
def test_a_new_layers_channels_forget_with_half_lives_from_2_to_2048_tokens(gate: str) -> None:
    config = HybridKDAConfig.from_teacher(tiny_teacher("llama").config, [0], kda_gate=gate)
    mixer = HybridKDAForCausalLM(config).model.layers[1].kda
    x = torch.randn(1, 5, 32)
    decay = log_decay(mixer.f_b_proj(mixer.f_a_proj(x)).unflatten(-1, (4, 8)), mixer.A_log, mixer.dt_bias, gate, -5.0)
    half_lives = 2.0 ** torch.linspace(1, 11, 8)
    torch.testing.assert_close(-math.log(2) / decay, half_lives.expand(1, 5, 4, 8), rtol=1e-4, atol=0)


def test_a_new_layer_passes_the_newest_token_on_with_its_gate_open() -> None:
    mixer = HybridKDAForCausalLM(HybridKDAConfig.from_teacher(tiny_teacher("llama").config, [0])).model.layers[1].kda
    for conv in (mixer.q_conv, mixer.k_conv, mixer.v_conv):
        assert conv.shape[1] == 4 and torch.equal(conv, torch.tensor([0.0, 0, 0, 1]).expand_as(conv))
    assert (mixer.A_log == 0).all() and (mixer.o_norm == 1).all() and (mixer.g_b_proj.bias == 3).all()
    assert mixer.q_proj.weight.std() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_hybrid_loads_as_it_was(family: str, tmp_path: Path) -> None:
    model = tiny_hybrid(tiny_teacher(family), kda_gate="softplus")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is HybridKDAForCausalLM
    assert torch.equal(again(tokens(9)).logits, model(tokens(9)).logits)
    remote = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(remote) is HybridKDAForCausalLM  # evalkit's own class where evalkit is


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_must_stay_float32_stays_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_hybrid(tiny_teacher("qwen2"))
    model.save_pretrained(tmp_path / "full")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=dtype)
    half.save_pretrained(tmp_path / "half")
    for one in (half, AutoModelForCausalLM.from_pretrained(tmp_path / "half")):
        for name, parameter in one.named_parameters():
            exact = name.endswith(("A_log", "dt_bias", "o_norm"))
            assert parameter.dtype == (torch.float32 if exact else dtype), name
            if exact:
                assert torch.equal(parameter, model.get_parameter(name))
        assert one(tokens(9)).logits.isfinite().all()
    made = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    assert made.model.layers[0].kda.dt_bias.dtype == torch.float32 and made(tokens(9)).logits.isfinite().all()


def test_weights_that_a_checkpoint_lacks_start_as_a_new_layers_and_are_reported(tmp_path: Path) -> None:
    teacher = tiny_teacher("llama")
    config = HybridKDAConfig.from_teacher(teacher.config, [1])
    teacher.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    model, info = HybridKDAForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert any(name.endswith("kda.dt_bias") for name in info["missing_keys"])
    fresh = HybridKDAForCausalLM(config)
    for name in ("A_log", "dt_bias", "o_norm", "q_conv", "v_conv", "f_b_proj.weight", "g_b_proj.bias"):
        found, expected = (one.get_parameter(f"model.layers.0.kda.{name}") for one in (model, fresh))
        assert torch.equal(found, expected)
    assert model.get_parameter("model.layers.0.kda.q_proj.weight").std() > 0.05
    kept = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(kept), teacher.get_parameter(kept))


def test_a_hybrids_folder_is_a_model_like_any_other(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_hybrid(tiny_teacher("llama", vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert type(loaded.model) is HybridKDAForCausalLM
    assert torch.equal(loaded.model(tokens(9)).logits, model(tokens(9)).logits)
    assert loaded.identity == describe(model, tokenizer, "live").identity
