"""The experiment's jobs are recipes that can be read, and differ in what they say they differ in."""

from pathlib import Path

import pytest

from distill.experiments.collect import row, tables, training
from distill.experiments.smollm2 import Job, jobs
from distill.recipe import read_recipe
from distill.stage import Recipe


def everything(rehearse: bool = False) -> dict[str, Job]:
    sft, align, queues = jobs(Path("out"), "smollm2-135m", built_in=False, rehearse=rehearse)
    return {job.name: job for job in (sft, align, *(job for queue in queues for job in queue))}


def made(name: str) -> Recipe:
    job = everything()[name]
    return read_recipe(job.recipe, job.changes)


def test_every_job_is_a_recipe() -> None:
    for rehearse in (False, True):
        for job in everything(rehearse).values():
            if job.recipe:
                read_recipe(job.recipe, job.changes)


@pytest.mark.parametrize("millions", [2, 5, 10, 20, 40])
def test_a_duration_is_a_run_of_its_own_that_begins_with_the_shared_alignment(millions: int) -> None:
    recipe = made(f"full-{millions}M")
    assert sum(stage.tokens for stage in recipe.stages) == millions * 1_000_000
    assert [stage.name for stage in recipe.stages] == ["distill", "instruct"]
    assert recipe.student.start == "out/align" and recipe.axes["duration"] == f"{millions}M"
    assert recipe.student.lora is None and recipe.ship is None


def test_the_control_differs_from_its_duration_in_the_mixer_alone() -> None:
    control, full = made("control-20M"), made("full-20M")
    assert control.student.mixer == "softmax" and full.student.mixer == "kda"
    assert control.stages == full.stages and control.data == full.data and control.seed == full.seed


def test_the_shipped_student_has_small_parts_alone() -> None:
    recipe = made("ship")
    assert recipe.ship is not None and recipe.student.lora is not None
    assert all(set(stage.train) == {"mixer", "norms", "lora"} for stage in recipe.stages)


def test_the_tables_show_what_compare_json_says(tmp_path: Path) -> None:
    side = {"accuracy": 0.5, "ci95": [0.4, 0.6], "outcomes": {"unparsed": 1, "truncated": 2, "empty": 0}}
    mode = {"view": "open", "gap": {"mean": 0.1, "ci95": [0.0, 0.2]}, "floor": 0.1, "teacher": side, "student": side}
    hidden = {"mean": -0.02, "ci95": [-0.05, 0.01]}
    both = {"loglikelihood": True, "generation": False}
    modes = {"loglikelihood": mode, "generation": mode}
    task = {"name": "t", "n": 100, "signal": both, "hidden_gap": hidden, "recovery": None, "modes": modes}
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "a", "step": 1, "loss": 2.0, "tokens": 10, "seconds": 2.0, "tokens_per_s": 5.0}\n'
        '{"stage": "a", "tokens": 10, "end": true, "probe": {"before": 3.0, "after": 1.0}}\n',
        encoding="utf-8",
    )
    result = {
        "teacher": "T",
        "models": {"m": {"open": {"t": row(task)}}},
        "training": {"m": training(tmp_path / "metrics.jsonl")},
    }
    shown = tables(result)
    assert (
        "| t | 100 | generation, open | 50.0 | 50.0 | +10.0 [+0.0, +20.0] | 3.0 / 3.0 | -2.0 [-5.0, +1.0] | no |"
        in shown
    )
    assert "| a | 10 | 5 | – | 2.0 | 3.0000, 1.0000 |" in shown
