"""Every parameter is in the groups that its role says; a trained group moves, and nothing else does."""

from typing import Any

import pytest
import torch

from distill.groups import check_frozen, decays, freeze, frozen_hashes, group_of, is_mixer, mixer_layers, trained
from distill.stage import Lora
from distill.student import make_student
from tests.distill.students import loaded, recipe
from tests.models.hybrids import FAMILIES, tokens

X = tokens(24)


def student(family: str = "llama", **options: Any) -> Any:
    return make_student(loaded(family), recipe(**options), text=tokens(70))


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("model.layers.3.kda.q_proj.weight", "q mixer all"),
        ("model.layers.3.kda.q_proj.bias", "q mixer all"),
        ("model.layers.3.kda.o_proj.weight", "o mixer all"),
        ("model.layers.3.kda.v_conv", "conv mixer all"),
        ("model.layers.3.kda.A_log", "gates mixer all"),
        ("model.layers.3.kda.dt_bias", "gates mixer all"),
        ("model.layers.3.kda.f_b_proj.weight", "gates mixer all"),
        ("model.layers.3.kda.b_proj.weight", "gates mixer all"),
        ("model.layers.3.kda.g_b_proj.bias", "output_gate mixer all"),
        ("model.layers.3.kda.o_norm", "o_norm mixer all"),
        ("model.layers.3.kda.k_proj.base_layer.weight", "k mixer all"),
        ("model.layers.3.kda.k_proj.lora_A.default.weight", "lora"),
        ("model.layers.4.self_attn.k_proj.weight", "attention all"),
        ("model.layers.4.self_attn.q_norm.weight", "attention all"),
        ("model.layers.5.self_attn.k_proj.bias", "k mixer all"),
        ("model.layers.5.self_attn.q_norm.weight", "q mixer all"),
        ("model.layers.4.mlp.down_proj.weight", "mlp all"),
        ("model.layers.4.mlp.down_proj.base_layer.weight", "mlp all"),
        ("model.layers.4.mlp.down_proj.lora_B.default.weight", "lora"),
        ("model.layers.4.input_layernorm.weight", "norms all"),
        ("model.layers.4.post_attention_layernorm.weight", "norms all"),
        ("model.norm.weight", "norms all"),
        ("model.embed_tokens.weight", "embeddings all"),
        ("lm_head.weight", "head all"),
    ],
)
def test_a_parameters_groups_are_those_of_its_role(name: str, groups: str) -> None:
    assert group_of(name, mixers={5}) == set(groups.split())


