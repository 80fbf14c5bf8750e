"""The page in plain sentences: each claim with its interval, each section from compare.json."""

import json
import re
from pathlib import Path

import pytest

from reports.compare import Comparison
from reports.explain import examples, explain, read_comparison
from reports.table import signed
from tests.reports.test_compare import RIGHT, make_run, repeated
from tests.reports.test_why import LL_ONLY, WRONG


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    teacher = make_run(repeated((180, RIGHT), (20, WRONG)), name="big")
    student = make_run(repeated((120, RIGHT), (60, LL_ONLY), (20, WRONG)), name="a<b>")
    Comparison(teacher, student).save(tmp_path)
    return tmp_path


def test_the_page_says_what_compare_json_says(folder: Path) -> None:
    result, items = read_comparison(folder)
    text = explain(result, items, str(folder))
    [task] = result["tasks"]
    for cell in (task["modes"]["generation"]["gap"], task["hidden_gap"], task["hidden_gap"]["formula"]):
        assert signed(cell) in text
    assert "log-likelihood hides loss" in text and "right answers that became unparsed" in text
    for title in ("Verdict", "In figures", "Why", "Where", "What can't be concluded", "Where this comes from", "Next"):
        assert f"## {title}" in text
    assert "`evalkit show" in text and "evalkit audit" in text, "30 % of the student's replies are unread"
    assert "a<b>" not in text


def test_no_claim_without_its_interval(folder: Path) -> None:
    text = explain(*read_comparison(folder), str(folder))
    sections = dict(re.findall(r"## (.+)\n\n((?:\* .+\n?)+)", text))
    for title in ("Verdict", "In figures", "Where"):
        claims = [line for line in sections[title].splitlines() if "%" in line or "points" in line]
        assert claims and all("[" in line or "Intervals are at" in line for line in claims), title


def test_examples_are_what_the_student_ranks_right_and_says_wrong_first() -> None:
    def row(item: str, ll: str, gen: str, teacher: str = "correct") -> dict[str, str]:
        return {
            "task": "t",
            "item": item,
            "teacher_generation": teacher,
            "student_generation": gen,
            "student_loglikelihood": ll,
        }

    rows = [
        row("1", "wrong", "wrong"),
        row("2", "correct", "empty"),
        row("3", "correct", "correct"),
        row("4", "correct", "wrong", "wrong"),
    ]
    assert [r["item"] for r in examples(rows)] == ["2", "1"]
    assert examples(rows) == examples(rows[::-1])


def test_what_is_undecided_says_how_many_items_would_settle_it(tmp_path: Path) -> None:
    teacher = make_run(repeated((90, RIGHT), (10, WRONG)))
    Comparison(teacher, make_run(repeated((88, RIGHT), (2, LL_ONLY), (10, WRONG)))).save(tmp_path)
    text = explain(*read_comparison(tmp_path), "x")
    assert "whether there is a loss by generation (+2.0" in text and "would take about" in text
    assert "no difference between the modes is shown" in text


def test_cells_without_signal_are_told(tmp_path: Path) -> None:
    half = make_run(repeated((52, RIGHT), (48, WRONG)))
    Comparison(half, half).save(tmp_path)
    text = explain(*read_comparison(tmp_path), "x")
    assert "## Without signal" in text and "a loss could not be seen" in text and "No task carries signal" in text


def test_one_mode_alone_is_explained_too(tmp_path: Path) -> None:
    run = make_run([{"cloze": "correct"}] * 60)
    Comparison(run, run).save(tmp_path)
    assert "By log-likelihood the student loses +0.0" in explain(*read_comparison(tmp_path), "x")


def test_what_is_no_comparison_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no comparison: it has no compare.json"):
        read_comparison(tmp_path / "none")
    told = json.loads((folder / "compare.json").read_text())
    for change, message in (
        ({"schema": "evalkit.compare/9"}, "has the schema 'evalkit.compare/9'"),
        ({"tasks": [{"name": "t"}]}, "is of an older evalkit"),
    ):
        (folder / "compare.json").write_text(json.dumps({**told, **change}))
        with pytest.raises(ValueError, match=message):
            read_comparison(folder)
    (folder / "compare.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_comparison(folder)
    (folder / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="is one run"):
        read_comparison(folder)
