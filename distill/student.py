"""A recipe's student: made from its teacher, with LoRA adapters if asked for; and, trained, made plain again.

A student with adapters is written as a plain model: W becomes W + A @ B, where A and B are LoRA's factors with the
scale alpha / rank in A. The factors are rounded first and merged after, so that a delta checkpoint that stores the
factors alone (models/delta.py) gives back the plain model.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.groups import FRESH, is_mixer, mixer_layers
from distill.select import keep_layers_of
from distill.stage import Lora, Recipe
from models.convert import Report, calibrate, cast, convert
from models.hybrid_config import check_family
from models.kept import check_layers, keep_layers
from models.load import DTYPES, Loaded, load
from models.mapping import teacher_tensor
from models.text import batches

ADAPTER = "default"
"""peft's name for a model's only adapter."""
_PROJECTION = re.compile(r"layers\.\d+\.(?:(kda|self_attn)\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)$")


def make_student(
    teacher: Loaded,
    recipe: Recipe,
    *,
    keep: Sequence[int] | None = None,
    lora: bool = True,
    begin: bool = True,
    text: Tensor | None = None,
    report: Report | None = None,
) -> Any:
    """The student that the first stage of ``recipe`` trains: on the teacher's device, in the recipe's dtype.

    mixer "kda": as `evalkit convert`, calibrated on ``text`` [B, T] (by default our own). "softmax": the teacher's own
    architecture, where the attention of each layer that isn't kept begins anew (normal, the config's
    initializer_range; biases 0, q_norm and k_norm 1); its config lists these layers, so that a saved control still
    knows them. "same": a copy of the teacher. What a model keeps in float32 stays so in any dtype.
    keep: layers, instead of the recipe's rule. "kl-restore:N" needs it: make a student with ``keep=()`` and
    ``lora=False``, train it, and go on with `distill.select.kl_restore`, `restore` and `add_lora`.
    lora: whether the adapters that the recipe asks for are added. begin=False: weights will be loaded over the
    student's, so that it needs neither calibration nor student.start.
    """
    wanted, config = recipe.student, teacher.model.config
    check_family(config)
    if wanted.mixer != "kda" and keep_layers_of(wanted.keep) is not None and not keep:
        raise ValueError(
            f"student.keep is {wanted.keep!r}, which compares KDA layers, but student.mixer is {wanted.mixer}: "
            f"list the layers to keep"
        )
    if wanted.mixer == "same":
        student = copy.deepcopy(teacher.model)
    else:
        kept = _kept(wanted.keep, keep, config.num_hidden_layers)
        student = (_control if wanted.mixer == "softmax" else _hybrid)(teacher, recipe, kept)
    if wanted.mixer != "softmax" and hasattr(student.config, FRESH):
        delattr(student.config, FRESH)  # the teacher's own past, as a control
    if wanted.mixer == "kda" and not wanted.start and begin:
        if text is None:
            window = getattr(config, "max_position_embeddings", 2**31)
            text = batches(teacher.tokenizer, window=window).calibration
        calibrate(student, teacher.model, text, report)
    cast(student, DTYPES[recipe.dtype])
    if wanted.start and begin:
        _begin_with(student, wanted.start)
    if lora and wanted.lora is not None:
        add_lora(student, wanted.lora, recipe.seed)
    return student.eval()


def add_lora(model: Any, lora: Lora, seed: int = 0) -> None:
    """Put LoRA adapters around the linear layers that ``lora.on`` names, in place; the model's output stays the same.

    attention: q, k, v, o of layers whose attention is the teacher's; mixer: those of the others (a KDA layer's gates
    are new and small: train them whole); mlp: gate, up, down. The factors have the dtype of the weights; A is random
    by ``seed``, B is 0.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("student.lora needs peft, which is not installed: pip install 'evalkit[distill]'") from error
    mixers = mixer_layers(model)
    places: dict[str, list[str]] = {kind: [] for kind in ("attention", "mixer", "mlp")}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (found := _PROJECTION.search(name)):
            kind = "mlp" if found[1] is None else "mixer" if is_mixer(name, mixers) else "attention"
            places[kind].append(name)
    if empty := [kind for kind in lora.on if not places[kind]]:
        listed = ", ".join(kind for kind, names in places.items() if names)
        raise ValueError(f"student.lora.on names {empty[0]!r}, of which the student has no layer: it has {listed}")
    names = [name for kind in lora.on for name in places[kind]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=names), model, ADAPTER
        )
    for _, module in _adapted(model):
        for part in (module.lora_A, module.lora_B):
            part.to(module.base_layer.weight.dtype)


