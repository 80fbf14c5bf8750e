"""The gate's verdicts: by hand, in simulation, and for everything that must be refused."""

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from evalkit.records import GENERATION, LOGLIKELIHOOD
from evalkit.store import Run
from reports.baseline import baseline_of, read_baseline, update_baseline
from reports.gate import Margins, Verdict, exit_code, gate, sentence
from reports.gate_output import calibration, check_json, check_markdown, junit, read_margins, save_check
from tests.reports.runs import flipped, run_of


def some(n: int, share: float = 0.7) -> np.ndarray:
    return np.random.default_rng(n).random(n) < share


def checked(old: Run, new: Run, **margins: object) -> Verdict:
    return gate(new, baseline_of(old), Margins.model_validate(margins))


def one_task(right: np.ndarray, other: np.ndarray | None = None, **more: object) -> Run:
    return run_of({"t": (right.tolist(), (right if other is None else other).tolist())}, **more)  # type: ignore[arg-type]


def test_fifty_identical_items_are_inconclusive_and_say_how_many_would_do() -> None:
    run = one_task(some(50, 0.9))
    found = checked(run, run)
    assert found.result == "inconclusive" and found.exit_code == 3
    z2 = stats.norm.ppf(0.95) ** 2
    for one in found.primaries:
        assert one.loss.high == pytest.approx(z2 / (50 + z2)) and round(100 * one.loss.high, 1) == 5.1
        assert one.needed == math.ceil(z2 * (1 / 0.02 - 1)) == 133
    assert "133 items like these would settle it" in sentence(found)
    enough = one_task(some(133, 0.9))
    assert checked(enough, enough).result == "pass"


def test_equal_models_with_a_tenth_of_answers_flipped_pass_at_5000_items() -> None:
    rng, results = np.random.default_rng(0), []
    old = some(5000)
    base = baseline_of(one_task(old))
    for _ in range(60):
        new = run_of({"t": (flipped(rng, old, 0.05, 0.05).tolist(), flipped(rng, old, 0.05, 0.05).tolist())})
        results.append(gate(new, base, Margins()).result)
    assert results.count("pass") >= 0.95 * len(results)
    assert "regression" not in results


def test_five_points_lost_on_2000_items_are_a_regression() -> None:
    rng, results = np.random.default_rng(1), []
    old = some(2000)
    base = baseline_of(one_task(old))
    for _ in range(60):
        new = run_of({"t": (flipped(rng, old, 0.10, 0.05).tolist(), flipped(rng, old, 0.10, 0.05).tolist())})
        results.append(gate(new, base, Margins()).exit_code)
    assert results.count(1) >= 0.95 * len(results)


def test_ten_tasks_of_equal_models_pass_together() -> None:
    """Asking each of them to pass at 2 points would fail them nearly always."""
    rng, results = np.random.default_rng(2), []
    old = {f"t{i}": some(1000 + i) for i in range(10)}
    base = baseline_of(run_of({name: (right.tolist(), right.tolist()) for name, right in old.items()}))
    for _ in range(12):
        new = {name: tuple(flipped(rng, right, 0.05, 0.05).tolist() for _ in range(2)) for name, right in old.items()}
        results.append(gate(run_of(new), base, Margins()).result)  # type: ignore[arg-type]
    assert results.count("pass") >= 11


@pytest.mark.slow
@pytest.mark.parametrize(("n", "tasks"), [(100, 1), (400, 1), (300, 3), (1500, 1)])
def test_the_gate_errs_no_more_than_alpha(n: int, tasks: int) -> None:
    """Equal models are no regression, and a loss of the margin itself does not pass, more often than alpha."""
    rng, alarms, passes = np.random.default_rng(n), [], []
    old = {f"t{i}": some(n + i) for i in range(tasks)}
    base = baseline_of(run_of({name: (right.tolist(), right.tolist()) for name, right in old.items()}))

    def drawn(lost: float, gained: float) -> Run:
        return run_of({k: tuple(flipped(rng, r, lost, gained).tolist() for _ in range(2)) for k, r in old.items()})  # type: ignore[misc]

    draws = 500
    for _ in range(draws):
        alarms.append(gate(drawn(0.06, 0.06), base, Margins()).result == "regression")
        passes.append(gate(drawn(0.07, 0.05), base, Margins()).result == "pass")
    slack = 2 * (0.05 * 0.95 / draws) ** 0.5
    assert np.mean(alarms) <= 0.05 + slack and np.mean(passes) <= 0.05 + slack


