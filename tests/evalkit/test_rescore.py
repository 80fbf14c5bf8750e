"""A rescored run is the run that other rules would have made."""

import json
from pathlib import Path

import pytest

import evalkit as ek
from evalkit.api_reports import rescore
from evalkit.store import Run
from tests.evalkit.test_cli import in_process

QUESTIONS = [
    {"question": "Which animal barks?", "choices": ["dog", "cat", "hen"], "answer": 0, "aliases": ["hound"]},
    {"question": "Which one is a fruit?", "choices": ["apple", "anchor", "arrow"], "answer": 0},
    {"question": "What is 6 times 7?", "choices": ["41", "42", "43"], "answer": 1},
    {"question": "Which bird can't fly?", "choices": ["ostrich", "gull", "owl"], "answer": 0},
]


def contents(run: Run) -> dict[str, object]:
    return {name: run.records(name) for name in run.tasks}


@pytest.mark.parametrize(("normalisation", "rules"), [("byte", None), (None, "strict"), ("pmi", "strict")])
def test_it_equals_scoring_the_model_again(
    tiny_folder: Path, tmp_path: Path, normalisation: str | None, rules: str | None
) -> None:
    asked = {"tasks": ["quick", "arithmetic"], "limit": 25, "view": "letters", "permutations": 2, "max_tokens": 12}
    old = ek.run(tiny_folder, **asked, normalisation="pmi", out=tmp_path / "old")
    before = (tmp_path / "old" / "outcomes.jsonl").read_bytes()
    wanted = ek.run(tiny_folder, **asked, rules=rules or "lenient", normalisation=normalisation or "pmi")
    found = rescore(tmp_path / "old", rules=rules, normalisation=normalisation, out=tmp_path / "new")
    assert contents(found) == contents(wanted) == contents(ek.load_run(tmp_path / "new"))
    assert found.manifest.settings == wanted.manifest.settings
    assert found.manifest.tasks == wanted.manifest.tasks
    assert found.manifest.sessions[-1]["rescored"]["run"] == str(tmp_path / "old")
    assert (tmp_path / "old" / "outcomes.jsonl").read_bytes() == before and old.manifest.settings.rules == "lenient"


def test_what_can_not_be_rescored_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    run = ek.run(tiny_folder, [str(file)], out=tmp_path / "run")
    with pytest.raises(ValueError, match="needs --rules, --normalisation, or both"):
        rescore(run)
    with pytest.raises(ValueError, match="name its file"):
        rescore(run, rules="strict")
    again = rescore(run, rules="strict", files=[file], out=tmp_path / "again")
    assert again.manifest.settings.rules == "strict"
    with pytest.raises(ValueError, match="is not empty"):
        rescore(run, rules="strict", files=[file], out=tmp_path / "again")
    file.write_text("".join(json.dumps({**row, "answer": 2}) + "\n" for row in QUESTIONS))
    with pytest.raises(ValueError, match="score the model again"):
        rescore(run, rules="strict", files=[file])


def test_the_command_says_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    ek.run(tiny_folder, ["quick"], limit=6, out=tmp_path / "run")
    new = tmp_path / "new"
    done = in_process("rescore", tmp_path / "run", "--rules", "strict", "--out", new, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"][0]["name"] == "quick"
    assert ek.load_run(new).manifest.settings.rules == "strict"
    done = in_process("rescore", tmp_path / "run", "--out", tmp_path / "none")
    assert done.returncode == 2 and "--rules" in done.stderr
