"""Each stage's loss and gradient against plain computations in which every document runs alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from distill.groups import FRESH, freeze
from distill.losses import token_loss
from distill.objectives import Objective, place
from distill.packing import Batch, share
from distill.stage import Stage
from tests.models.hybrids import FAMILIES, tiny_hybrid, tiny_teacher

CPU = torch.device("cpu")
LENGTHS = ((9, 2, 13), (24,), (5, 12), (17, 4, 3))
"""Of the documents in each row of `T` tokens; the third row ends in padding."""
T = 24


def batch() -> Batch:
    """Random tokens; weights 0, 1 and those of a prompt; the third row's last 7 tokens are padding."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.0, 0.25, 1.0])[torch.randint(0, 3, (len(LENGTHS), T), generator=generator)]
    position = torch.zeros(len(LENGTHS), T, dtype=torch.long)
    starts, examples = [], []
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for length in (*lengths, *([T - sum(lengths)] if sum(lengths) < T else [])):
            starts.append(row * T + at)
            position[row, at : at + length] = torch.arange(length)
            weights[row, at + length - 1] = 0
            at += length
        weights[row, sum(lengths) :] = 0
        examples += [f"row {row}"] * len(lengths)
    return Batch(
        tokens=torch.randint(2, 61, (len(LENGTHS), T), generator=generator),
        weights=weights,
        starts=torch.tensor([*starts, len(LENGTHS) * T]),
        position=position,
        valid=sum(map(sum, LENGTHS)),
        examples=tuple(examples),
        filled=tuple(map(sum, LENGTHS)),
    )


def documents(made: Batch) -> list[tuple[Tensor, Tensor]]:
    """(tokens [1, n], weights [n]) of each, padding left out."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for length in lengths:
            found.append((made.tokens[row, None, at : at + length], made.weights[row, at : at + length]))
            at += length
    return found


def stage(loss: str, **options: Any) -> Stage:
    train = {"align-qk": ("q", "k"), "align-block": ("mixer",)}.get(loss, ("all",))
    given = {"name": "s", "loss": loss, "train": train, "data": "d", "tokens": 1, "seq_len": T, "batch": 4, "lr": 1.0}
    return Stage.model_validate({**given, **options})


def control(teacher: Any) -> Any:
    """Attention of layers 0 and 2 is another one than the teacher's."""
    made = copy.deepcopy(teacher)
    setattr(made.config, FRESH, [0, 2])
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


STUDENTS = {"hybrid": tiny_hybrid, "softmax": control}


def pair(family: str, kind: str, attention: str = "sdpa", **options: Any) -> tuple[Any, Any]:
    teacher = tiny_teacher(family)
    student = STUDENTS[kind](teacher, **options)
    for model in (teacher, student):
        model.config._attn_implementation = attention
    return teacher.requires_grad_(False), student


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(objective: Objective, expected: Tensor, student: Any, made: Batch) -> None:
    """The objective's value and gradients are those of ``expected``, made by autograd; so are micro-batches' in sum."""
    student.zero_grad()
    expected.backward()
    wanted = gradients(student)
    student.zero_grad()
    with torch.no_grad():
        alone = objective(place(made, CPU))
    assert gradients(student) == {}
    scale = 0.37
    found = objective(place(made, CPU), scale)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, found, rtol=1e-6, atol=1e-7)
    whole = gradients(student)
    student.zero_grad()
    parts = [objective(place(share(made, rows), CPU), scale) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), expected.detach(), rtol=1e-5, atol=1e-6)
    for name, one in wanted.items():
        torch.testing.assert_close(whole[name], scale * one, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: name + m)
        torch.testing.assert_close(gradients(student)[name], scale * one, rtol=1e-4, atol=2e-5)
    assert {name for name, one in whole.items() if one.any()} <= wanted.keys()
    assert all(p.grad is None for p in objective.teacher.parameters()) if objective.teacher is not None else True


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_kl_is_that_of_every_document_alone(family: str, kind: str, attention: str) -> None:
    teacher, student = pair(family, kind, attention)
    made = batch()
    freeze(student, ["all"])
    expected = torch.zeros(())
    for tokens, weights in documents(made):
        logits = [model(tokens, use_cache=False).logits[0] for model in (teacher, student)]
        expected = expected + (token_loss("forward-kl", *logits, temperature=1.7) * weights).sum()
    check(Objective(stage("forward-kl", temperature=1.7), teacher, student, (0, 2)), expected, student, made)


@pytest.mark.parametrize("loss", ["kl-ce", "ce"])
def test_cross_entropy_is_of_the_next_token_and_alone_needs_no_teacher(loss: str) -> None:
    teacher, student = pair("qwen3", "hybrid")
    made = batch()
    freeze(student, ["all"])
    expected = torch.zeros(())
    for tokens, weights in documents(made):
        logits = [model(tokens, use_cache=False).logits[0] for model in (teacher, student)]
        targets = torch.cat([tokens[0, 1:], tokens.new_zeros(1)])
        shown = None if loss == "ce" else logits[0]
        expected = expected + (token_loss(loss, shown, logits[1], targets, alpha=0.3) * weights).sum()
    objective = Objective(stage(loss, alpha=0.3), None if loss == "ce" else teacher, student, (0, 2))
    check(objective, expected, student, made)


