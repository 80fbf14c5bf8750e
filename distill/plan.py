"""What a recipe will cost, before anything starts: parameters, tokens, memory and floating-point operations a stage.

Counts, not measurements: 2 operations for each multiplication and addition of a matrix product; in the backward pass as
many for the gradient that passes through and for that of the weights, each where it is needed; softmax attention over
the causal half of seq_len tokens; KDA's recurrence as 6 x heads x K x V a token (read, correct, write its state:
arXiv:2510.26692). The output head works for targets alone.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from distill.groups import FRESH, is_mixer, mixer_layers, multiplies, trained
from distill.select import keep_layers_of, selection_stage
from distill.stage import ALIGNMENTS, Recipe, Stage
from distill.student import add_lora
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
    flops_a_target: float
    """Of the output heads, beside those a token."""
    memory: float
    """Bytes at least: weights of both models, float32 masters, gradients and moments, one micro-batch's activations."""

    @property
    def flops(self) -> float:
        """At most: where the mask leaves tokens out, fewer are targets."""
        return self.work(self.tokens, self.tokens)

    def work(self, tokens: int, targets: int) -> float:
        """Floating-point operations for so many tokens, of which so many are targets."""
        return self.flops_a_token * tokens + self.flops_a_target * targets


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
    teacher, student = _empty(config), _empty(_student_config(recipe, config))
    first = selection_stage(recipe)
    stages = (
        []
        if first is None
        else [stage_plan(first, teacher, _empty(_student_config(recipe, config, ())), recipe, processes)]
    )
    if recipe.student.lora is not None:
        add_lora(student, recipe.student.lora)
    mixers = mixer_layers(student)
    return Plan(
        teacher_parameters=_size(teacher),
        student_parameters=_size(student),
        kept=tuple(layer for layer in range(config.num_hidden_layers) if layer not in mixers),
        stages=(*stages, *(stage_plan(stage, teacher, student, recipe, processes) for stage in recipe.stages)),
    )


def stage_plan(stage: Stage, teacher: Any, student: Any, recipe: Recipe, processes: int = 1) -> StagePlan:
    """Costs of ``stage``; the models may be empty ones (on the meta device)."""
    chosen = trained(student, stage.train)
    own = sum(p.numel() for p in chosen.values())
    size = DTYPES[recipe.dtype].itemsize
    rows = min(stage.micro_batch or stage.batch, -(-stage.batch // processes))
    models = size * (_size(student) + _size(teacher))
    return StagePlan(
        name=stage.name,
        loss=stage.loss,
        data=stage.data,
        steps=stage.steps,
        tokens=stage.steps * stage.batch * stage.seq_len,
        trained=own,
        flops_a_token=flops_a_token(stage, teacher, student, chosen),
        flops_a_target=flops_a_target(stage, student, chosen),
        memory=models + (4 * 4 + size) * own + rows * stage.seq_len * _activations(stage, student, size),
    )


def flops_a_token(stage: Stage, teacher: Any, student: Any, chosen: Mapping[str, nn.Parameter]) -> float:
    """Of ``stage`` for one token, output heads left out; ``chosen``: what is trained."""
    T, mixers = stage.seq_len, mixer_layers(student)
    own = float(sum(2 * p.numel() for name, p in chosen.items() if "layers." in name and multiplies(name, p)))
    show = 0.0 if stage.loss == "ce" else 2 * _matrices(teacher) + _mixing(teacher, T)
    if stage.loss == "align-qk":
        parts = ("q_proj", "k_proj", "q_conv", "k_conv")
        again = 2 * _matrices(teacher, mixers, parts[:2])
        return show + again + 2 * _matrices(student, mixers, parts) + 2 * _matrices(student, mixers, parts[2:]) + own
    if stage.loss == "align-block":
        # The layer's input needs no gradient: only what lies behind the first projections passes one through.
        behind = ("o_proj", "f_b_proj", "g_b_proj", "_conv")
        through = 2 * _matrices(student, mixers, behind)
        return show + 2 * _matrices(student, mixers) + through + 3 * _mixing(student, T, mixers) + own
    return show + 4 * _matrices(student) + 3 * _mixing(student, T) + own


def flops_a_target(stage: Stage, student: Any, chosen: Mapping[str, nn.Parameter]) -> float:
    """Of the output heads for one target: logits of both models, and the gradient through the student's."""
    if stage.loss in ALIGNMENTS:
        return 0.0
    head = student.get_output_embeddings().weight
    own = any(p is head for p in chosen.values())
    passes = 2 + own + (stage.loss != "ce")
    return float(2 * passes * student.config.vocab_size * student.config.hidden_size)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak; None where it isn't known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _empty(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _student_config(recipe: Recipe, config: Any, kept: tuple[int, ...] | None = None) -> Any:
    """kept: layers, instead of the recipe's rule."""
    check_family(config)
    number, layers = keep_layers_of(recipe.student.keep), config.num_hidden_layers
    if recipe.student.mixer != "kda":
        config = copy.deepcopy(config)
        own = range(layers) if recipe.student.mixer == "same" else keep_layers(recipe.student.keep, layers)
        setattr(config, FRESH, [layer for layer in range(layers) if layer not in own])
        return config
    if kept is None:
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


def _matrices(model: Any, layers: Collection[int] | None = None, parts: Collection[str] = ()) -> float:
    """Parameters that multiply, the head and embeddings left out; of the mixers of ``layers``, of ``parts`` alone."""
    return float(
        sum(
            p.numel()
            for name, p in model.named_parameters()
            if "layers." in name
            and multiplies(name, p)
            and (layers is None or is_mixer(name, layers))
            and (not parts or any(part in name for part in parts))
        )
    )


def _mixing(model: Any, tokens: int, layers: Collection[int] | None = None) -> float:
    """What attention (over ``tokens``) and recurrence do with one token beside projections, in ``layers`` or all."""
    config = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    where = range(config.num_hidden_layers) if layers is None else layers
    linear = getattr(config, "kda_layers", ())
    return float(sum(heads * width * (6 * width if layer in linear else 2 * tokens) for layer in where))


def _activations(stage: Stage, model: Any, size: int) -> float:
    """Bytes that a token's activations take until its backward pass, about: what a decoder layer keeps, in elements."""
    config = model.config
    layer = 18 * config.hidden_size + 4 * config.intermediate_size
    return float(size * layer * (1 if stage.loss in ALIGNMENTS else config.num_hidden_layers))
