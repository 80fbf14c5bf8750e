"""The shapes of a teacher and of its hybrid: built-in tables, a model's own configuration, or a JSON file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from models.bench.arguments import check_names
from models.hybrid_config import TEACHER_CONFIGS, HybridKDAConfig, types_of
from models.kept import PRESETS, keep_layers
from models.load import resolve


def _shape(
    family: str, layers: int, hidden: int, mlp: int, heads: tuple[int, int, int], vocab: int, theta: float, tied: bool
) -> dict[str, Any]:
    """heads: of queries, of keys and values, and their width."""
    return {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocab,
        "rope_theta": theta,
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _shape("llama", 30, 576, 1536, (9, 3, 64), 49152, 1e5, True),
    "smollm2-360m": _shape("llama", 32, 960, 2560, (15, 5, 64), 49152, 1e5, True),
    "llama-3.2-1b": _shape("llama", 16, 2048, 8192, (32, 8, 64), 128256, 5e5, True),
    "qwen2.5-0.5b": _shape("qwen2", 24, 896, 4864, (14, 2, 64), 151936, 1e6, True),
    "qwen3-0.6b": _shape("qwen3", 28, 1024, 3072, (16, 8, 128), 151936, 1e6, True),
    "qwen3-1.7b": _shape("qwen3", 28, 2048, 6144, (16, 8, 128), 151936, 1e6, True),
    "qwen3-4b": _shape("qwen3", 36, 2560, 9728, (32, 8, 128), 151936, 1e6, True),
    "qwen3-8b": _shape("qwen3", 36, 4096, 12288, (32, 8, 128), 151936, 1e6, False),
}
"""From the models' published configurations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A teacher and its hybrid, by configuration."""

    name: str
    teacher: PretrainedConfig
    hybrid: HybridKDAConfig
    note: str = ""
    """What was changed on the way."""


def pair(name: str, teacher: PretrainedConfig, keep: str | None, longest: int, **options: Any) -> Pair:
    """``teacher`` beside its hybrid, both good for ``longest`` positions.

    keep: as `models.kept.keep_layers` reads it; None: the preset of that name if there is one, else uniform, and a
    hybrid's own layers. options: fields of HybridKDAConfig. ValueError for a teacher that can't be measured.
    """
    if isinstance(teacher, HybridKDAConfig):
        kept = [i for i in range(teacher.num_hidden_layers) if i not in teacher.kda_layers]
        options = {f: getattr(teacher, f) for f in _kda_fields()} | {n: v for n, v in options.items() if v is not None}
        teacher = _teacher_of(teacher)
        layers = kept if keep is None else keep_layers(keep, teacher.num_hidden_layers)
    else:
        keep = keep or (name if name in PRESETS else "uniform")
        layers = keep_layers(keep, teacher.num_hidden_layers)
    if not layers:
        raise ValueError(
            f"{name} would keep no attention (keep is {keep!r}): expected a layer or more, since transformers' cache "
            f"counts its tokens there"
        )
    if set(types_of(teacher)) != {"full_attention"}:
        raise ValueError(f"{name} has attention with a sliding window, which this measurement does not cover")
    note = ""
    if (teacher.max_position_embeddings or 0) < longest:
        note = (
            f"{name} is made for {teacher.max_position_embeddings} positions; raised to {longest} for both sides, "
            f"since the time does not depend on what the positions mean"
        )
        teacher.max_position_embeddings = longest
    options = {field: value for field, value in options.items() if value is not None}
    hybrid = HybridKDAConfig.from_teacher(teacher, layers, **options)
    return Pair(name=name, teacher=teacher, hybrid=hybrid, note=note)


def named_shape(name: str) -> PretrainedConfig:
    check_names("shape", [name], SHAPES)
    return _config(name, SHAPES[name])


def config_of_model(name: str) -> PretrainedConfig:
    """Of a hub id, a model folder or a built-in model."""
    source = resolve(name)
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:  # transformers and the hub each raise types of their own
        raise ValueError(
            f"model {name!r} has no readable configuration: {' '.join(str(error).split())[:300]}"
        ) from error
    _check_family(name, config.model_type)
    return config


def config_from_file(file: Path) -> PretrainedConfig:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"config {file} can't be read as JSON: {error}") from error
    if not isinstance(known, dict) or "model_type" not in known:
        raise ValueError(f"config {file} has no model_type: expected a model's config.json")
    return _config(str(file), known)


def _config(name: str, known: dict[str, Any]) -> PretrainedConfig:
    fields = dict(known)
    family = fields.pop("model_type")
    _check_family(name, family)
    kind = HybridKDAConfig if family == HybridKDAConfig.model_type else TEACHER_CONFIGS[family]
    try:
        return kind(**fields)
    except Exception as error:  # transformers checks fields with exceptions of its own
        raise ValueError(f"the configuration of {name} is not valid: {' '.join(str(error).split())[:300]}") from error


def _check_family(name: str, family: str) -> None:
    families = [*TEACHER_CONFIGS, HybridKDAConfig.model_type]
    if family not in families:
        raise ValueError(f"{name} is of the family {family!r}: expected one of {', '.join(families)}")


def _kda_fields() -> list[str]:
    return [name for name in HybridKDAConfig.__annotations__ if name.startswith("kda_")]


def _teacher_of(hybrid: HybridKDAConfig) -> PretrainedConfig:
    """The configuration of the model that ``hybrid`` was made from."""
    own = TEACHER_CONFIGS[hybrid.teacher_type]
    known = hybrid.to_dict()
    for name in ("model_type", "architectures", "layer_types", "auto_map", "teacher_type", *_kda_fields()):
        known.pop(name, None)
    return own(**known)
