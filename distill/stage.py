"""What a distillation is, as data: a recipe of stages over named mixtures of sources; distill/train.py runs any.

After GenDistill (arXiv:2603.26556): align-qk, align-block, distill, instruct. A recipe is a YAML file
(distill/recipes/); distill/recipe.py reads it.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

LossName = Literal["align-qk", "align-block", "forward-kl", "reverse-kl", "jensen-shannon", "top-k-kl", "kl-ce", "ce"]
ALIGNMENTS = ("align-qk", "align-block")
"""Losses on one layer at a time, each given the teacher's own hidden states."""
MaskName = Literal["all", "completion", "completion-eos"]
GROUPS = (
    *("q", "k", "v", "o", "conv", "gates", "output_gate", "o_norm"),
    *("mixer", "attention", "mlp", "norms", "embeddings", "head", "lora", "all"),
)
"""Names of groups of parameters; distill/groups.py says which tensors each holds."""


def _number(value: Any) -> Any:
    """4M, 500k or 1.5B: tokens as people write them."""
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMB]?)\s*", value)):
        return round(float(found[1]) * {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}[found[2]])
    return value


Tokens = Annotated[int, BeforeValidator(_number)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Strict):
    """Where examples come from: exactly one of text, chat, hub, task."""

    text: tuple[str, ...] = ()
    """Files of plain text: .txt (one document), .jsonl or .jsonl.gz (a field ``text`` each line); glob patterns, too.
    "own" stands for the text that evalkit ships."""
    chat: tuple[str, ...] = ()
    """Files of .jsonl or .jsonl.gz whose lines have ``messages`` (role, content); "own" likewise."""
    hub: str = ""
    """A data set of the Hugging Face hub, or a local copy's folder: rows with ``messages``, or with ``field``."""
    task: str = ""
    """A registered benchmark's pool (its TRAIN split), each item asked in ``views`` as evalkit asks it; never the
    reported split."""
    views: tuple[str, ...] = ()
    chat_share: Fraction = 0.0
    """task: the share of items (by hash) that is put through the chat template, as ``--chat`` does."""
    exclude: tuple[str, ...] = ()
    """Patterns of file names to leave out of text or chat."""
    config: str = ""
    split: str = "train"
    field: str = "text"
    revision: str | None = None
    streaming: bool = False
    """hub: read on the way, shuffled within a buffer, instead of as a whole."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the mixture's tokens, relative to its other sources."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Source":
        kinds = [name for name in ("text", "chat", "hub", "task") if getattr(self, name)]
        if len(kinds) != 1:
            raise ValueError(f"a source has {' and '.join(kinds) or 'none'} of text, chat, hub, task: expected one")
        if self.task and not self.views:
            raise ValueError(f"the source of task {self.task!r} names no views, e.g. views: [open, cot]")
        return self

    @property
    def label(self) -> str:
        return self.hub or self.task or ", ".join((*self.text, *self.chat))


class Stage(Strict):
    """One stage: its loss, what is trained, on what, for how long."""

    name: str
    loss: LossName
    train: tuple[Literal[GROUPS], ...]  # type: ignore[valid-type]
    """Groups of parameters that are trained; all others are frozen, and hashed to prove it."""
    data: str
    """A mixture of the recipe."""
    tokens: Annotated[Tokens, Field(gt=0)]
    """Tokens of input in all, padding left out of account; the last step is the one that reaches it."""
    seq_len: Annotated[int, Field(ge=8)]
    batch: Annotated[int, Field(ge=1)]
    """Rows of ``seq_len`` tokens a step, over all processes and accumulated micro-batches."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Rows at once on one process; by default ``batch`` over the processes."""
    mask: MaskName = "all"
    """Which tokens are targets in chats: all, the assistant's, or the assistant's and the end of their turn. Text
    without turns is a target throughout."""
    prompt_weight: Fraction = 0.0
    """Weight of the tokens that ``mask`` leaves out."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate of the mixers and of everything that ``lr_rest`` does not cover."""
    lr_rest: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of what isn't a mixer; by default ``lr``."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """wsd: warm-up, stable, decay (linear, over the last ``decay`` of the steps)."""
    warmup: Fraction = 0.0
    """Of the stage's steps, linear from 0."""
    decay: Fraction = 0.1
    final_lr: Fraction = 0.0
    """Of the peak, at the end of cosine and wsd."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of matrices alone: not of A_log, dt_bias, norms, biases, convolutions."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of teacher and student in the KL losses; the loss is multiplied by its square."""
    alpha: Annotated[float, Field(ge=0)] = 0.0
    """kl-ce: weight of the cross-entropy."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """jensen-shannon: weight of the teacher in the mixture."""
    k: Annotated[int, Field(ge=1)] = 64
    """top-k-kl: the teacher's likeliest tokens that are told apart; the rest is one bin."""

    @model_validator(mode="after")
    def _fits(self) -> "Stage":
        if self.loss in ALIGNMENTS and set(self.train) - MIXER_GROUPS:
            wrong = ", ".join(sorted(set(self.train) - MIXER_GROUPS))
            raise ValueError(f"{self.loss} reaches the mixers alone, but {wrong} would be trained")
        if self.loss == "align-qk" and set(self.train) - {"q", "k", "conv"}:
            raise ValueError(f"align-qk gives a gradient to q, k and conv alone, but trains {', '.join(self.train)}")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps of a full batch: as many as reach ``tokens``."""
        return -(-self.tokens // (self.batch * self.seq_len))


MIXER_GROUPS = {"q", "k", "v", "o", "conv", "gates", "output_gate", "o_norm", "mixer"}


class Lora(Strict):
    """Low-rank adapters (LoRA, arXiv:2106.09685) on linear layers whose own weights stay."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is (alpha / rank) B A."""
    on: tuple[Literal["attention", "mixer", "mlp"], ...] = ("attention", "mlp")


