"""Which layers keep their softmax attention, measured on text: "kl-restore:N".

As in arXiv:2512.20569 a student whose layers are all linear gets its teacher's attention back in one layer at a time,
and the layers that so lower KL(teacher || student) most are kept. There each candidate is trained for a while before
it is judged; here each is judged as it is, after whatever alignment the caller has done: N candidates cost N forward
passes and no training.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from distill.stage import Recipe, Stage
from models.convert import Report, cast, convert
from models.kept import check_layers
from models.load import Loaded
from models.probe import end_to_end


def keep_layers_of(rule: str) -> int | None:
    """N of "kl-restore:N", None for any other rule (`models.kept.keep_layers` reads those)."""
    name, _, number = rule.strip().partition(":")
    if name != "kl-restore":
        return None
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"keep is {rule!r}: expected kl-restore:N, with N of at least 1 layers to keep")
    return int(number)


def selection_stage(recipe: Recipe) -> Stage | None:
    """The training before kl-restore compares the layers: align-block of mixers in all of them. None: there is none."""
    if keep_layers_of(recipe.student.keep) is None or not recipe.student.select_tokens:
        return None
    like = next((one for one in recipe.stages if one.loss == "align-block"), recipe.stages[0])
    return Stage(
        name="select",
        loss="align-block",
        train=("mixer",),
        tokens=recipe.student.select_tokens,
        **like.model_dump(include={"data", "seq_len", "batch", "micro_batch", "lr", "schedule", "warmup"}),
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def kl_restore(
    teacher: Loaded,
    student: Any,
    tokens: Tensor,
    keep: int,
    report: Report | None = None,
    greedy: bool = False,
) -> tuple[tuple[int, ...], list[dict[str, Any]]]:
    """(the ``keep`` layers to restore, in order; a row of measurements for each layer tried).

    student: converted from ``teacher`` without any kept layer, and aligned; it is left as it is. tokens: [B, T], no
    pads. Rows: ``layer``, ``step`` (from 1; one step unless greedy), ``kl_nats`` and ``top1_agreement`` with that layer
    restored beside those chosen in earlier steps, ``gain_nats``: how far that is below the KL without it.
    greedy: the best layer is restored for good before the others are measured again, ``keep`` times; by default all
    are ranked at once, as in the paper. Of equal layers the first is taken.
    """
    layers = student.config.num_hidden_layers
    if not hasattr(student.config, "kda_layers"):
        raise ValueError(f"the student is a {type(student).__name__}: expected one with KDA layers")
    if student.config.kept_layers:
        raise ValueError(f"the student keeps attention in layers {student.config.kept_layers}: expected none to start")
    if not 1 <= keep <= layers:
        raise ValueError(f"keep is {keep} layers: expected 1 to {layers}, as many as the student has")
    chosen: list[int] = []
    table: list[dict[str, Any]] = []
    steps = keep if greedy else 1
    total = sum(layers - step for step in range(steps))
    for step in range(1, steps + 1):
        before = _measure(student, teacher.model, tokens, chosen)["kl_nats"]
        rows: list[dict[str, Any]] = []
        for layer in (one for one in range(layers) if one not in chosen):
            found = _measure(student, teacher.model, tokens, [*chosen, layer])
            rows.append({"layer": layer, "step": step, **found, "gain_nats": before - found["kl_nats"]})
            if report:
                report("kl-restore", len(table) + len(rows), total)
        table += rows
        best = sorted(rows, key=lambda row: float(row["kl_nats"]))
        chosen += [int(row["layer"]) for row in best[: 1 if greedy else keep]]
    return tuple(sorted(chosen)), table


def restore(student: Any, teacher: Loaded, kept: Sequence[int]) -> Any:
    """A student that keeps the teacher's attention in the layers ``kept``; all else is ``student``'s, bit for bit."""
    config = student.config
    kept = check_layers(list(kept), config.num_hidden_layers)
    if lost := [layer for layer in config.kept_layers if layer not in kept]:
        raise ValueError(f"layer {lost[0]} of the student is attention: there is no mixer to carry over, so keep it")
    made = convert(
        teacher.model,
        kept,
        gate=config.kda_gate,
        lower_bound=config.kda_lower_bound,
        conv_size=config.kda_conv_size,
        output_gate=config.kda_output_gate,
        rope=config.kda_rope,
    )
    cast(made, student.dtype)
    own = set(made.state_dict())
    made.load_state_dict({name: one for name, one in student.state_dict().items() if name in own}, strict=False)
    return made.train(student.training)


def _measure(student: Any, teacher: Any, tokens: Tensor, layers: Sequence[int]) -> dict[str, float]:
    training = student.training
    student.eval()
    with _restored(student, teacher, layers):
        found: dict[str, float] = end_to_end(student, teacher, tokens)
    student.train(training)
    return found


@contextmanager
def _restored(student: Any, teacher: Any, layers: Sequence[int]) -> Iterator[None]:
    """Within the block the mixers of ``layers`` answer as the teacher's attention would, given the same input.

    The attention's mask is the one that the teacher's own last forward pass gave it, so the teacher must run over the
    same tokens before the student does, as in `end_to_end`.
    """
    with ExitStack() as hooks:
        for layer in layers:
            attention = teacher.model.layers[layer].self_attn
            masks: dict[str, Any] = {}
            for handle in (
                attention.register_forward_pre_hook(_recording(masks), with_kwargs=True),
                student.model.layers[layer].kda.register_forward_hook(_answering(attention, masks), with_kwargs=True),
            ):
                hooks.callback(handle.remove)
        yield


def _recording(masks: dict[str, Any]) -> Any:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks["attention_mask"] = kwargs["attention_mask"]

    return hook


def _answering(attention: Any, masks: dict[str, Any]) -> Any:
    def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0].to(attention.q_proj.weight.dtype)
        turns = kwargs["position_embeddings"]
        # Not through the module's own hooks: they record the teacher's mask.
        mixed: Tensor = attention.forward(hidden_states=x, position_embeddings=turns, **masks)[0]
        return mixed.to(output.dtype)

    return hook
