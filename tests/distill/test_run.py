"""A run: what it leaves on disk, and that a stopped one goes on bit for bit."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import distill.run
import distill.train
from distill.recipe import changed, parse, sha256
from distill.train import Stop, Stopped
from models.load import describe, load
from tests.distill.runs import lines, run, tiny_recipe, weights
from tests.distill.students import loaded
from tests.models.hybrids import tiny_teacher
from tests.tiny import tiny_tokenizer


class After(Stop):
    """Stops after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def why(self) -> tuple[str, int] | None:
        self.left -= 1
        return ("stopped by SIGTERM", 143) if self.left == 0 else None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from end to end, never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(tiny_recipe(), out)
    return out


def test_every_stage_lowers_its_loss_on_one_fixed_batch(whole: Path) -> None:
    ends = [line for line in lines(whole) if line.get("end")]
    assert [line["stage"] for line in ends] == ["align-qk", "align-block", "distill", "instruct"]
    for line in ends:
        assert line["probe"]["after"] < line["probe"]["before"]


def test_checkpoints_are_model_folders_that_say_how_they_were_made(whole: Path) -> None:
    folders = sorted((whole / "checkpoints").iterdir(), key=lambda one: int(one.name.rpartition("-")[2]))
    assert [one.name.rpartition("-")[0] for one in folders] == ["align-qk", "align-block", "distill", "instruct"]
    last = load(str(folders[-1]))
    note = last.checkpoint
    assert note is not None
    assert note["recipe_sha256"] == sha256(tiny_recipe()) and note["stage"] == "instruct" and note["seed"] == 0
    assert note["tokens"] == int(folders[-1].name.rpartition("-")[2])
    assert note["teacher_fingerprint"] == loaded().identity and note["axes"] == {}


def test_metrics_hold_every_step_once_with_loss_rate_and_speed(whole: Path) -> None:
    steps = [line for line in lines(whole) if "loss" in line]
    assert [(line["stage"], line["step"]) for line in steps] == [
        (stage, step) for stage in ("align-qk", "align-block", "distill", "instruct") for step in (1, 2, 3)
    ]
    tokens = [line["total_tokens"] for line in steps]
    assert tokens == sorted(tokens)
    assert all(line["tokens_per_s"] > 0 and line["lr"] > 0 and line["grad_norm"] > 0 for line in steps)


