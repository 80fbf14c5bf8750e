"""A teacher becomes a Hybrid-KDA student: weights carried over, then norms and decay gates calibrated on real text.

This is where distillation starts. After GenDistill (arXiv:2603.26556), from which this departs: no bias in the
convolution, a bounded gate by default, an open output gate, fitted norms and half-lives.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import models.hybrid  # noqa: F401  # registers the student's class
from models.hybrid_config import HybridKDAConfig, check_family
from models.kda.reference import gate_bias
from models.kept import check_layers, keep_layers
from models.mapping import teacher_tensor

Report = Callable[[str, int, int], None]
"""(what, layers done, layers in all)"""


@dataclass(frozen=True, slots=True)
class HalfLives:
    """Half-lives of one head's channels, in tokens, log-spaced."""

    shortest: float
    longest: float
    order: str
    """"rising": from the first channel to the last. "rotary": the two channels that RoPE turns together share one, and
    what it turns fastest lives longest."""

    def tokens(self, channels: int) -> Tensor:
        """[channels] float64"""
        n = channels if self.order == "rising" else (channels + 1) // 2
        lives = torch.logspace(math.log2(self.shortest), math.log2(self.longest), n, base=2.0, dtype=torch.float64)
        return lives if self.order == "rising" else torch.cat([lives.flip(0)] * 2)[:channels]


UNCALIBRATED = HalfLives(2, 2048, "rising")
CANDIDATES = (
    UNCALIBRATED,
    HalfLives(2, 32, "rising"),
    HalfLives(2, 2048, "rotary"),
    HalfLives(2, 128, "rotary"),
    HalfLives(2, 32, "rotary"),
)
"""What calibration chooses from, head by head. SmolLM2-135M, `uniform`, bfloat16, on the probe's half of our own text,
as converted / with fitted norms / with chosen half-lives too: mean relative error of a layer 4.30 / 1.14 / 0.82, KL
from the teacher 11.9 / 4.3 / 2.2 nats a token. Three more candidates change neither (0.82, 2.2)."""


