"""The real SmolLM2-135M as a student: it converts, generates, scores in both modes, and ships small."""

from pathlib import Path
from typing import Any

import pytest
import torch

import evalkit
from models.convert import calibrate, convert
from models.delta import own_tensors, save_delta
from models.load import Loaded, load
from models.probe import probe
from models.students import make_student
from models.text import batches

KEPT = [3, 7, 11, 15, 19, 23, 27]
MIB = 2**20


@pytest.fixture(scope="module")
def folder(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "student"
    make_student(smollm2, out, device="cpu")
    return out


@pytest.mark.slow
def test_it_generates_and_scores_in_both_modes_and_the_report_has_its_probe(smollm2: str, folder: Path) -> None:
    student = load(str(folder), device="cpu")
    ids = student.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert student.model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False).shape == (
        1,
        len(ids[0]) + 8,
    )
    made = evalkit.compare(smollm2, str(folder), ["quick"], limit=10, device="cpu")
    [task] = made.result["tasks"]
    assert set(task["modes"]) == {"loglikelihood", "generation"} and task["n"] == 10
    note = student.checkpoint or {}
    assert note["keep"] == KEPT
    assert [one["layer"] for one in note["probe"]["layers"]] == [n for n in range(30) if n not in KEPT]
    report = made.to_markdown()
    assert "## Layer probe" in report and f"{note['probe']['kl_nats']:.3f} nats a token" in report


@pytest.mark.slow
def test_calibration_makes_it_a_language_model(smollm2: str, folder: Path) -> None:
    """A wrong copy, or gates and norms as they come, would leave it near a uniform guess (10.8 nats) or beyond."""
    teacher = load(smollm2, device="cpu")
    tokens = batches(teacher.tokenizer).probe[:1]
    raw = probe(convert(teacher.model, KEPT), teacher.model, tokens)
    found = probe(load(str(folder), device="cpu").model, teacher.model, tokens)

    def mean(figures: dict[str, Any], name: str) -> float:
        return sum(float(one[name]) for one in figures["layers"]) / len(figures["layers"])

    assert (raw["kl_nats"], found["kl_nats"]) == (pytest.approx(11.9, abs=2), pytest.approx(2.2, abs=0.7))
    assert mean(found, "relative_error") < 0.9 < mean(raw, "relative_error")
    assert mean(found, "cosine") > 0.6 > mean(raw, "cosine")


def trained(model: Any, names: list[str], rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """As a training with LoRA on ``names`` would leave ``model``: changed in place; returns the factors."""
    generator = torch.Generator().manual_seed(0)
    weights, factors = dict(model.named_parameters()), {}
    for name in names:
        rows, columns = weights[name].shape
        A = (torch.randn(rows, rank, generator=generator) * 0.01).bfloat16()
        B = torch.randn(rank, columns, generator=generator).bfloat16()
        weights[name].data = (weights[name].double() + A.double() @ B.double()).bfloat16()
        factors[name] = (A, B)
    return factors


@pytest.mark.slow
def test_a_finetuned_teacher_and_its_student_ship_in_45_megabytes(smollm2: str, tmp_path: Path) -> None:
    """Teacher: LoRA of rank 16 on every linear layer. Student: KDA in 8-bit rows, LoRA of rank 16 on every MLP."""
    base = load(smollm2, device="cpu")
    tuned = load(smollm2, device="cpu").model
    linear = [name for name, _ in tuned.named_parameters() if "_proj" in name]
    assert len(linear) == 30 * 7
    size = {"file_bytes": 15 * MIB}
    save_delta(tuned, base, tmp_path / "sft", factors=trained(tuned, linear, 16), **size)
    teacher = load(str(tmp_path / "sft"), device="cpu")
    assert same(teacher, tuned)

    student = convert(teacher.model, "uniform")
    calibrate(student, teacher.model, batches(teacher.tokenizer).calibration[:1])
    mlp = [name for name in linear if ".mlp." in name]
    factors = trained(student, mlp, 16)
    noise = torch.Generator().manual_seed(1)
    for name, weight in student.named_parameters():
        if ".kda." in name:
            weight.data += (0.01 * torch.randn(weight.shape, generator=noise)).to(weight.dtype)
    told = save_delta(student, teacher, tmp_path / "kda", encoding={"*.kda.*": "int8"}, factors=factors, **size)
    for name, entry in told["tensors"].items():
        assert entry.get("error", 0) < 0.02, name
    files = [file for part in ("sft", "kda") for file in (tmp_path / part).iterdir()]
    total = sum(file.stat().st_size for file in files)
    print(
        f"{total / 1e6:.1f} MB: " + ", ".join(f"{f.parent.name}/{f.name} {f.stat().st_size / 1e6:.1f}" for f in files)
    )
    # LoRA: 9.8 MB and 6.1 MB in bfloat16; KDA: 1.04M numbers a layer, 23 layers, in bytes.
    assert 39e6 < total < 45e6
    assert max(file.stat().st_size for file in files) <= 15 * MIB
    found = load(str(tmp_path / "kda"), device="cpu")
    mine = own_tensors(student)
    for name, value in own_tensors(found.model).items():
        lost = float((value.double() - mine[name].double()).norm() / mine[name].double().norm())
        assert lost == pytest.approx(told["tensors"].get(name, {}).get("error", 0.0), rel=1e-6, abs=1e-12), name


def same(loaded: Loaded, model: Any) -> bool:
    mine = own_tensors(model)
    return all(torch.equal(value, mine[name]) for name, value in own_tensors(loaded.model).items())
