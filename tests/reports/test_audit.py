"""The audit: what is drawn tells nothing, what is labelled comes back as error and corrected gap."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from evalkit.records import GENERATION
from evalkit.stats.stratified import Stratum, stratified_rate
from evalkit.store import Run
from reports.audit import COLUMNS, audit_markdown, draw, read_labels, save_sheet, score
from tests.reports.runs import run_of

N = 400


def sides() -> tuple[Run, Run]:
    rng = np.random.default_rng(0)
    teacher, student = rng.random(N) < 0.8, rng.random(N) < 0.6
    return (
        run_of({"t": (teacher.tolist(), teacher.tolist())}, name="big"),
        run_of({"t": (student.tolist(), student.tolist())}, name="small", fingerprint="g"),
    )


def test_the_sheet_is_blind_and_stratified() -> None:
    rows, key = draw(*sides(), 80)
    assert len(rows) == 80 and set(rows[0]) == set(COLUMNS) and all(row["label"] == "" for row in rows)
    text = " ".join(" ".join(row.values()) for row in rows)
    assert not any(word in text for word in ("big", "small", "teacher", "student", "correct", "marker"))
    drawn = [told["stratum"] for told in key["replies"].values()]
    assert {drawn.count(name) for name in key["strata"]} == {20}, "an equal share of each"
    who = [key["replies"][row["id"]]["who"] for row in rows]
    assert who != sorted(who) and who != sorted(who, reverse=True), "the order tells nothing"


def test_the_same_seed_draws_the_same_and_small_strata_give_all() -> None:
    assert draw(*sides(), 50) == draw(*sides(), 50)
    assert [row["id"] for row in draw(*sides(), 50, seed=1)[0]] != [row["id"] for row in draw(*sides(), 50)[0]]
    rows, key = draw(*sides(), 10_000)
    assert len(rows) == 2 * N == sum(key["strata"].values())


def label(folder: Path, wrong: set[str] = frozenset(), blank: int = 0) -> None:  # type: ignore[assignment]
    """Write what extraction found as the label; ``wrong``: strata in which the person reads the opposite."""
    key = json.loads((folder / "audit.key.json").read_text())
    with open(folder / "audit.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows[blank:]:
        told = key["replies"][row["id"]]
        right = (told["outcome"] == "correct") != (told["stratum"] in wrong)
        row["label"] = told["gold"][0].lower() if right else "none"
    with open(folder / "audit.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def test_labels_that_agree_leave_the_gap_as_it_was(tmp_path: Path) -> None:
    save_sheet(tmp_path, *draw(*sides(), 120))
    label(tmp_path, blank=20)
    result = score(*read_labels(tmp_path))
    [task] = result["tasks"]
    assert (result["labelled"], result["drawn"]) == (100, 120)
    assert task["corrected_gap"]["mean"] == pytest.approx(task["gap"]["mean"])
    low, high = task["corrected_gap"]["ci95"]
    assert low < task["gap"]["ci95"][0] and high > task["gap"]["ci95"][1], "labels add doubt"
    for cell in task["models"].values():
        assert cell["error"]["mean"] == 0 and cell["error"]["ci95"][1] > 0
        assert cell["corrected"]["mean"] == pytest.approx(cell["accuracy"])


def test_an_extractor_that_misses_the_students_answers_is_found_out(tmp_path: Path) -> None:
    save_sheet(tmp_path, *draw(*sides(), 2 * N))
    label(tmp_path, wrong={"t · student · wrong"})
    [task] = score(*read_labels(tmp_path))["tasks"]
    student = task["models"]["student"]
    assert student["missed"]["mean"] == pytest.approx(1 - student["accuracy"]) and student["credited"]["mean"] == 0
    assert student["corrected"]["mean"] == pytest.approx(1.0)
    assert student["corrected"]["ci95"] == [1.0, 1.0], "all replies were looked at"
    assert task["corrected_gap"]["mean"] == pytest.approx(task["models"]["teacher"]["accuracy"] - 1.0)
    assert "missed" in audit_markdown(score(*read_labels(tmp_path))).casefold()


def test_stratified_rates_are_covered() -> None:
    rng, held = np.random.default_rng(1), []
    strata = ((900, 60, 0.02), (80, 60, 0.3), (20, 20, 0.5))
    for _ in range(600):
        populations = [rng.random(size) < rate for size, _, rate in strata]
        truth = np.concatenate(populations).mean()
        parts = [
            Stratum(population=size, sampled=taken, hits=int(population[:taken].sum()))
            for (size, taken, _), population in zip(strata, populations, strict=True)
        ]
        found = stratified_rate(parts)
        held.append(found.low - 1e-9 <= truth <= found.high + 1e-9)
    assert np.mean(held) >= 0.93


def test_a_reply_that_looks_like_a_formula_is_shown(tmp_path: Path) -> None:
    rows, key = draw(*sides(), 4)
    rows[0]["reply"] = '=HYPERLINK("x")'
    save_sheet(tmp_path, rows, key)
    with open(tmp_path / "audit.csv", newline="") as file:
        assert next(csv.DictReader(file))["reply"] == '\'=HYPERLINK("x")'


def test_a_sheet_of_json_lines_is_scored_like_one_of_a_spreadsheet(tmp_path: Path) -> None:
    results = []
    for form in ("csv", "jsonl"):
        folder = tmp_path / form
        sheet = save_sheet(folder, *draw(*sides(), 40), form)
        assert sheet.name == f"audit.{form}"
        if form == "csv":
            label(folder)
        else:
            labels, _ = read_labels(tmp_path / "csv")
            rows = [json.loads(line) for line in sheet.read_text().splitlines()]
            sheet.write_text("".join(json.dumps({**row, "label": labels[row["id"]]}) + "\n" for row in rows))
        results.append(score(*read_labels(folder)))
    assert results[0] == results[1]
    sheet.write_text(sheet.read_text() + "{\n")
    with pytest.raises(ValueError, match=r"audit.jsonl, line 41: no JSON"):
        read_labels(tmp_path / "jsonl")
    sheet.write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match=r"line 1: needs the fields 'id' and 'label'"):
        read_labels(tmp_path / "jsonl")
    (tmp_path / "jsonl" / "audit.csv").write_text("id,label\n")
    with pytest.raises(ValueError, match="remove the one without labels"):
        read_labels(tmp_path / "jsonl")


def test_a_sheet_is_never_written_over(tmp_path: Path) -> None:
    save_sheet(tmp_path, *draw(*sides(), 8))
    label(tmp_path)
    before = (tmp_path / "audit.csv").read_bytes()
    with pytest.raises(ValueError, match=r"audit.csv exists and may hold labels"):
        save_sheet(tmp_path, *draw(*sides(), 8))
    assert (tmp_path / "audit.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text, "holds no label yet"),
        (lambda text: text.replace("label", "answer", 1), "needs the columns 'id' and 'label'"),
        (lambda text: text.rstrip("\n") + "E\n", "label 'E' is none of A, B, C, D, 'other' or 'none'"),
        (lambda text: text + "0000,q,o,r,A\n", "id '0000' is not in audit.key.json"),
        (lambda text: text + text[text.index("\n") + 1 :], "stands there twice"),
    ],
)
def test_a_spoiled_sheet_is_named_with_its_line(change, told: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_sheet(tmp_path, *draw(*sides(), 6))
    file = tmp_path / "audit.csv"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError) as error:
        read_labels(tmp_path)
    assert told in str(error.value)


def test_runs_without_replies_and_folders_without_a_sheet_are_refused(tmp_path: Path) -> None:
    right = [True] * 30
    run = run_of({"t": (right, right)}, modes=("loglikelihood",))
    bare = Run(
        run.manifest,
        [
            type(r)(
                **{f: getattr(r, f) for f in r.__slots__ if f != "outcomes"},
                outcomes=tuple(o for o in r.outcomes if o.mode != GENERATION),
            )
            for r in run.records("t").values()
        ],
    )
    with pytest.raises(ValueError, match="no generated replies to audit"):
        draw(bare, bare, 10)
    with pytest.raises(ValueError, match="draw a sample first"):
        read_labels(tmp_path)