def convert(
    teacher: Any,
    keep: str | Sequence[int] = "uniform",
    *,
    gate: str = "bounded",
    lower_bound: float = -5.0,
    conv_size: int = 4,
    output_gate: bool = True,
    rope: bool = False,
    seed: int = 0,
) -> Any:
    """A HybridKDAForCausalLM with the weights of ``teacher`` (a Llama, Qwen2 or Qwen3 for causal language modelling).

    keep: the layers whose attention stays, bit for bit: their numbers, or a rule of `models.kept.keep_layers`. In the
    others q, k, v and o are the teacher's (k and v at its own number of heads; Qwen3's q_norm and k_norm folded in),
    the convolution passes its input on, the decay gate's half-lives are log-spaced from 2 to 2048 tokens, the output
    gate is open. MLPs, norms, embeddings and head are the teacher's bit for bit.
    gate, lower_bound, conv_size, output_gate, rope: the config's kda_gate and so on. seed: of the gates' small random
    projections. ValueError for another family, and for layers that the teacher lacks.
    """
    config = teacher.config
    check_family(config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("the teacher is quantised: expected one with plain floating-point weights, load it so")
    layers = config.num_hidden_layers
    kept = keep_layers(keep, layers) if isinstance(keep, str) else check_layers(list(keep), layers)
    config = HybridKDAConfig.from_teacher(
        config,
        kept,
        kda_gate=gate,
        kda_lower_bound=lower_bound,
        kda_conv_size=conv_size,
        kda_output_gate=output_gate,
        kda_rope=rope,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = AutoModelForCausalLM.from_config(
            config, dtype=teacher.dtype, attn_implementation=teacher.config._attn_implementation
        )
    base_of = teacher_tensor(teacher.state_dict())
    with torch.no_grad():
        for name, tensor in student.state_dict(keep_vars=True).items():
            base = base_of(name)
            if base is not None:
                tensor.copy_(base)
        for layer in config.kda_layers:
            set_half_lives(student.model.layers[layer].kda, [UNCALIBRATED] * student.model.layers[layer].kda.heads)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(teacher.device).eval()


def cast(model: Any, dtype: torch.dtype) -> Any:
    """``model`` with its parameters in ``dtype``, in place, as from_pretrained(dtype=...) loads it.

    model.to(dtype) would take along what must stay float32: the parameters that the class names (KDA's decay gates and
    norm, without which its kernels refuse) and RoPE's frequencies, which are no parameters.
    """
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not set(name.split(".")) & set(kept):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def set_half_lives(kda: Any, heads: Sequence[HalfLives]) -> None:
    """Give each head's channels their half-lives, through dt_bias; A_log becomes 0.

    They hold where the gate's input is 0, as it is in a new layer. Bounded: L sigmoid(b) = -ln 2 / tokens; softplus:
    softplus(b) = ln 2 / tokens.
    """
    tokens = torch.stack([lives.tokens(kda.head_dim) for lives in heads])
    config = kda.config
    bias = gate_bias(tokens, config.kda_gate, config.kda_lower_bound)
    if not bool(bias.isfinite().all()):
        raise ValueError(
            f"lower_bound is {config.kda_lower_bound}: expected below {-math.log(2) / 2:.2f}, "
            f"since a half-life of 2 tokens needs that log-decay"
        )
    with torch.no_grad():
        kda.A_log.zero_()
        kda.dt_bias.copy_(bias)


@torch.no_grad()  # type: ignore[untyped-decorator]
def calibrate(student: Any, teacher: Any, tokens: Tensor, report: Report | None = None) -> None:
    """Fit the norms and decay gates of every KDA layer of ``student``, in place, to ``teacher`` on ``tokens`` [B, T].

    Each layer is given the teacher's own hidden states. o_norm: for each head and channel, the RMS over all tokens of
    what goes into o_proj becomes the teacher's. Decay gate: each head takes that one of CANDIDATES (half-lives of its
    channels) with the smallest squared error of its share of the layer's output, after its o_norm is fitted.
    """
    kda_layers = student.config.kda_layers
    for done, seen in enumerate(watch(teacher, kda_layers, tokens), 1):
        _fit(student.model.layers[seen.layer].kda, seen)
        if report:
            report("calibrate", done, len(kda_layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one attention layer of the teacher was given, and made of it."""

    layer: int
    hidden_states: Tensor
    """[B, T, hidden], after the layer's norm."""
    position_embeddings: tuple[Tensor, Tensor]
    mixed: Tensor
    """[B, T, heads * head_dim]: what goes into o_proj."""
    output: Tensor
    """[B, T, hidden]"""


def watch(teacher: Any, layers: Sequence[int], tokens: Tensor) -> Iterator[Seen]:
    """Run ``teacher`` over ``tokens`` [B, T] and yield what each of ``layers`` saw, one after the other.

    The layers' inputs and outputs are held together in memory: B x T x (2 hidden + heads x head_dim) numbers a layer.
    """
    seen: dict[int, dict[str, Any]] = {layer: {} for layer in layers}
    with ExitStack() as hooks:
        for layer in layers:
            attention = teacher.model.layers[layer].self_attn
            hooks.enter_context(hooked(attention.o_proj.register_forward_pre_hook(_keep_mixed(seen[layer]))))
            hooks.enter_context(hooked(attention.register_forward_hook(_keep_rest(seen[layer]), with_kwargs=True)))
        if layers:
            teacher.model(tokens.to(teacher.device), use_cache=False)
    for layer in layers:
        yield Seen(layer=layer, **seen.pop(layer))


@contextmanager
def hooked(handle: Any) -> Iterator[None]:
    """A module's hook, as registered, that is gone after the block."""
    try:
        yield
    finally:
        handle.remove()


def _keep_mixed(seen: dict[str, Any]) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        seen["mixed"] = args[0]

    return hook


def _keep_rest(seen: dict[str, Any]) -> Callable[..., None]:
    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: tuple[Tensor, Any]) -> None:
        seen["hidden_states"] = kwargs["hidden_states"]
        seen["position_embeddings"] = kwargs["position_embeddings"]
        seen["output"] = output[0]

    return hook


def mixed_by(kda: Any, seen: Seen) -> Tensor:
    """[B, T, heads, head_dim] float32: what ``kda`` puts into its o_proj, where attention put ``seen.mixed``."""
    found: list[Tensor] = []
    with hooked(kda.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))):
        kda(seen.hidden_states, position_embeddings=seen.position_embeddings)
    return found[0].float().unflatten(-1, (kda.heads, kda.head_dim))


def _fit(kda: Any, seen: Seen) -> None:
    goal = seen.mixed.float().unflatten(-1, (kda.heads, kda.head_dim))
    out = kda.o_proj.weight.float().unflatten(1, (kda.heads, kda.head_dim))
    errors, weights = [], []
    for lives in CANDIDATES:
        set_half_lives(kda, [lives] * kda.heads)
        kda.o_norm.fill_(1)
        mixed = mixed_by(kda, seen)
        weight = _rms(goal) / _rms(mixed)
        weights.append(weight.where(weight.isfinite(), torch.ones_like(weight)))
        missed = torch.einsum("bthd,ohd->hbto", mixed * weights[-1] - goal, out)
        errors.append(missed.square().sum((1, 2, 3)))
    best = torch.stack(errors).argmin(0).tolist()
    set_half_lives(kda, [CANDIDATES[one] for one in best])
    kda.o_norm.copy_(torch.stack([weights[one][head] for head, one in enumerate(best)]))


def _rms(x: Tensor) -> Tensor:
    """[B, T, heads, head_dim] -> [heads, head_dim]"""
    return x.square().mean((0, 1)).sqrt()