def seen_alone(teacher: Any, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> (input, output) of its attention while the teacher reads one document."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output, n=n: found.update({n: (kwargs["hidden_states"], output[0])}),
            with_kwargs=True,
        )
        for n, layer in enumerate(teacher.model.layers)
    ]
    with torch.no_grad():
        teacher(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_align_block_compares_mixer_outputs_given_the_teachers_input(family: str, kind: str, attention: str) -> None:
    teacher, student = pair(family, kind, attention)
    made = batch()
    freeze(student, ["mixer"], (0, 2))
    expected = torch.zeros(())
    for tokens, weights in documents(made):
        seen = seen_alone(teacher, tokens)
        for layer in (0, 2):
            x, goal = seen[layer]
            ours = student.model.layers[layer]
            if kind == "hybrid":
                output = ours.kda(x)
            else:
                n = x.shape[1]
                turns = teacher.model.rotary_emb(x, torch.arange(n)[None])
                mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
                output = ours.self_attn(hidden_states=x, position_embeddings=turns, attention_mask=mask)[0]
            distance = (output - goal).square().sum(-1).sqrt() / 32**0.5
            expected = expected + (distance[0] * weights).sum() / 2
    check(Objective(stage("align-block"), teacher, student, (0, 2)), expected, student, made)


@pytest.mark.parametrize(("kind", "rope"), [("hybrid", False), ("hybrid", True), ("softmax", False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_align_qk_compares_directions_of_what_attention_compares(family: str, kind: str, rope: bool) -> None:
    teacher, student = pair(family, kind, **({"kda_rope": rope} if kind == "hybrid" else {}))
    made = batch()
    freeze(student, ["q", "k", "conv"] if kind == "hybrid" else ["q", "k"], (0, 2))

    def turned(x: Tensor, tokens: Tensor) -> Tensor:
        cos, sin = teacher.model.rotary_emb(x, torch.arange(tokens.shape[1])[None])
        return x * cos[:, :, None] + rotate_half(x) * sin[:, :, None]

    def softmax(attention: Any, x: Tensor, name: str, tokens: Tensor) -> Tensor:
        heads = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, 8))
        return turned(getattr(attention, f"{name}_norm", lambda one: one)(heads), tokens)

    def linear(kda: Any, x: Tensor, name: str, tokens: Tensor) -> Tensor:
        wide, taps = getattr(kda, f"{name}_proj")(x), getattr(kda, f"{name}_conv")
        padded = torch.nn.functional.pad(wide, (0, 0, taps.shape[1] - 1, 0)).mT
        heads = torch.nn.functional.conv1d(padded, taps[:, None], groups=len(taps)).mT.unflatten(-1, (-1, 8))
        return turned(heads, tokens) if rope else heads

    expected = torch.zeros(())
    for tokens, weights in documents(made):
        seen = seen_alone(teacher, tokens)
        for layer in (0, 2):
            x, ours = seen[layer][0], student.model.layers[layer]
            for name in "qk":
                given = (
                    linear(ours.kda, x, name, tokens) if kind == "hybrid" else softmax(ours.self_attn, x, name, tokens)
                )
                cosine = torch.cosine_similarity(
                    given, softmax(teacher.model.layers[layer].self_attn, x, name, tokens), -1
                )
                expected = expected + ((2 - 2 * cosine).mean(-1)[0] * weights).sum() / 4
    check(Objective(stage("align-qk"), teacher, student, (0, 2)), expected, student, made)


def test_what_a_document_holds_changes_no_other_document_s_loss() -> None:
    teacher, student = pair("llama", "hybrid")
    made = batch()
    weights = torch.zeros_like(made.weights)
    weights[0, 11:23] = 1.0  # the third document of the first row
    tokens = made.tokens.clone()
    tokens[0, :11] = 3
    tokens[1:] = 4
    for loss in ("forward-kl", "align-block", "align-qk"):
        objective = Objective(stage(loss), teacher, student, (0, 2))
        with torch.no_grad():
            one, other = (
                objective(
                    place(
                        Batch(
                            tokens=ids,
                            weights=weights,
                            starts=made.starts,
                            position=made.position,
                            valid=made.valid,
                            examples=made.examples,
                            filled=made.filled,
                        ),
                        CPU,
                    )
                )
                for ids in (made.tokens, tokens)
            )
        assert float(one) > 0
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_batch_without_targets_has_loss_and_gradient_zero() -> None:
    teacher, student = pair("llama", "hybrid")
    made = batch()
    made.weights.zero_()
    for loss in ("forward-kl", "align-block"):
        freeze(student, ["mixer"], (0, 2))
        student.zero_grad()
        assert float(Objective(stage(loss), teacher, student, (0, 2))(place(made, CPU))) == 0.0
        assert not any(one.any() for one in gradients(student).values())
