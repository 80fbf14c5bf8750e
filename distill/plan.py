"""What a recipe will cost, before anything starts: parameters, tokens, memory and floating-point operations a stage.

Counts, not measurements: 2 operations for each multiplication and addition of a matrix product; twice the forward's for
a backward pass (once where weights are frozen but gradients pass through); softmax attention's own products over
seq_len tokens; KDA's recurrence as 6 x heads x K x V a token (read, correct, write its state: arXiv:2510.26692).
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.groups import mixer_layers, trained
from distill.select import keep_layers_of
from distill.stage import ALIGNMENTS, Recipe, Stage
from models.hybrid_config import HybridKDAConfig, check_family
from models.kept import keep_layers
from models.load import DTYPES, resolve

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bfloat16 FLOP/s by the vendors' data sheets (SXM), by a part of the device's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage's costs."""

    name: str
    loss: str
    data: str
    steps: int
    tokens: int
    trained: int
    """Parameters."""
    flops_a_token: float
    memory: float
    """Bytes at least: weights of both models, float32 masters, gradients and moments, one micro-batch's activations."""

    @property
    def flops(self) -> float:
        return self.flops_a_token * self.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A recipe's costs."""

    teacher_parameters: int
    student_parameters: int
    kept: tuple[int, ...]
    stages: tuple[StagePlan, ...]

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages)


def make_plan(recipe: Recipe, processes: int = 1) -> Plan:
    """From the teacher's configuration alone: no weights are read."""
    config = AutoConfig.from_pretrained(resolve(recipe.teacher))
    teacher = _empty(config)
    student_config = _student_config(recipe, config)
    student = _empty(student_config)
    stages = [stage_plan(stage, teacher, student, recipe, processes) for stage in recipe.stages]
    return Plan(
        teacher_parameters=_size(teacher),
        student_parameters=_size(student),
        kept=tuple(getattr(student_config, "kept_layers", range(config.num_hidden_layers))),
        stages=tuple(stages),
    )


def stage_plan(stage: Stage, teacher: Any, student: Any, recipe: Recipe, processes: int = 1) -> StagePlan:
    """Costs of ``stage``; the models may be empty ones (on the meta device)."""
    lora = recipe.student.lora
    groups = [group for group in stage.train if group != "lora"]
    mixers = mixer_layers(student)
    if recipe.student.mixer == "softmax" and not mixers:  # an empty model isn't marked as a control yet
        kept = keep_layers(recipe.student.keep, student.config.num_hidden_layers)
        mixers = frozenset(range(student.config.num_hidden_layers)) - frozenset(kept)
    own = sum(p.numel() for p in trained(student, groups, mixers).values()) if groups else 0
    if "lora" in stage.train and lora is not None:
        own += _lora_size(student, lora.rank, lora.on, mixers)
    size = DTYPES[recipe.dtype].itemsize
    rows = min(stage.micro_batch or stage.batch, -(-stage.batch // processes))
    models = size * (_size(student) + (0 if stage.loss == "ce" else _size(teacher)))
    return StagePlan(
        name=stage.name,
        loss=stage.loss,
        data=stage.data,
        steps=stage.steps,
        tokens=stage.steps * stage.batch * stage.seq_len,
        trained=own,
        flops_a_token=flops_a_token(stage, teacher, student, own, len(mixers)),
        memory=models + (4 * 4 + size) * own + rows * stage.seq_len * _activations(stage, student, size),
    )


def flops_a_token(stage: Stage, teacher: Any, student: Any, own: int, mixers: int) -> float:
    """Forward and backward of ``stage`` for one token, ``own`` of the student's parameters trained."""
    show = 0.0 if stage.loss == "ce" else _forward(teacher, stage.seq_len)
    if stage.loss in ALIGNMENTS:
        share = mixers / student.config.num_hidden_layers
        return float(show - _head(teacher) + share * 3 * _attention_weights(student) * 2)
    forward = _forward(student, stage.seq_len)
    return show + 2 * forward + 2 * own


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak; None where it isn't known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _empty(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _student_config(recipe: Recipe, config: Any) -> Any:
    check_family(config)
    if recipe.student.mixer != "kda":
        return config
    number, layers = keep_layers_of(recipe.student.keep), config.num_hidden_layers
    kept = tuple(range(number)) if number else keep_layers(recipe.student.keep, layers)
    return HybridKDAConfig.from_teacher(
        config,
        kept,
        kda_gate=recipe.student.gate,
        kda_conv_size=recipe.student.conv_size,
        kda_output_gate=recipe.student.output_gate,
        kda_rope=recipe.student.rope,
    )


def _size(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _lora_size(model: Any, rank: int, on: tuple[str, ...], mixers: frozenset[int]) -> int:
    total = 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or "layers." not in name:
            continue
        layer = int(name.partition("layers.")[2].partition(".")[0])
        kind = "mlp" if ".mlp." in name else "mixer" if layer in mixers else "attention"
        if kind in on and name.rpartition(".")[2] not in ("f_a_proj", "f_b_proj", "b_proj", "g_a_proj", "g_b_proj"):
            total += rank * (module.in_features + module.out_features)
    return total


def _head(model: Any) -> float:
    return float(2 * model.config.hidden_size * model.config.vocab_size)


def _attention_weights(model: Any) -> float:
    parts = (".self_attn.", ".kda.")
    return float(sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in parts)))


def _forward(model: Any, tokens: int) -> float:
    """Of one token among ``tokens``, the output head included."""
    config = model.config
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name)
    heads, width = config.num_attention_heads, getattr(config, "head_dim", None)
    width = width or config.hidden_size // heads
    linear = len(getattr(config, "kda_layers", ()))
    softmax = config.num_hidden_layers - linear
    mixing = softmax * 2 * heads * width * tokens + linear * 6 * heads * width**2
    return float(2 * matrices + mixing + _head(model))


def _activations(stage: Stage, model: Any, size: int) -> float:
    """Bytes that a token's activations take until its backward pass, about: what a decoder layer keeps, in elements."""
    config = model.config
    layer = 18 * config.hidden_size + 4 * config.intermediate_size
    return float(size * layer * (1 if stage.loss in ALIGNMENTS else config.num_hidden_layers))