@pytest.mark.parametrize("mixer", ["kda", "softmax", "same"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_group_and_the_whole_groups_share_none(family: str, mixer: str) -> None:
    model = student(family, mixer=mixer)
    names = [name for name, _ in model.named_parameters()]
    assert list(trained(model, ["all"])) == names
    whole = ["attention", "mlp", "norms", "embeddings", "head"] + ["mixer"] * (mixer != "same")
    assert list(trained(model, whole)) == names
    tied = model.config.tie_word_embeddings
    apart = [group for group in whole if not tied or group not in ("embeddings", "head")]
    parts = [set(trained(model, [group])) for group in apart]
    parts += [set(trained(model, ["embeddings", "head"]))] if tied else []
    assert sum(map(len, parts)) == len(names), "no parameter is in two of them"
    if mixer != "same":
        fine = ["q", "k", "v", "o"] + ["conv", "gates", "output_gate", "o_norm"] * (mixer == "kda")
        assert sum(len(trained(model, [part])) for part in fine) == len(trained(model, ["mixer"]))


def test_mixers_are_the_layers_that_are_not_kept() -> None:
    for mixer, layers in (("kda", {0, 2}), ("softmax", {0, 2}), ("same", set())):
        assert mixer_layers(student(mixer=mixer)) == layers


def step(model: Any, chosen: dict[str, torch.nn.Parameter]) -> None:
    model(X).logits.square().mean().backward()
    assert {name for name, one in model.named_parameters() if one.grad is not None} <= set(chosen)
    torch.optim.SGD(chosen.values(), lr=0.1).step()


@pytest.mark.parametrize("groups", [["q", "conv"], ["mixer", "mlp", "norms"], ["attention"], ["lora"]])
def test_a_step_changes_the_groups_trained_and_the_hashes_prove_it(groups: list[str]) -> None:
    model = student(lora=Lora(rank=2, on=("attention",)))
    with torch.no_grad():  # a factor of zeros would leave its partner without a gradient
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    chosen = freeze(model, groups)
    everything, frozen = frozen_hashes(model, ()), frozen_hashes(model, chosen)
    assert everything.keys() - frozen.keys() == chosen.keys()
    step(model, chosen)
    check_frozen(frozen, frozen_hashes(model, chosen))
    after = frozen_hashes(model, ())
    changed = {name for name in everything if after[name] != everything[name]}
    assert changed == set(chosen)


def test_one_element_of_a_frozen_tensor_or_a_buffer_is_found() -> None:
    model = student(dtype="bfloat16")
    model.model.register_buffer("table", torch.zeros(3))
    model.model.register_buffer("scratch", torch.zeros(3), persistent=False)
    before = frozen_hashes(model, trained(model, ["mixer"]))
    assert "model.table" in before and "model.scratch" not in before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 0.01
        model.model.table[0] = 1
    with pytest.raises(ValueError, match=r"2 of .* changed .*model\.table.*model\.layers\.1\.mlp\.up_proj\.weight"):
        check_frozen(before, frozen_hashes(model, trained(model, ["mixer"])))


def test_a_tied_head_is_hashed_and_trained_once_under_the_name_of_the_embeddings() -> None:
    model = student("qwen3")
    assert model.config.tie_word_embeddings
    assert list(trained(model, ["head", "embeddings"])) == ["model.embed_tokens.weight"]
    assert "lm_head.weight" not in frozen_hashes(model, ())
    for alone in ("head", "embeddings"):
        with pytest.raises(ValueError, match=f"'{alone}', but this model's head and embeddings are one tensor"):
            trained(model, [alone, "mlp"])


def test_a_group_that_the_model_lacks_is_told_with_those_it_has() -> None:
    with pytest.raises(
        ValueError, match="'conv', which holds no parameter of this model: it has q, k, v, o, mixer, at"
    ):
        trained(student(mixer="softmax"), ["q", "conv"])
    with pytest.raises(ValueError, match="'lora', which holds no parameter"):
        freeze(student(), ["lora"])
    with pytest.raises(ValueError, match="'qk': expected groups of q, k"):
        trained(student(), ["qk"])


def test_weight_decay_is_of_matrices_that_multiply() -> None:
    model = student("qwen2", lora=Lora(rank=2))
    without = {name for name, one in model.named_parameters() if not decays(name, one)}
    ends = {name.removeprefix("model.layers.").split(".", 1)[-1] for name in without}
    biases = {f"{kind}.{part}_proj.bias" for kind in ("kda", "self_attn") for part in "qkv"}
    biases = biases - {f"self_attn.{part}_proj.bias" for part in "qkv"}
    biases |= {f"self_attn.{part}_proj.base_layer.bias" for part in "qkv"} | {"kda.g_b_proj.bias"}
    own = {f"kda.{part}" for part in ("A_log", "dt_bias", "o_norm", "q_conv", "k_conv", "v_conv")}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"}
    assert ends == biases | own | norms | {"embed_tokens.weight"}


def test_the_mixers_rate_goes_to_mixers_and_to_their_adapters_alone() -> None:
    model = student(lora=Lora(rank=2, on=("mixer", "attention", "mlp")))
    fast = {name for name, _ in model.named_parameters() if is_mixer(name, mixer_layers(model))}
    assert fast == {name for name, _ in model.named_parameters() if ".kda." in name}
    control = student(mixer="softmax")
    fast = {name for name, _ in control.named_parameters() if is_mixer(name, mixer_layers(control))}
    assert fast == {name for name in dict(control.named_parameters()) if "0.self_attn" in name or "2.self_attn" in name}
