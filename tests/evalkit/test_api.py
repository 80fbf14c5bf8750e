"""The notebook's words."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest

import evalkit as ek
import models.load as models_load
from tests.tiny import tiny_llama, tiny_tokenizer


def test_a_live_model_with_its_tokenizer_is_scored_and_left_as_it_was() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer)).train()
    run = ek.run(model, tasks=["quick"], tokenizer=tokenizer, limit=8, name="mine")
    assert run.tasks == ("quick",) and len(run.records("quick")) == 8
    assert "mine" in repr(run) and model.training
    with pytest.raises(ValueError, match="needs its tokenizer"):
        ek.run(model, tasks=["quick"])


def test_a_finished_run_says_where_its_time_and_tokens_went(tiny_folder: Path, tmp_path: Path) -> None:
    ek.run(tiny_folder, tasks=["quick"], limit=6, out=tmp_path / "run")
    [session] = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    profile = session["profile"]
    assert (profile["layout"], profile["why"], session["engine"]) == ("tree", "", "hf")
    phases = profile["phases"]
    assert set(phases) == {"prefill", "choices", "decode"}
    assert all(phase["seconds"] > 0 and phase["tokens"] > 0 for phase in phases.values())
    asked = sum(profile["tokens_asked"].values())
    assert asked == phases["prefill"]["tokens"] + phases["choices"]["tokens"] + profile["tokens_cached"]
    assert profile["passes"]["decode"] > 0 and profile["largest_batch"]["decode"] <= session["batch_size"]
    assert profile["out_of_memory_halvings"] == 0 and profile["ties"] >= 0


def test_runs_in_memory_on_disk_and_by_path_compare_alike(
    tiny_folder: Path, other_folder: Path, tmp_path: Path
) -> None:
    teacher = ek.run(tiny_folder, tasks=["quick", "arithmetic"], limit=10, out=tmp_path / "t")
    student = ek.run(str(other_folder), tasks=["quick", "arithmetic"], limit=10)
    live = ek.compare(teacher, student)
    assert ek.compare(tmp_path / "t", student).result["tasks"] == live.result["tasks"]
    assert live.hidden_gap("quick").n == 10
    assert ek.load_run(tmp_path / "t").records("quick") == teacher.records("quick")


def test_arc_easy_has_a_hidden_gap_inside_its_generation_view(
    tiny_folder: Path, other_folder: Path, shared_data: Path
) -> None:
    made = ek.compare(tiny_folder, other_folder, tasks=["arc_easy"], limit=6, data_dir=shared_data)
    assert made.hidden_gap("arc_easy").n == 6
    assert made.result["tasks"][0]["protocol_gap"]["parts"]["mode"]["mean"] == made.hidden_gap("arc_easy").mean


@pytest.mark.parametrize("mode", ["loglikelihood", "generation"])
def test_one_mode_alone(mode: str, tiny_folder: Path) -> None:
    run = ek.run(tiny_folder, tasks="quick", limit=4, mode=mode)
    assert {outcome.mode for record in run.records("quick").values() for outcome in record.outcomes} == {mode}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"limit": 0}, "setting 'limit' is 0"),
        ({"shots": -1}, "setting 'shots' is -1"),
        ({"mode": "all"}, "unknown mode 'all'"),
        ({"colour": "red"}, "setting 'colour'"),
        ({"normalisation": "log"}, "setting 'normalisation'"),
        ({"thinking": "budget=0"}, "budget=N"),
        ({"tasks": []}, "no task was named"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, object], told: str, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=told):
        ek.run(tiny_folder, **{"tasks": ["quick"], **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"chat": True}, {"chat": True, "shots": 2, "system": "Be brief."}, {"shots": 3}])
@pytest.mark.parametrize("view", ["open", "cloze", "letters", "text", "copy", "cloze:letters"])
def test_every_view_scores_with_and_without_chat(view: str, settings: dict[str, object], tiny_folder: Path) -> None:
    run = ek.run(tiny_folder, tasks=["quick"], limit=2, view=view, max_tokens=8, **settings)  # type: ignore[arg-type]
    assert all(len(record.outcomes) >= 2 for record in run.records("quick").values())


def test_options_shuffled_by_seed_keep_the_gold_text(tiny_folder: Path) -> None:
    plain = ek.run(tiny_folder, tasks=["quick"], limit=12, mode="loglikelihood").records("quick")
    mixed = ek.run(tiny_folder, tasks=["quick"], limit=12, mode="loglikelihood", shuffle_seed=3).records("quick")
    assert [r.choices[r.gold] for r in plain.values()] == [r.choices[r.gold] for r in mixed.values()]
    assert [r.choices for r in plain.values()] != [r.choices for r in mixed.values()]


def test_progress_reports_every_item(tiny_folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    ek.run(tiny_folder, tasks=["quick"], limit=5, progress=lambda *step: told.append(step))
    assert told[0] == ("quick", 0, 5) and told[-1] == ("quick", 5, 5)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_compare_of_runs_takes_tasks_and_normalisation_and_refuses_the_rest(
    tiny_folder: Path, other_folder: Path, tmp_path: Path
) -> None:
    made = {n: ek.run(f, tasks=["quick", "arithmetic"], limit=12) for n, f in (("t", tiny_folder), ("s", other_folder))}
    one = ek.compare(made["t"], made["s"], ["arithmetic"], normalisation="byte")
    assert one.tasks == ("arithmetic",)
    scored = ek.compare(tiny_folder, other_folder, ["arithmetic"], limit=12, normalisation="byte")
    assert one.result["tasks"][0]["modes"] == scored.result["tasks"][0]["modes"], "recomputed as if scored so"
    with pytest.raises(ValueError, match=r"limit 2 was asked for, but the run of .* was scored with 12"):
        ek.compare(made["t"], made["s"], limit=2)
    with pytest.raises(ValueError, match="task 'piqa' is not in the run"):
        ek.compare(made["t"], made["s"], ["piqa"])


def test_beside_a_run_a_model_is_scored_as_the_run_was(tiny_folder: Path, other_folder: Path) -> None:
    teacher = ek.run(tiny_folder, tasks=["copy"], limit=3, shots=1)
    made = ek.compare(teacher, other_folder)
    assert made.tasks == ("copy",) and made.result["settings"]["shots"] == 1
    with pytest.raises(ValueError, match="shots 0 was asked for"):
        ek.compare(teacher, other_folder, shots=0)


def test_two_runs_that_were_asked_differently_are_told_apart(tiny_folder: Path, other_folder: Path) -> None:
    one, two = ek.run(tiny_folder, ["quick"], limit=4), ek.run(other_folder, ["quick"], limit=5, shots=1)
    with pytest.raises(ValueError, match=r"settings differ in shots \(None against 1\); limit \(4 against 5\)"):
        ek.compare(one, two)


def test_an_option_that_equals_its_default_still_contradicts_a_run(tiny_folder: Path, other_folder: Path) -> None:
    strict = ek.run(tiny_folder, ["quick"], limit=4, rules="strict")
    with pytest.raises(ValueError, match="rules 'lenient' was asked for, but the run of .* was scored with 'strict'"):
        ek.compare(strict, other_folder, rules="lenient")
    assert ek.compare(strict, other_folder).result["settings"]["rules"] == "strict"


def test_a_runs_own_file_must_be_named_for_another_model(tiny_folder: Path, other_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "q?", "choices": ["a", "b"], "answer": 0}\n')
    teacher = ek.run(tiny_folder, [str(file)])
    with pytest.raises(ValueError, match=r"name its file: --tasks PATH/mine.jsonl"):
        ek.compare(teacher, other_folder)
    assert ek.compare(teacher, other_folder, [str(file)]).tasks == ("mine",)


def test_a_model_is_let_go_when_its_run_ends(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two large models of one comparison must not be in memory together."""
    models = []
    real = models_load.load

    def load(*args: Any, **options: Any) -> Any:
        loaded = real(*args, **options)
        models.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(models_load, "load", load)
    gc.collect()
    gc.disable()
    try:
        ek.run(tiny_folder, ["quick"], limit=4, device="cpu")
        assert [model() for model in models] == [None]
    finally:
        gc.enable()