class Student(Strict):
    """How the teacher becomes the student that the first stage trains."""

    mixer: Literal["kda", "softmax", "same"] = "kda"
    """What replaces attention where it isn't kept: KDA; freshly initialised softmax attention (a control); "same": all
    attention stays, and the student is a copy of the teacher (fine-tuning)."""
    keep: str = "uniform"
    """Layers whose attention stays: as `evalkit convert --keep`, or "kl-restore:N" (arXiv:2512.20569)."""
    gate: Literal["bounded", "softplus"] = "bounded"
    conv_size: Annotated[int, Field(ge=2)] = 4
    output_gate: bool = True
    rope: bool = False
    lora: Lora | None = None
    start: str = ""
    """A model folder of the same architecture, or an earlier run's folder (its last checkpoint), whose weights the
    student begins with: runs that share their alignment need it once."""
    select_tokens: Tokens = 0
    """kl-restore: tokens of align-block training before the layers are compared."""


class Guard(Strict):
    """Evaluation by generation while training, on items of a TRAIN split that no stage is trained on."""

    tasks: tuple[str, ...] = ()
    view: str | None = None
    items: Annotated[int, Field(ge=1)] = 64
    every: Annotated[Tokens, Field(gt=0)] = 2_000_000


class Ship(Strict):
    """A delta checkpoint beside the last one, small enough to be kept in a repository."""

    encoding: dict[str, str] = {}
    """Pattern of tensor names -> "full", "int8" or "lowrank:RANK", as models.delta.save_delta takes it."""
    file_mib: Annotated[float, Field(gt=0)] = 15.0


class Recipe(Strict):
    """A teacher, a student, mixtures of data, and stages."""

    name: str
    teacher: str
    student: Student = Student()
    data: dict[str, tuple[Source, ...]]
    """Named mixtures."""
    stages: tuple[Stage, ...]
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What forward and backward compute in; masters and optimiser are float32."""
    guard: Guard = Guard()
    ship: Ship | None = None
    axes: dict[str, str] = {}
    """Words for the axes that an ablation varies, copied into every checkpoint's evalkit.json."""

    @model_validator(mode="after")
    def _hangs_together(self) -> "Recipe":
        if not self.stages:
            raise ValueError("stages is empty: expected one or more")
        names = [stage.name for stage in self.stages]
        if twins := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two stages are named {sorted(twins)[0]!r}: expected a name each")
        for stage in self.stages:
            if stage.data not in self.data:
                raise ValueError(
                    f"stage {stage.name!r} takes the mixture {stage.data!r}: expected one of {', '.join(self.data)}"
                )
            if not self.data[stage.data]:
                raise ValueError(f"the mixture {stage.data!r} is empty: expected one source or more")
            if "lora" in stage.train and self.student.lora is None:
                raise ValueError(f"stage {stage.name!r} trains lora, but the student has none: add student.lora")
            if stage.loss in ALIGNMENTS and self.student.mixer == "same":
                raise ValueError(f"stage {stage.name!r} aligns mixers, but student.mixer is same: there are none")
        return self
