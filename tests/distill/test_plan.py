"""The plan against the student that is really made, against hand counts, and against torch's own counter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.bench import bench_recipe, made_up
from distill.groups import freeze, mixer_layers, trained
from distill.objectives import Objective, place
from distill.plan import make_plan, stage_plan
from distill.recipe import changed, parse
from distill.stage import Recipe, Stage
from distill.student import make_student
from models.load import Loaded
from tests.distill.runs import tiny_recipe
from tests.distill.students import loaded
from tests.models.hybrids import FAMILIES

KINDS = {
    "kda": [],
    "softmax": ["student.mixer=softmax", "stages.align-qk.train=[q, k]"],
    "same": ["student.mixer=same", "stages.align-qk=null", "stages.align-block=null"]
    + [f"stages.{name}.train=[mlp, norms]" for name in ("distill", "instruct")],
    "lora": ["student.lora={rank: 2, on: [mlp, mixer, attention]}"]
    + [f"stages.{name}.train=[mixer, lora]" for name in ("distill", "instruct")],
}


def folder(teacher: Loaded, path: Path) -> Path:
    """Configuration and tokenizer alone: no weights."""
    teacher.model.config.save_pretrained(path)
    teacher.tokenizer.save_pretrained(path)
    return path


def recipe(kind: str, teacher: Path, *more: str) -> Recipe:
    content = tiny_recipe().model_dump(mode="json")
    return parse(changed(content, [f"teacher={teacher}", *KINDS[kind], *more]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_student_that_is_made(family: str, kind: str, tmp_path: Path) -> None:
    teacher = loaded(family)
    made = recipe(kind, folder(teacher, tmp_path / "teacher"))
    plan = make_plan(made)
    student = make_student(teacher, made, text=torch.arange(60).view(1, -1))
    assert plan.teacher_parameters == teacher.parameters
    assert plan.student_parameters == sum(p.numel() for p in student.parameters())
    assert plan.kept == {"same": (0, 1, 2)}.get(kind, (1,))
    assert set(plan.kept) == set(range(3)) - mixer_layers(student)
    for stage, one in zip(made.stages, plan.stages, strict=True):
        assert one.trained == sum(p.numel() for p in trained(student, stage.train).values())
        # A run measures its MFU by the plan of the models that it holds.
        assert one == stage_plan(stage, teacher.model, student, made)


def test_tokens_are_those_of_whole_steps(tmp_path: Path) -> None:
    made = recipe("kda", folder(loaded(), tmp_path / "teacher"), "stages.distill.tokens=385")
    plan = make_plan(made)
    assert [(one.steps, one.tokens) for one in plan.stages] == [(3, 384), (3, 384), (4, 512), (3, 384)]
    assert plan.tokens == 3 * 384 + 512 and plan.flops == sum(one.flops for one in plan.stages)


def test_the_selection_of_kl_restore_is_a_stage_of_its_own(tmp_path: Path) -> None:
    teacher = folder(loaded(), tmp_path / "teacher")
    made = recipe("kda", teacher, "student.keep=kl-restore:1", "student.select_tokens=256")
    plan = make_plan(made)
    assert [one.name for one in plan.stages] == ["select", *(stage.name for stage in made.stages)]
    first, align = plan.stages[0], plan.stages[2]
    assert first.tokens == 256 and plan.tokens == 256 + sum(one.tokens for one in plan.stages[1:])
    assert first.trained == align.trained * 3 / 2, "mixers in all three layers, not in two"
    assert first.flops_a_token > align.flops_a_token
    without = make_plan(recipe("kda", teacher, "student.keep=kl-restore:1", "student.select_tokens=0"))
    assert without.stages == plan.stages[1:]


def test_operations_are_those_counted_by_hand(tmp_path: Path) -> None:
    """Hidden 32, MLP 48, 4 heads of 8 (2 of keys and values), vocabulary 400, head apart; layer 1 of 3 is attention."""
    qk, in_proj, out, mlp = 32 * 32 + 32 * 16, 32 * (32 + 16 + 16), 32 * 32, 3 * 32 * 48
    gates = 2 * (32 * 8 + 8 * 32) + 32 * 4
    conv = 4 * (32 + 16 + 16)
    kda = in_proj + out + gates + conv
    recurrence, attention = 6 * 4 * 8 * 8, 4 * 4 * 8 * 64 // 2
    teacher = 3 * (2 * (in_proj + out + mlp) + attention)
    plan = make_plan(recipe("kda", folder(loaded(), tmp_path / "teacher")))
    align_qk, align_block, kl, _ = plan.stages
    qk_conv, trained_qk = 4 * (32 + 16), qk + conv
    assert align_qk.flops_a_token == teacher + 2 * 2 * (qk + qk + qk_conv + qk_conv + trained_qk)
    behind = out + 2 * 8 * 32 + conv
    assert align_block.flops_a_token == teacher + 2 * (2 * (kda + behind + kda) + 3 * recurrence)
    student = 2 * kda + (in_proj + out) + 3 * mlp
    weights = 2 * kda + 3 * mlp
    assert kl.flops_a_token == teacher + 2 * (2 * student + weights) + 3 * (2 * recurrence + attention)
    assert [one.flops_a_target for one in plan.stages] == [0, 0, 3 * 2 * 32 * 400, 3 * 2 * 32 * 400]
    assert kl.work(100, 10) == 100 * kl.flops_a_token + 10 * kl.flops_a_target


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("same", "distill"), ("softmax", "align-qk"), ("softmax", "align-block"), ("softmax", "instruct")],
)
def test_operations_are_those_that_torch_counts(kind: str, stage: str, tmp_path: Path) -> None:
    """Of softmax models, whose operations torch knows; attention aside, of which torch counts the whole square."""
    teacher = loaded(hidden_size=64, intermediate_size=96, head_dim=16)
    made = recipe(kind, folder(teacher, tmp_path / "teacher"), f"stages.{stage}.seq_len=16")
    student = make_student(teacher, made)
    one = next(one for one in made.stages if one.name == stage)
    freeze(student, one.train)
    teacher.model.requires_grad_(False)
    batch = made_up(one, 400, 16)
    with FlopCounterMode(display=False) as counter:
        Objective(one, teacher.model, student, sorted(mixer_layers(student)))(place(batch, torch.device("cpu")))
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counted.items() if op in ("aten.mm", "aten.addmm"))
    plan = stage_plan(one, teacher.model, student, made)
    wide = plan.work(batch.valid, int((batch.weights != 0).sum()))
    square = plan_attention(one, teacher.model, student) * batch.valid
    assert products == pytest.approx(wide - square, rel=0.04)


def plan_attention(stage: Stage, teacher: Any, student: Any) -> float:
    """A token's operations between queries and keys, and weights and values."""
    each = 4 * 4 * 16 * stage.seq_len / 2
    passes = {"align-qk": 3, "align-block": 3 + 3 * len(mixer_layers(student))}.get(stage.loss, 3 + 3 * 3)
    return each * passes


def test_memory_grows_with_the_micro_batch_and_falls_with_processes(tmp_path: Path) -> None:
    teacher = folder(loaded(), tmp_path / "teacher")

    def memory(processes: int, *more: str) -> float:
        content = recipe("kda", teacher, "stages.distill.batch=8", *more)
        return make_plan(content, processes).stages[2].memory

    found = [memory(1, f"stages.distill.micro_batch={size}") for size in (1, 2, 4, 8)]
    assert found == sorted(found) and len(set(found)) == 4
    assert memory(1) == found[-1] == memory(1, "stages.distill.micro_batch=16")
    assert memory(4) == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bench_times_every_stage_of_a_teacher_of_random_weights(kind: str, tmp_path: Path) -> None:
    made = recipe(kind, folder(loaded(), tmp_path / "teacher"))
    found = bench_recipe(made, device="cpu", steps=1, random=True)
    assert [row["stage"] for row in found["stages"]] == [stage.name for stage in made.stages]
    assert all(row["tokens_per_s"] > 0 and row["mfu"] is None for row in found["stages"])
