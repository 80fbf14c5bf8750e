"""Packed checkpoints told from their files: the model is the one that is loaded, and what lacks weights is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from models.load import load
from models.quantise import quantise
from models.served import load_served
from models.unloaded import describe_packed
from tests.tiny import tiny_qwen3, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module", params=["int4", "w8a8"])
def copy(
    request: pytest.FixtureRequest,
    compressed_tensors: None,
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("copies") / str(request.param)
    quantise(str(tiny_folder), out, str(request.param))
    return out


@pytest.fixture
def mine(copy: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(copy, tmp_path / "mine"))


def identity(folder: Path | str) -> str:
    found = describe_packed(str(folder), "run by K")
    assert found is not None
    return found.identity


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_shards(folder: Path) -> list[Path]:
    """The weights in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {name: files[i % 2].name for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if places[name] == file.name}, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return files


def test_it_is_described_as_when_it_is_loaded(copy: Path, tiny_folder: Path) -> None:
    loaded, found = load(str(copy)), describe_packed(str(copy), "run by K")
    assert found is not None and found.quantisation is not None and loaded.quantisation is not None
    alike = {name for name in found.parts if found.parts[name] == loaded.parts[name]}
    assert alike == {"config", "tokenizer", "end_tokens", "chat_template"}
    assert (found.parameters, found.dtype, found.checkpoint) == (loaded.parameters, loaded.dtype, loaded.checkpoint)
    assert found.quantisation.config == loaded.quantisation.config
    assert found.quantisation.size == loaded.quantisation.size == (copy / "model.safetensors").stat().st_size
    assert json.loads(found.parts["quantisation"])["kernel"] == "run by K"
    assert describe_packed(str(tiny_folder), "run by K") is None, "a plain one"


def test_a_weight_makes_another_model_and_files_beside_it_do_not(copy: Path, mine: Path) -> None:
    save_file({"lora": torch.zeros(2)}, mine / "adapter_model.safetensors")
    assert identity(mine) == identity(copy)
    in_shards(mine)
    assert identity(mine) == identity(copy), "in shards it is the same"
    shutil.copy(copy / "model.safetensors", mine)
    (mine / "model.safetensors.index.json").unlink()
    rewrite(mine, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert identity(mine) != identity(copy)


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.0.input_layernorm.weight", HEAD])
def test_a_plain_weight_that_is_lost_is_told(lost: str, mine: Path) -> None:
    rewrite(mine, lambda tensors: tensors.pop(lost))
    with pytest.raises(ValueError, match=rf"lacks 1 of its weights \({lost}\); download or save it again"):
        identity(mine)


def test_a_packed_weight_that_is_lost_is_told_though_its_scales_are_there(mine: Path) -> None:
    layer = "model.layers.1.mlp.down_proj"

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        lost = [name for name in tensors if name in (f"{layer}.weight", f"{layer}.weight_packed")]
        assert len(lost) == 1 and f"{layer}.weight_scale" in tensors
        del tensors[lost[0]]
        tensors[f"{layer}.weight_scale"] = tensors[f"{layer}.weight_scale"].bfloat16()

    rewrite(mine, lose)
    with pytest.raises(ValueError, match=rf"lacks 1 of its weights \({layer}\.weight\)"):
        identity(mine)


def test_a_shard_that_is_lost_is_told(mine: Path) -> None:
    in_shards(mine)[1].unlink()
    with pytest.raises(ValueError, match=r"lists model-00002-of-00002\.safetensors, which is not there") as error:
        identity(mine)
    assert "\n" not in str(error.value)


def test_a_tied_head_may_be_stored_or_left_out(compressed_tensors: None, tmp_path: Path) -> None:
    tiny_qwen3(400).save_pretrained(tmp_path / "tied")
    tiny_tokenizer().save_pretrained(tmp_path / "tied")
    quantise(str(tmp_path / "tied"), tmp_path / "copy", "int4")
    assert HEAD not in load_file(tmp_path / "copy" / "model.safetensors")
    before = identity(tmp_path / "copy")
    rewrite(tmp_path / "copy", lambda tensors: tensors.update({HEAD: tensors[EMBEDDINGS].clone()}))
    assert identity(tmp_path / "copy") == before
    rewrite(tmp_path / "copy", lambda tensors: (tensors.pop(HEAD), tensors.pop(EMBEDDINGS)))
    with pytest.raises(ValueError, match=r"lacks .* of its weights \(lm_head|lacks .* of its weights \(model\.embed"):
        identity(tmp_path / "copy")


def test_names_that_transformers_has_changed_since_are_known(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert any("experts.1.w1" in name for name in load_file(tmp_path / "model.safetensors")), "as they were once"
    known = json.loads((tmp_path / "config.json").read_text())
    known["quantization_config"] = {"quant_method": "some-8", "bits": 8}
    (tmp_path / "config.json").write_text(json.dumps(known))
    assert identity(tmp_path)
    rewrite(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "experts" in name])
    with pytest.raises(ValueError, match=r"lacks 2 of its weights \(model\.layers\.0\.mlp\.experts"):
        identity(tmp_path)


def test_a_hub_model_is_the_one_of_its_folder(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cache as the hub's client makes it."""
    generation = json.loads((mine / "generation_config.json").read_text())
    (mine / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [1, 3]}))
    (mine / "evalkit.json").unlink()
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(mine, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = describe_packed("org/tiny", "run by K")
    assert found is not None and found.quantisation is not None
    assert found.identity == identity(mine) and "[1, 3]" in found.parts["end_tokens"]
    loaded = load("org/tiny")
    assert loaded.parts["end_tokens"] == found.parts["end_tokens"]
    assert loaded.quantisation and loaded.quantisation.size == found.quantisation.size > 0


def test_what_is_broken_is_one_line(mine: Path) -> None:
    with pytest.raises(ValueError, match="unknown dtype 'float17': expected auto, float32"):
        describe_packed(str(mine), "run by K", "float17")
    for file, content in (("generation_config.json", b"{bad"), ("config.json", b"{bad"), ("model.safetensors", b"12")):
        whole = (mine / file).read_bytes()
        (mine / file).write_bytes(content)
        with pytest.raises(ValueError, match="could not be loaded: ") as error:
            identity(mine)
        assert "\n" not in str(error.value)
        if file.endswith("json"):
            with pytest.raises(ValueError, match=file):
                load_served(str(mine))
        (mine / file).write_bytes(whole)
    (mine / "model.safetensors").rename(mine / "weights.safetensors")
    with pytest.raises(ValueError, match=r"without model\.safetensors or its index"):
        identity(mine)