def test_both_primaries_must_pass() -> None:
    rng, old = np.random.default_rng(3), some(3000)
    new = one_task(old, flipped(rng, old, 0.09, 0.02))
    found = checked(one_task(old), new)
    by = {one.mode: one.decision for one in found.primaries}
    assert by == {LOGLIKELIHOOD: "pass", GENERATION: "regression"} and found.exit_code == 1
    assert checked(one_task(old), new, primaries=["loglikelihood"], guardrail=20).result == "pass"


def test_a_small_loss_that_shows_is_tolerated() -> None:
    rng, old = np.random.default_rng(4), some(20_000)
    found = checked(one_task(old), one_task(flipped(rng, old, 0.012, 0.003)))
    assert {one.decision for one in found.primaries} == {"tolerated"} and found.exit_code == 0
    assert "measurable, tolerated" in sentence(found)


def test_a_task_that_collapses_trips_its_guardrail_though_the_average_passes() -> None:
    old = {f"t{i}": some(900 + i) for i in range(10)}
    new = {name: (right.tolist(), right.tolist()) for name, right in old.items()}
    base = run_of(new)
    drop = old["t3"].copy()
    drop[: len(drop) // 6] = False
    found = checked(base, run_of({**new, "t3": (old["t3"].tolist(), drop.tolist())}))
    assert {one.decision for one in found.primaries} <= {"pass", "tolerated"}
    assert [(one.task, one.mode) for one in found.guardrails if one.failed] == [("t3", GENERATION)]
    assert found.result == "regression" and "beyond its guardrail of 5 points" in sentence(found)
    assert (
        checked(base, run_of({**new, "t3": (old["t3"].tolist(), drop.tolist())}), guardrails={"t3": 30}).exit_code == 0
    )


def refusals() -> dict[str, tuple[Run, str]]:
    right = some(200)
    both = (right.tolist(), right.tolist())
    fewer = (right[:150].tolist(), right[:150].tolist())
    return {
        "missing task": (run_of({"other": both}), "task 't' is missing"),
        "other items": (run_of({"t": fewer}), "t: items (50 of the baseline are missing, 0 are not in it)"),
        "prompts": (run_of({"t": both}, prompt="fedcba9876543210"), "t: the prompts of 200 of 200 items"),
        "rules": (run_of({"t": both}, rules="strict"), "setting rules ('lenient' in the baseline, now 'strict')"),
        "version": (run_of({"t": both}, version="0.2.0"), "evalkit (0.1.0 in the baseline, now 0.2.0"),
    }


@pytest.mark.parametrize("name", list(refusals()))
def test_what_was_asked_otherwise_is_refused_with_the_difference_named(name: str) -> None:
    new, told = refusals()[name]
    found = checked(run_of({"t": (some(200).tolist(), some(200).tolist())}), new)
    assert found.result == "not comparable" and found.exit_code == 3
    assert told in sentence(found)
    suite = ElementTree.fromstring(junit([found])).find("testsuite")
    assert suite is not None and suite.get("errors") == "1"


def test_another_chat_template_is_named() -> None:
    right = some(200)
    old = one_task(right, chat=True, parts={"chat_template": "a"})
    new = one_task(right, chat=True, parts={"chat_template": "b"}, prompt="fedcba9876543210")
    assert "200 items: the chat template differs" in sentence(checked(old, new))


def test_other_gold_answers_are_refused() -> None:
    right = some(200)
    old = one_task(right)
    records = list(old.records("t").values())
    from dataclasses import replace

    new = Run(old.manifest, [replace(records[0], gold=3), *records[1:]])
    assert "t: the gold answers of 1 items" in sentence(checked(old, new))


def test_a_baseline_without_signal_never_passes() -> None:
    guess = some(600, 0.25)
    found = checked(one_task(guess), one_task(guess))
    assert found.result == "not comparable" and "above its floor" in sentence(found)


def test_a_mode_that_was_not_scored_never_passes() -> None:
    right = some(2000)
    old = one_task(right, modes=("loglikelihood",))
    assert "the primary generation was not scored" in sentence(checked(old, old))
    assert checked(old, old, primaries=["loglikelihood"]).result == "pass"


def test_no_verdict_at_all_is_no_pass() -> None:
    assert exit_code([]) == 3


def test_clustered_items_need_more_of_them() -> None:
    right = np.repeat(some(100), 10)
    lost = right.copy()
    lost[:20] = False
    names = [str(i // 10) for i in range(1000)]
    alone, together = (
        checked(one_task(right, clusters=c), one_task(lost, clusters=c)).primaries[0].loss for c in (None, names)
    )
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_a_baseline_file_says_what_its_run_says_and_is_small(tmp_path: Path) -> None:
    rng, old = np.random.default_rng(5), some(2000)
    run = one_task(old)
    file = tmp_path / "base" / "release.json"
    update_baseline(run, file, anchor=False)
    assert read_baseline(file) == baseline_of(run)
    assert file.stat().st_size < 25 * 2000
    new = one_task(flipped(rng, old, 0.08, 0.05))
    assert gate(new, read_baseline(file), Margins()) == gate(new, baseline_of(run), Margins())


def test_updating_never_moves_an_anchor(tmp_path: Path) -> None:
    anchor, release = tmp_path / "anchor.json", tmp_path / "release.json"
    update_baseline(one_task(some(100), name="first"), anchor, anchor=True)
    update_baseline(one_task(some(100), name="first"), release, anchor=False)
    before = anchor.read_bytes()
    for pin in (True, False):
        with pytest.raises(ValueError, match="is a pinned anchor .first. and is never moved"):
            update_baseline(one_task(some(100), name="second"), anchor, anchor=pin)
    update_baseline(one_task(some(100), name="second"), release, anchor=False)
    assert anchor.read_bytes() == before and read_baseline(release).name == "second"


def test_what_is_no_baseline_is_neither_read_nor_written_over(tmp_path: Path) -> None:
    notes = tmp_path / "notes.json"
    notes.write_text('{"schema": "evalkit.run/1"}')
    for call in (lambda: read_baseline(notes), lambda: update_baseline(one_task(some(50)), notes, False)):
        with pytest.raises(ValueError, match=r"notes.json has the schema 'evalkit.run/1'; this evalkit reads"):
            call()
    assert notes.read_text() == '{"schema": "evalkit.run/1"}'
    with pytest.raises(ValueError, match="there is no baseline"):
        read_baseline(tmp_path / "none.json")
    file = tmp_path / "base.json"
    update_baseline(one_task(some(50)), file, False)
    file.write_text(file.read_text().replace('"correct', '"x').replace("00001", "00002", 1)[:-40])
    with pytest.raises(ValueError, match="is no baseline, or damaged"):
        read_baseline(file)


def test_margins_come_from_yaml_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "margins.yaml"
    file.write_text("alpha: 0.1\nmargins: {generation: 3}\nguardrail: 8\nguardrails: {quick: 12}\n")
    found = read_margins(file, {"loglikelihood": 1.5, "generation": None, "alpha": None, "guardrail": None})
    assert (found.alpha, found.margins.loglikelihood, found.margins.generation) == (0.1, 1.5, 3)
    assert found.guardrails == {"quick": 12} and read_margins(None, {}) == Margins()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("alpha: 2", "field 'alpha' is 2"),
        ("margin: 3", "field 'margin' is 3: extra inputs are not permitted"),
        ("margins: {generation: -1}", "field 'margins.generation' is -1"),
        ("margins: 3", "field 'margins' is"),
        ("- 1", "holds a list"),
        ("a: [", "is not YAML"),
        ("primaries: [both]", "field 'primaries.0' is 'both'"),
    ],
)
def test_wrong_margins_name_file_and_field(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"m\.yaml") as error:
        read_margins(tmp_path / "m.yaml", {})
    assert told in str(error.value)


def test_json_markdown_and_junit_say_the_same(tmp_path: Path) -> None:
    rng, old = np.random.default_rng(6), some(2000)
    base, new = one_task(old, name="old|<b>"), one_task(flipped(rng, old, 0.12, 0.03), name="new")
    verdicts = [checked(base, new), checked(base, base)]
    save_check(tmp_path, new, verdicts, Margins())
    told = json.loads((tmp_path / "check.json").read_text())
    assert told == json.loads(json.dumps(check_json(new, verdicts, Margins())))
    assert told["exit_code"] == 1 and [v["result"] for v in told["verdicts"]] == ["regression", "pass"]
    text = check_markdown(new, verdicts)
    assert "<b>" not in text
    for one in verdicts[0].primaries:
        assert f"{100 * one.loss.mean:+.1f}" in text
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    first, second = root.findall("testsuite")
    assert int(first.get("failures", 0)) >= 2 and second.get("failures") == second.get("errors") == "0"
    assert len(first.findall("testcase")) == int(first.get("tests", 0)) == 5


def test_calibration_counts_flips_of_one_model() -> None:
    right = some(400)
    again = right.copy()
    again[:3] = ~again[:3]
    found = calibration(one_task(right, again), one_task(right))
    cells = {cell["mode"]: cell for cell in found["cells"]}
    assert cells[LOGLIKELIHOOD]["flips"] == 0 and cells[GENERATION]["flips"] == pytest.approx(3 / 400)
    with pytest.raises(ValueError, match="compares a model with itself"):
        calibration(one_task(right, fingerprint="g"), one_task(right))
    with pytest.raises(ValueError, match="needs the same items"):
        calibration(one_task(right[:300]), one_task(right))