def test_frozen_tensors_are_the_teacher_s_at_the_end(whole: Path) -> None:
    teacher = loaded().model.state_dict()
    student = weights(max((whole / "checkpoints").iterdir(), key=lambda one: int(one.name.rpartition("-")[2])))
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):
        assert torch.equal(student[name], teacher[name])
    assert not torch.equal(student["model.layers.0.mlp.up_proj.weight"], teacher["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("steps", [1, 3, 5, 8, 11])
def test_a_run_stopped_in_any_stage_ends_with_the_same_weights_and_metrics(
    whole: Path, tmp_path: Path, steps: int
) -> None:
    out = tmp_path / "run"
    try:
        run(tiny_recipe(), out, stop=After(steps))
    except Stopped as stopped:
        assert stopped.exit_code == 143
    ended = run(tiny_recipe(), out, resume=True)
    expected = whole / "checkpoints" / ended.name
    found, wanted = weights(ended), weights(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert timeless(out) == timeless(whole)


def timeless(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines(out)]


@pytest.mark.parametrize(("steps", "killed"), [(1, False), (2, False), (8, False), (8, True)])
def test_the_guard_keeps_its_rhythm_over_a_stop(tmp_path: Path, steps: int, killed: bool) -> None:
    recipe = tiny_recipe(guard={"tasks": ["arithmetic"], "items": 2, "every": 150})
    run(recipe, tmp_path / "whole")

    def killer(row: dict[str, Any]) -> None:
        if killed and "guard" in row and row["stage"] == "distill":
            raise KeyboardInterrupt  # the guard's line is written, and nothing saved after it

    with pytest.raises(KeyboardInterrupt if killed else Stopped):
        run(recipe, tmp_path / "run", stop=After(99 if killed else steps), report=killer)
    run(recipe, tmp_path / "run", resume=True)
    found = timeless(tmp_path / "run")
    assert found == timeless(tmp_path / "whole")
    # In the middle, once 150 tokens are done, and at each stage's end.
    guards = [(line["stage"], line["tokens"] >= 300) for line in found if "guard" in line]
    assert guards[:4] == [("align-qk", False), ("align-qk", True), ("align-block", False), ("align-block", True)]


@pytest.mark.parametrize("mixer", ["kda", "softmax"])
def test_a_student_that_starts_from_a_checkpoint_has_its_weights_and_counts_its_tokens(
    tmp_path: Path, mixer: str
) -> None:
    base = changed(
        tiny_recipe().model_dump(mode="json"),
        [f"student.mixer={mixer}", *(["stages.align-qk.train=[q, k]"] if mixer == "softmax" else [])],
    )
    first = parse({**base, "stages": base["stages"][:2]})
    ended = run(first, tmp_path / "first")
    start = {**base["student"], "start": str(tmp_path / "first")}
    second = parse({**base, "student": start, "stages": base["stages"][2:]})
    teacher, seen = loaded(), {}

    def begun(row: dict[str, Any]) -> None:
        if row.get("begin") and not seen:
            state = torch.load(tmp_path / "second" / "state" / "state.pt", weights_only=True)
            seen.update(state["student"], tokens=state["position"]["total_tokens"])

    with pytest.raises(Stopped):
        run(second, tmp_path / "second", teacher, report=begun, stop=After(2))
    before = int(ended.name.rpartition("-")[2])
    assert seen.pop("tokens") == before > 0
    given = weights(ended)
    assert given.keys() == seen.keys() and all(torch.equal(given[name], one) for name, one in seen.items())
    shutil.rmtree(tmp_path / "first")  # a resumed run has all that it needs
    last = run(second, tmp_path / "second", teacher, resume=True)
    trained = sum(line["valid"] for line in lines(tmp_path / "second") if "loss" in line)
    assert load(str(last)).checkpoint["tokens"] == before + trained == int(last.name.rpartition("-")[2])


def test_a_start_that_is_built_otherwise_is_refused(tmp_path: Path) -> None:
    base = tiny_recipe().model_dump(mode="json")
    ended = run(parse({**base, "stages": base["stages"][:1]}), tmp_path / "first")
    for change in ("student.keep='0'", "student.mixer=softmax", "student.output_gate=false"):
        parts = [change, f"student.start={ended}", "stages.align-qk.train=[q, k]"]
        with pytest.raises(ValueError, match="which is built otherwise .*: expected a checkpoint of the same student"):
            run(parse(changed(base, parts)), tmp_path / "second")
    control = [*("student.mixer=softmax", "stages.align-qk.train=[q, k]")]
    ended = run(parse(changed({**base, "stages": base["stages"][:1]}, control)), tmp_path / "control")
    with pytest.raises(ValueError, match=r"mixers in layers \[0, 2\], here \[1, 2\]\): expected a checkpoint of the"):
        run(parse(changed(base, [*control, "student.keep='0'", f"student.start={ended}"])), tmp_path / "second")


def test_data_and_groups_of_every_stage_are_looked_at_before_the_first_begins(tmp_path: Path) -> None:
    base, out = tiny_recipe().model_dump(mode="json"), tmp_path / "run"
    with pytest.raises(ValueError, match="no chat file matches 'absent.jsonl'"):
        run(parse(changed(base, ["data.chat=[{chat: [absent.jsonl]}]"])), out)
    with pytest.raises(ValueError, match="'output_gate', which holds no parameter"):
        run(parse(changed(base, ["student.output_gate=false", "stages.instruct.train=[output_gate]"])), out)
    assert lines(out) == []
    run(parse(base), out, stage="align-qk")  # nothing was kept, so nothing must be resumed


def test_a_resume_with_another_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tiny_recipe(), tmp_path / "run", stop=After(2))
    other = tiny_teacher("llama", vocab_size=400)
    with torch.no_grad():
        other.model.norm.weight += 1
    with pytest.raises(ValueError, match="run of another teacher: tiny has other weights or another tokenizer"):
        run(tiny_recipe(), tmp_path / "run", describe(other, tiny_tokenizer(), "tiny"), resume=True)


def test_the_teacher_gets_no_gradient_and_no_training_and_both_stay_in_evaluation_mode(tmp_path: Path) -> None:
    teacher = loaded()
    before = {name: one.clone() for name, one in teacher.model.state_dict().items()}
    run(tiny_recipe(), tmp_path / "run", teacher)
    assert not teacher.model.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert all(torch.equal(before[name], one) for name, one in teacher.model.state_dict().items())


def test_metrics_are_cut_back_and_never_filled_up(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for known, kept in ((8, b'{"a": 1}'[:8]), (100, b'{"a": 1}\n{"b": 2}\n'), (0, b"")):
        file.write_bytes(b'{"a": 1}\n{"b": 2}\n')
        metrics = distill.train.Metrics(file)
        metrics.cut(known)
        assert metrics.size() == len(kept)
        metrics.write({"c": 3})
        metrics.close()
        assert file.read_bytes() == kept + b'{"c": 3}\n'


def test_a_run_killed_between_two_saves_redoes_the_steps_since(whole: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "run", []

    def killed(row: dict[str, Any]) -> None:
        seen.append(row)
        if row.get("stage") == "distill" and row.get("step") == 2 and "loss" in row:
            raise KeyboardInterrupt  # nothing is saved on the way out

    with pytest.raises(KeyboardInterrupt):
        run(tiny_recipe(), out, report=killed)
    ended = run(tiny_recipe(), out, resume=True)
    found, wanted = weights(ended), weights(whole / "checkpoints" / ended.name)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len([line for line in lines(out) if "loss" in line]) == 12


def test_lora_on_a_bfloat16_student_goes_on_bit_for_bit_and_ships(tmp_path: Path) -> None:
    recipe = parse(
        changed(
            tiny_recipe().model_dump(mode="json"),
            ["dtype=bfloat16", "student.lora={rank: 2, on: [mlp]}", "ship={encoding: {'*.kda.*': int8}}"]
            + [f"stages.{name}.train=[mixer, lora]" for name in ("distill", "instruct")],
        )
    )
    teacher = loaded(dtype=torch.bfloat16)
    a = run(recipe, tmp_path / "a", teacher)
    with pytest.raises(Stopped):
        run(recipe, tmp_path / "b", teacher, stop=After(8))
    b = run(recipe, tmp_path / "b", teacher, resume=True)
    found, wanted = weights(b), weights(a)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    told = json.loads((tmp_path / "a" / "delta" / "delta.json").read_text(encoding="utf-8"))
    encodings = {entry["encoding"] for name, entry in told["tensors"].items() if ".mlp." in name}
    assert encodings == {"lowrank"}


def test_the_control_and_fine_tuning_run_through_the_same_loop(tmp_path: Path) -> None:
    base = tiny_recipe().model_dump(mode="json")
    control = parse(changed(base, ["student.mixer=softmax", "stages.align-qk.train=[q, k]"]))
    run(control, tmp_path / "control")
    ends = [line for line in lines(tmp_path / "control") if line.get("end")]
    assert len(ends) == 4 and all(line["probe"]["after"] < line["probe"]["before"] for line in ends)
    tuned = parse(
        {**base, "student": {"mixer": "same"}, "stages": [{**base["stages"][3], "loss": "ce", "train": ["all"]}]}
    )
    run(tuned, tmp_path / "tuned")
    [end] = [line for line in lines(tmp_path / "tuned") if line.get("end")]
    assert end["probe"]["after"] < end["probe"]["before"]


def test_kl_restore_chooses_layers_after_alignment_and_a_stopped_run_keeps_them(tmp_path: Path) -> None:
    recipe = parse(
        changed(tiny_recipe().model_dump(mode="json"), ["student.keep=kl-restore:1", "student.select_tokens=256"])
    )
    with pytest.raises(Stopped):
        run(recipe, tmp_path / "run", stop=After(4))
    told = json.loads((tmp_path / "run" / "selection.json").read_text(encoding="utf-8"))
    ended = run(recipe, tmp_path / "run", resume=True)
    assert list(load(str(ended)).model.config.kept_layers) == told["kept"] and len(told["layers"]) == 3


def test_a_loss_that_is_nan_stops_the_run_names_the_batch_and_keeps_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        run(tiny_recipe(), out, stop=After(4))
    before = (out / "state" / "state.pt").read_bytes()
    real = distill.train.Objective.__call__

    def broken(self: Any, batch: Any, scale: float = 1.0) -> torch.Tensor:
        return real(self, batch, scale) * (float("nan") if torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(distill.train.Objective, "__call__", broken)
    with pytest.raises(ValueError, match=r"the loss is nan .* step 2 of align-block, on the batch with text.jsonl: t"):
        run(tiny_recipe(), out, resume=True)
    assert (out / "state" / "state.pt").read_bytes() == before
    monkeypatch.undo()
    run(tiny_recipe(), out, resume=True)


def test_a_full_disk_leaves_the_state_before_intact(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        run(tiny_recipe(), out, stop=After(4))
    before = (out / "state" / "state.pt").read_bytes()

    # A file of at most 50 kB: the state and the weights don't fit, the metrics do.
    before_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before_limit[1]))
    try:
        with pytest.raises(OSError, match=r"state.pt could not be written \(.*File too large\); what was saved before"):
            run(tiny_recipe(), out, resume=True, save_seconds=0.0)
        with pytest.raises(OSError, match=r"align-block-\d+ could not be written \(.*too large.*--resume"):
            run(tiny_recipe(), out, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before_limit)
    assert (out / "state" / "state.pt").read_bytes() == before
    assert os.listdir(out / "state") == ["state.pt"], "nothing half-written stays"
    assert not list((out / "checkpoints").glob(".*"))
    run(tiny_recipe(), out, resume=True)


def test_a_resume_with_another_recipe_lists_the_differences(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tiny_recipe(), tmp_path / "run", stop=After(2))
    other = parse(changed(tiny_recipe().model_dump(mode="json"), ["seed=5", "stages.distill.lr=0.5"]))
    with pytest.raises(
        ValueError, match=r"seed \(0, now 5\).*stages.distill.lr \(0.003, now 0.5\)|stages.distill.lr.*seed"
    ):
        run(other, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="holds a run of the recipe 'tiny': add --resume"):
        run(tiny_recipe(), tmp_path / "run")


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run that could go on"):
        run(tiny_recipe(), tmp_path / "none", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="holds something else than a run"):
        run(tiny_recipe(), tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    class Second(After):
        def why(self) -> tuple[str, int] | None:
            with pytest.raises(ValueError, match="another process is training into"):
                run(tiny_recipe(), tmp_path / "run", resume=True)
            return super().why()

    with pytest.raises(Stopped):
        run(tiny_recipe(), tmp_path / "run", stop=Second(2))
    run(tiny_recipe(), tmp_path / "run", resume=True)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tiny_recipe(), tmp_path / "run", stop=After(2))
    (tmp_path / "run" / "state" / "state.pt").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="state.pt can't be read .* its checkpoints are whole"):
        run(tiny_recipe(), tmp_path / "run", resume=True)


def test_one_stage_alone_runs_after_those_before_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="stage 'distil' is not in the recipe"):
        run(tiny_recipe(), out, stage="distil")
    with pytest.raises(ValueError, match="needs align-qk first"):
        run(tiny_recipe(), out, stage="distill")
    assert run(tiny_recipe(), out, stage="align-qk").name.startswith("align-qk-")
    assert run(tiny_recipe(), out, stage="align-block", resume=True).name.startswith("align-block-")
    with pytest.raises(ValueError, match="is done already"):
        run(tiny_recipe(), out, stage="align-qk", resume=True)
    assert run(tiny_recipe(), out, resume=True).name.startswith("instruct-")


def test_a_tokenizer_of_another_teacher_is_refused(tmp_path: Path) -> None:
    small = describe(tiny_teacher("llama", vocab_size=300), tiny_tokenizer(), "small")
    with pytest.raises(ValueError, match="knows 400 tokens, its model has embeddings for 300"):
        run(tiny_recipe(), tmp_path / "run", small)


def test_rows_longer_than_the_window_are_refused(tmp_path: Path) -> None:
    recipe = parse(changed(tiny_recipe().model_dump(mode="json"), ["stages.align-qk.seq_len=4096"]))
    with pytest.raises(ValueError, match="seq_len is 4096, but the model's window"):
        run(recipe, tmp_path / "run")


def test_sigterm_is_heard_once_and_the_handler_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with distill.train.listening(None) as stop:
        assert stop.why() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.why() == ("stopped by SIGTERM", 143)
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before
    with distill.train.listening(0.0) as stop:
        assert stop.why() == ("the time given is used up", 0)
