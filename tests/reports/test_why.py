"""What stands beside each gap: both units, tests, flows, agreement, signal and the half that decided it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from evalkit.records import GENERATION, LOGLIKELIHOOD, ItemRecord, Verdict
from evalkit.stats.floors import deciding, has_signal
from evalkit.stats.paired_tests import mcnemar
from evalkit.store import Run
from reports.compare import Comparison
from tests.reports.test_compare import RIGHT, make_run, repeated

WRONG: dict[str, Verdict] = {"cloze": "wrong", "GEN": "wrong"}
LL_ONLY: dict[str, Verdict] = {"cloze": "correct", "GEN": "unparsed"}


def changed(run: Run, change) -> Run:  # type: ignore[no-untyped-def]
    return Run(run.manifest, [change(record) for record in run.records("t").values()])


def test_both_units_and_a_verdict_in_json_and_in_the_sentence() -> None:
    teacher = make_run(repeated((180, RIGHT), (20, WRONG)))
    made = Comparison(teacher, make_run(repeated((100, RIGHT), (80, LL_ONLY), (20, WRONG))))
    [task] = made.result["tasks"]
    gap = task["hidden_gap"]
    # Two options: an unread reply scores 0 where a wrong guess scores -1, so the same items weigh alike here.
    assert gap["mean"] == pytest.approx(0.4) and gap["formula"]["mean"] == pytest.approx(0.4)
    assert gap["verdict"] == "log-likelihood hides loss"
    assert made.result["overall"]["hidden_gap"]["formula"]["mean"] == pytest.approx(0.4)
    assert "in raw points and of +40.0" in made.to_markdown() and "log-likelihood hides loss" in made.to_markdown()


def test_a_student_that_is_ahead_in_both_modes_loses_nothing() -> None:
    """A fine-tuned model beside its base: the same verdicts, said of a gain."""
    base = make_run(repeated((60, WRONG), (140, RIGHT)))
    spoken = Comparison(base, make_run(repeated((40, RIGHT), (20, LL_ONLY), (140, RIGHT)))).to_markdown()
    assert "log-likelihood shows more gain than generation does" in spoken and "hides loss" not in spoken
    said_only = {"cloze": "wrong", "GEN": "correct"}
    spoken = Comparison(base, make_run(repeated((20, RIGHT), (40, said_only), (140, RIGHT)))).to_markdown()
    assert "generation gains more than log-likelihood shows" in spoken and "more loss" not in spoken


def test_the_sign_of_a_hidden_gap_can_depend_on_the_unit() -> None:
    """Log-likelihood falls to guessing among two, generation to silence: raw says that generation lost more, and the
    formula score, in which a guess is worth nothing, that log-likelihood did."""
    teacher = make_run(repeated((400, RIGHT)))
    student = make_run(
        repeated((100, {"cloze": "correct", "GEN": "empty"}), (100, {"cloze": "wrong", "GEN": "empty"}), (200, RIGHT))
    )
    made = Comparison(teacher, student)
    gap = made.result["tasks"][0]["hidden_gap"]
    assert gap["mean"] == pytest.approx(0.25) and gap["ci95"][0] > 0
    assert gap["formula"]["mean"] == pytest.approx(0.0)
    assert gap["verdict"] == "depends on the scale"
    assert "which mode loses more depends on the scale" in made.to_markdown()
    assert "hides loss" not in made.to_markdown()


def test_identical_models_show_no_difference() -> None:
    run = make_run(repeated((90, RIGHT), (10, WRONG)))
    gap = Comparison(run, run).result["tasks"][0]["hidden_gap"]
    assert gap["verdict"] == "no difference shown" and gap["test"]["p"] == 1.0


def test_flows_add_up_to_the_gap_by_generation() -> None:
    student = repeated((50, RIGHT), (20, LL_ONLY), (15, {"cloze": "correct", "GEN": "truncated"}), (15, WRONG))
    made = Comparison(make_run(repeated((90, RIGHT), (10, WRONG))), make_run(student))
    [task] = made.result["tasks"]
    assert sum(row["net"] for row in task["flows"]) == pytest.approx(task["modes"][GENERATION]["gap"]["mean"])
    assert [row["outcome"] for row in task["flows"][:2]] == ["unparsed", "truncated"], "the largest first"
    assert "add up to its loss by generation" in made.to_markdown()


def test_tests_are_mcnemars_and_holms_over_the_tasks_with_signal() -> None:
    rows = repeated((90, RIGHT), (10, WRONG))
    lost = repeated((80, RIGHT), (10, LL_ONLY), (10, WRONG))
    names = ("a", "b", "floor")
    sides = []
    for second in (rows, lost):
        runs = [make_run(second if name == "a" else rows, task=name) for name in ("a", "b")]
        runs.append(make_run(repeated((50, RIGHT), (50, WRONG)), task="floor"))
        manifest = runs[0].manifest.model_copy(update={"tasks": tuple(r.manifest.tasks[0] for r in runs)})
        records = [x for name, run in zip(names, runs, strict=True) for x in run.records(name).values()]
        sides.append(Run(manifest, records))
    found = {task["name"]: task for task in Comparison(*sides).result["tasks"]}
    test = found["a"]["modes"][GENERATION]["test"]
    assert (test["p"], test["mid_p"]) == pytest.approx(mcnemar(10, 0))
    assert test["holm_p"] == pytest.approx(2 * test["p"]) and test["family"] == "loss by generation"
    assert found["floor"]["modes"][GENERATION]["test"]["holm_p"] is None, "no signal: not in the family"
    assert found["a"]["hidden_gap"]["test"]["holm_p"] == pytest.approx(2 * found["a"]["hidden_gap"]["test"]["p"])


def test_clusters_get_a_sign_flip_test_and_a_wild_bootstrap() -> None:
    clusters = [str(i // 10) for i in range(200)]
    teacher = make_run(repeated((200, RIGHT)), clusters=clusters)
    student = make_run(repeated((50, LL_ONLY), (150, RIGHT)), clusters=clusters)
    made = Comparison(teacher, student)
    [task] = made.result["tasks"]
    cell = task["modes"][GENERATION]
    assert "cluster sign-flip; wild bootstrap [" in made.to_markdown()
    assert task["clusters"] == 20 and cell["test"]["name"] == "cluster sign-flip"
    assert cell["test"]["p"] == pytest.approx(2 / 2**5), "five clusters lost all, fifteen nothing"
    low, high = cell["wild_ci95"]
    assert low < cell["gap"]["mean"] < high and math.isfinite(low + high)


def test_recovery_only_where_the_teacher_is_above_zero_in_both_modes() -> None:
    teacher = make_run(repeated((90, RIGHT), (10, WRONG)))
    student = make_run(repeated((80, RIGHT), (20, WRONG)))
    [task] = Comparison(teacher, student).result["tasks"]
    kept = task["recovery"][LOGLIKELIHOOD]
    assert kept["mean"] == pytest.approx(0.6 / 0.8) and kept["raw"] == pytest.approx(80 / 90)
    assert kept["keeps_90"] is False
    mute = make_run(repeated((90, {"cloze": "correct", "GEN": "empty"}), (10, WRONG)))
    assert Comparison(mute, mute).result["tasks"][0]["recovery"] is None
    assert Comparison(teacher, teacher).result["tasks"][0]["recovery"][GENERATION]["keeps_90"] is True


def test_agreement_of_the_modes_is_told_per_model() -> None:
    made = Comparison(make_run(repeated((90, RIGHT), (10, WRONG))), make_run(repeated((60, RIGHT), (40, LL_ONLY))))
    agreement = made.result["tasks"][0]["agreement"]
    assert agreement["teacher"]["kappa"]["mean"] == pytest.approx(1.0)
    assert agreement["student"]["loglikelihood_only"] == 40 and agreement["student"]["generation_only"] == 0
    assert agreement["student"]["kappa"]["mean"] == pytest.approx(0.0)


def test_mass_and_options_are_read_from_what_is_stored() -> None:
    run = make_run(repeated((40, RIGHT)))

    def letters(record: ItemRecord) -> ItemRecord:
        scores = (math.log(0.3), math.log(0.1))
        return replace(
            record,
            outcomes=tuple(replace(o, logprobs=scores) if o.mode == LOGLIKELIHOOD else o for o in record.outcomes),
        )

    made = Comparison(changed(run, letters), run)
    cell = made.result["tasks"][0]["modes"][LOGLIKELIHOOD]
    assert cell["mass"]["teacher"]["mean"] == pytest.approx(0.4) and cell["mass"]["teacher"]["n"] == 40
    assert cell["options"] == {"gold": [20, 20], "teacher": [40, 0], "student": [40, 0]}


def test_signal_is_decided_on_a_fixed_half_of_the_items() -> None:
    run = make_run(repeated((200, RIGHT)))
    records = list(run.records("t").values())
    half = deciding(records)
    assert 70 < sum(half) < 130 and deciding(records) == half
    entry = run.manifest.entry("t")

    def right(on: bool) -> list[ItemRecord]:
        wrong = replace(records[0].outcomes[0], outcome="wrong")
        return [r if decides is on else replace(r, outcomes=(wrong,)) for r, decides in zip(records, half, strict=True)]

    assert has_signal(right(True), entry, LOGLIKELIHOOD), "right on the items that decide"
    assert not has_signal(right(False), entry, LOGLIKELIHOOD), "right on the others only"
    made = Comparison(run, make_run(repeated((120, RIGHT), (80, LL_ONLY))))
    assert made.result["tasks"][0]["signal_items"] == sum(half)
    assert made.result["held_out"]["items"] == 200 - sum(half)
    assert made.result["held_out"]["hidden_gap"]["mean"] > 0.2


def test_few_items_all_decide() -> None:
    records = list(make_run(repeated((30, RIGHT))).records("t").values())
    assert all(deciding(records))
    made = Comparison(make_run(repeated((30, RIGHT))), make_run(repeated((30, RIGHT))))
    assert made.result["tasks"][0]["signal"] == {LOGLIKELIHOOD: True, GENERATION: True}
    assert made.result["held_out"] is None


def test_replies_part_where_they_first_differ() -> None:
    one, other = make_run(repeated((4, RIGHT))), make_run(repeated((4, RIGHT)))

    def say(text: str):  # type: ignore[no-untyped-def]
        return lambda record: replace(record, outcomes=tuple(replace(o, reply=text) for o in record.outcomes))

    assert Comparison(one, other).result["tasks"][0]["divergence"] == {"same": 1.0, "characters": None, "words": None}
    made = Comparison(changed(one, say("It is Paris.")), changed(other, say("It is Rome.")))
    assert made.result["tasks"][0]["divergence"] == {"same": 0.0, "characters": 6.0, "words": 2.0}
    assert "| t | 4 | 0.0 | 2 | 6 |" in made.to_markdown()


def test_every_figure_is_a_number_that_json_holds(tmp_path: Path) -> None:
    clusters = ["a"] * 5 + ["b"] * 5
    run = make_run(repeated((5, RIGHT), (5, WRONG)), clusters=clusters)
    made = Comparison(run, run)
    made.save(tmp_path)
    assert "NaN" not in (tmp_path / "compare.json").read_text()
    assert "Infinity" not in json.dumps(made.result)


def test_answers_that_change_with_the_order_of_the_options_are_counted(tiny_folder: Path) -> None:
    import evalkit as ek

    run = ek.run(tiny_folder, ["quick"], limit=6, view="letters", permutations=4)
    assert len(run.records("quick")) == 24 and len({r.cluster for r in run.records("quick").values()}) == 6
    [task] = ek.compare(run, run).result["tasks"]
    assert task["clusters"] == 6
    for cell in task["modes"].values():
        found = cell["permutations"]["teacher"]
        assert found["items"] == 6 and len(found["accuracy"]) == 4
        assert sum(found["accuracy"]) / 4 == pytest.approx(cell["teacher"]["accuracy"])
    same = task["modes"][LOGLIKELIHOOD]["permutations"]["teacher"]["same"]["mean"]
    by_item: dict[str, set[str]] = {}
    for record in run.records("quick").values():
        outcome = record.outcome(LOGLIKELIHOOD, "letters")
        assert outcome is not None and outcome.choice is not None
        by_item.setdefault(record.cluster, set()).add(record.choices[outcome.choice])
    assert same == pytest.approx(sum(len(texts) == 1 for texts in by_item.values()) / 6)
    assert "## Orders of the options" in ek.compare(run, run).to_markdown()
