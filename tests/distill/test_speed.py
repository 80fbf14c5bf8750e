"""Compiled parts compute what they are written to compute, and leave nothing behind."""

import copy
import warnings

import torch

from distill.speed import FUSED, compiled, eager
from tests.models.hybrids import tiny_hybrid, tiny_teacher, tokens


def test_compiled_parts_give_the_same_logits_and_gradients_and_are_gone_afterwards() -> None:
    teacher = tiny_teacher("llama")
    student = tiny_hybrid(teacher)
    ids = tokens(16)
    warnings.simplefilter("ignore")  # torch's own, inside its compiler

    def gradients() -> list[torch.Tensor]:
        student.zero_grad()
        (
            student(ids, use_cache=False).logits - teacher(ids, use_cache=False).logits.detach()
        ).square().mean().backward()
        return [p.grad.clone() for p in student.parameters() if p.grad is not None]

    wanted = gradients()
    with compiled(teacher, student, backend="aot_eager"):  # inductor's C++ can't be built in a path with a space
        found = gradients()
        with eager():
            again = gradients()
        twin = copy.deepcopy(student)
    for a, b, c in zip(wanted, found, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
        assert torch.equal(a, c)
    for module in student.modules():
        assert not (type(module) in FUSED and "forward" in vars(module))
    for name, module in twin.named_modules():
        if type(module) in FUSED:
            assert module.forward.__self__ is module, name


def test_nothing_is_compiled_where_it_is_not_wanted() -> None:
    model = tiny_teacher("qwen3")
    with compiled(model, wanted=False):
        assert not any("forward" in vars(module) for module in model.modules())
