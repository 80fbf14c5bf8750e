"""The configuration of a Hybrid-KDA model: its teacher's own fields, and what replaces attention in which layers."""

from dataclasses import fields
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from models.remote import AUTO_MAP

TEACHER_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
LINEAR = "linear_attention"
"""transformers' name for a layer with a recurrent state, KDA here; every other type is the teacher's own."""
KEPT_TYPES = ("full_attention", "sliding_attention")


class HybridKDAConfig(PretrainedConfig):  # type: ignore[misc]
    """The teacher's fields (``hidden_size``, ``rope_parameters``, ...) by their own names, with its defaults, and:

    teacher_type: "llama", "qwen2" or "qwen3". layer_types: one a layer, "linear_attention" (KDA) or the teacher's own;
    all layers are kept by default. kda_heads, kda_kv_heads, kda_head_dim: the teacher's by default; a k/v head serves
    kda_heads / kda_kv_heads heads. kda_gate: "bounded" (log-decay above kda_lower_bound) or "softplus".
    kda_conv_size: taps of the short convolution. kda_output_gate: whether a gate scales each layer's output.
    kda_rope: rotate q and k in KDA layers as in the teacher's attention.

    Raises ValueError naming the field, what was found, and what is expected.
    """

    model_type = "hybrid_kda"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    teacher_type: str = "llama"
    layer_types: list[str] | None = None
    kda_heads: int | None = None
    kda_kv_heads: int | None = None
    kda_head_dim: int | None = None
    kda_gate: str = "bounded"
    kda_lower_bound: float = -5.0
    kda_conv_size: int = 4
    kda_output_gate: bool = True
    kda_rope: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.teacher_type not in TEACHER_CONFIGS:
            raise ValueError(f"teacher_type is {self.teacher_type!r}: expected one of {', '.join(TEACHER_CONFIGS)}")
        common = {field.name for field in fields(PretrainedConfig)}
        own = TEACHER_CONFIGS[self.teacher_type]
        named = {field.name for field in fields(own)} - common
        given = {name: kwargs.pop(name) for name in (*named, "rope_theta", "rope_scaling") if name in kwargs}
        given["layer_types"] = None  # the teacher's own types: its check does not know the mixture
        teacher = own(**given)
        for name in named - {"layer_types"}:
            setattr(self, name, getattr(teacher, name))
        if not getattr(self, "head_dim", None):
            self.head_dim = self.hidden_size // self.num_attention_heads
        for name, default in (
            ("layer_types", types_of(teacher)),
            ("kda_heads", self.num_attention_heads),
            ("kda_kv_heads", self.num_key_value_heads),
            ("kda_head_dim", self.head_dim),
        ):
            if getattr(self, name) is None:
                setattr(self, name, default)
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        self._check(types_of(teacher))

    @classmethod
    def from_teacher(cls, teacher: PretrainedConfig, keep: Any, **options: Any) -> "HybridKDAConfig":
        """The configuration of a student of ``teacher`` that keeps attention in the layers ``keep`` (numbers from 0).

        ``options`` are this class's fields. Raises ValueError for a teacher of another family or a layer it lacks.
        """
        check_family(teacher)
        keep, layers = list(keep), teacher.num_hidden_layers
        if wrong := [layer for layer in keep if not 0 <= layer < layers]:
            raise ValueError(f"keep names layer {wrong[0]}: the teacher's {layers} layers are 0 to {layers - 1}")
        if double := [layer for layer in keep if keep.count(layer) > 1]:
            raise ValueError(f"keep names layer {double[0]} twice: expected each layer once")
        types = [own if i in keep else LINEAR for i, own in enumerate(types_of(teacher))]
        named = teacher.to_dict()
        for name in ("model_type", "architectures", "layer_types", "auto_map", "transformers_version"):
            named.pop(name, None)
        return cls(**{**named, "teacher_type": teacher.model_type, "layer_types": types, **options})

    @property
    def kda_layers(self) -> list[int]:
        """The layers (from 0) whose mixer is KDA."""
        return [i for i, kind in enumerate(self.layer_types or ()) if kind == LINEAR]

    @property
    def kept_layers(self) -> list[int]:
        """The layers (from 0) that are the teacher's own."""
        return [i for i, kind in enumerate(self.layer_types or ()) if kind != LINEAR]

    def to_diff_dict(self) -> dict[str, Any]:
        """Every field of the model is written: defaults may change with transformers, a saved student must not."""
        common = {field.name for field in fields(PretrainedConfig)} | {"_name_or_path"}
        model = {name: value for name, value in self.to_dict().items() if name not in common}
        return {**model, **super().to_diff_dict()}

    def _check(self, own_types: list[str]) -> None:
        types, layers = self.layer_types or [], self.num_hidden_layers
        if len(types) != layers:
            raise ValueError(f"layer_types has {len(types)} entries: expected {layers}, one a layer")
        for i, kind in enumerate(types):
            if kind not in (LINEAR, *KEPT_TYPES):
                raise ValueError(f"layer_types[{i}] is {kind!r}: expected {LINEAR} or {' or '.join(KEPT_TYPES)}")
            if kind not in (LINEAR, own_types[i]):
                raise ValueError(f"layer_types[{i}] is {kind!r}: the teacher's layer {i} is {own_types[i]!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}: "
                f"expected a divisor of num_attention_heads ({self.num_attention_heads})"
            )
        heads, kv_heads = self.kda_heads or 0, self.kda_kv_heads or 0
        for name, number in (
            ("kda_heads", heads),
            ("kda_kv_heads", kv_heads),
            ("kda_head_dim", self.kda_head_dim or 0),
        ):
            if number < 1:
                raise ValueError(f"{name} is {number}: expected 1 or more")
        if heads % kv_heads:
            raise ValueError(f"kda_kv_heads is {kv_heads}: expected a divisor of kda_heads ({heads})")
        if self.kda_gate not in ("bounded", "softplus"):
            raise ValueError(f"kda_gate is {self.kda_gate!r}: expected bounded or softplus")
        if not self.kda_lower_bound < 0:
            raise ValueError(f"kda_lower_bound is {self.kda_lower_bound}: expected a log-decay below 0, e.g. -5.0")
        if self.kda_conv_size < 2:
            raise ValueError(f"kda_conv_size is {self.kda_conv_size}: expected 2 taps or more")
        if self.kda_rope and self.kda_head_dim != self.head_dim:
            raise ValueError(
                f"kda_head_dim is {self.kda_head_dim}: expected the teacher's {self.head_dim} where kda_rope is on"
            )


def check_family(teacher: PretrainedConfig) -> None:
    """ValueError for a teacher of another family."""
    if teacher.model_type not in TEACHER_CONFIGS:
        raise ValueError(
            f"the teacher is of the family {teacher.model_type!r}: expected one of {', '.join(TEACHER_CONFIGS)}"
        )


def types_of(teacher: PretrainedConfig) -> list[str]:
    """The teacher's own kind of attention in each layer."""
    return list(getattr(teacher, "layer_types", None) or ["full_attention"] * teacher.num_hidden_layers)