def merged_state(model: Any) -> dict[str, Tensor]:
    """The state dict of `plain_model`: plain names, adapters merged in; the model stays as it is."""
    merged = {f"{name}.weight": _merged(module) for name, module in _adapted(model)}
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            plain = name.replace(".base_layer.", ".")
            state[plain] = merged.get(plain, tensor)
    return state


def lora_factors(model: Any, teacher: Any = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Plain name -> (A [rows, R], B [R, columns]) in the adapter's dtype; `plain_model`'s tensor is W + A @ B.

    For save_delta(plain_model(model), teacher, factors=...). With ``teacher`` (a model), only of the tensors whose W
    is the teacher's still: save_delta takes no other, such as a mixer that was trained whole before.
    """
    base_of = None if teacher is None else teacher_tensor(teacher.state_dict())
    factors = {}
    for name, module in _adapted(model):
        weight = module.base_layer.weight.detach()
        if base_of is not None:
            base = base_of(f"{name}.weight")
            if base is None or not torch.equal(base.to(weight.dtype), weight.cpu()):
                continue
        factors[f"{name}.weight"] = _factors(module)
    return factors


def plain_model(model: Any) -> Any:
    """A model without adapters that holds `merged_state`, to be evaluated or saved; without adapters: ``model``."""
    if not any(True for _ in _adapted(model)):
        return model
    plain = copy.deepcopy(model)
    for name, module in list(_adapted(plain)):
        linear, weight = module.base_layer, _merged(module)
        with torch.no_grad():
            linear.weight.copy_(weight)
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, linear)
    del plain.peft_config
    return plain.eval()


def start_folder(start: str) -> Path:
    """A model folder, or the last checkpoint of a run's folder."""
    found = [one for one in Path(start).glob("checkpoints/*-*") if one.name.rpartition("-")[2].isdecimal()]
    return max(found, key=lambda one: int(one.name.rpartition("-")[2]), default=Path(start))


def _begin_with(student: Any, start: str) -> None:
    """Give ``student`` the weights of ``start``; ValueError where they don't fit one another."""
    found = load(str(start_folder(start)), dtype=str(student.dtype).removeprefix("torch."), device="cpu").model
    own, given = student.state_dict(), found.state_dict()
    wrong = [
        name for name in {**own, **given} if getattr(own.get(name), "shape", 0) != getattr(given.get(name), "shape", 1)
    ]
    if wrong or mixer_layers(student) != mixer_layers(found):
        raise ValueError(
            f"student.start is {start}, which is built otherwise ({len(wrong)} tensors don't fit, e.g. "
            f"{next(iter(wrong), 'none')}; mixers in layers {sorted(mixer_layers(found))}, here "
            f"{sorted(mixer_layers(student))}): expected a checkpoint of the same student"
        )
    student.load_state_dict(given)


def _kept(rule: str, given: Sequence[int] | None, layers: int) -> tuple[int, ...]:
    if given is not None:
        return check_layers(list(given), layers)
    if keep_layers_of(rule) is not None:
        raise ValueError(f"student.keep is {rule!r}, which compares trained layers: select them first, and give keep")
    return keep_layers(rule, layers)


def _hybrid(teacher: Loaded, recipe: Recipe, kept: tuple[int, ...]) -> Any:
    wanted = recipe.student
    return convert(
        teacher.model,
        kept,
        gate=wanted.gate,
        conv_size=wanted.conv_size,
        output_gate=wanted.output_gate,
        rope=wanted.rope,
        seed=recipe.seed,
    )


def _control(teacher: Loaded, recipe: Recipe, kept: tuple[int, ...]) -> Any:
    student = copy.deepcopy(teacher.model)
    config = student.config
    fresh = [layer for layer in range(config.num_hidden_layers) if layer not in kept]
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        for layer in fresh:
            for name, parameter in student.model.layers[layer].self_attn.named_parameters():
                if name.endswith("proj.weight"):
                    # On the CPU in float32: the same numbers on every device and in every dtype.
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(drawn * config.initializer_range)
                else:
                    parameter.fill_(1.0 if "norm" in name else 0.0)
    setattr(config, FRESH, fresh)
    return student


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    """(plain name, peft's layer) of each linear layer with an adapter."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def _factors(module: Any) -> tuple[Tensor, Tensor]:
    wide, narrow = (part[ADAPTER].weight.detach() for part in (module.lora_B, module.lora_A))
    return (wide.float() * module.scaling[ADAPTER]).to(wide.dtype), narrow.clone()


def _merged(module: Any) -> Tensor:
    """As models.packing.unpack adds them up, in float64 on the CPU, so that both give the same bits."""
    weight = module.base_layer.weight.detach()
    A, B = (factor.cpu().double() for factor in _factors(module))
    return (weight.cpu().double() + A @ B).to(weight.device, weight.dtype)
