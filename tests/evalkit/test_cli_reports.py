"""rank, check, baseline as a user types them: exit codes, files, one clear line for bad input."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.evalkit.test_cli import evalkit, in_process


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scored models, ``one`` and ``two``."""
    out = tmp_path_factory.mktemp("the runs")
    for name, model in (("one", tiny_folder), ("two", other_folder)):
        done = in_process("run", model, "--tasks", "quick", "--limit", 12, "--out", out / name)
        assert done.returncode == 0, done.stderr
    return out


def test_rank_prints_and_writes(runs: Path, tmp_path: Path) -> None:
    done = in_process("rank", runs / "one", runs / "two", "--out", tmp_path / "rank")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "rank" / "rank.json").read_text())
    assert [point["label"] for point in told["checkpoints"]] == ["one", "two"]
    assert (tmp_path / "rank" / "rank.md").read_text().startswith("# Ranking of 2 checkpoints")
    again = in_process("rank", runs / "one", runs / "two", "--out", tmp_path / "rank", "--json")
    assert json.loads(again.stdout) == told


def test_check_of_runs_needs_no_torch_and_its_exit_code_is_the_verdict(runs: Path, tmp_path: Path) -> None:
    done = evalkit("check", runs / "two", "--baseline", runs / "one", "--out", tmp_path / "check")
    assert done.returncode == 3, done.stderr
    told = json.loads((tmp_path / "check" / "check.json").read_text())
    assert told["exit_code"] == 3 and told["verdicts"][0]["sentence"] in " ".join(done.stdout.split())
    assert (tmp_path / "check" / "junit.xml").exists() and (tmp_path / "check" / "check.md").exists()


def test_a_model_is_scored_as_the_baseline_was(runs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    assert in_process("baseline", "update", runs / "one", "--file", file).returncode == 0
    done = in_process("check", tiny_folder, "--baseline", file, "--out", tmp_path / "check", "--json")
    assert done.returncode == 3, done.stderr
    [verdict] = json.loads(done.stdout)["verdicts"]
    assert "The new model is the baseline's model." in verdict["notes"]
    assert json.loads((tmp_path / "check" / "new" / "run.json").read_text())["settings"]["limit"] == 12


def test_calibrate_scores_the_model_again_with_another_batch_size(
    runs: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    done = in_process(
        *("check", tiny_folder, "--calibrate", "--baseline", runs / "one", "--batch-size", 3, "--out", tmp_path / "aa")
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "aa" / "calibration.json").read_text())
    assert [session["batch_size"] for session in told["sessions"]] == [16, 3]
    assert {cell["mode"]: cell["flips"] for cell in told["cells"]} == {"loglikelihood": 0.0, "generation": 0.0}
    assert "Flip floor" in (tmp_path / "aa" / "calibration.md").read_text()


def test_audit_draws_and_reads_back(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    done = in_process("audit", runs / "one", runs / "two", "-n", 8, "--out", out)
    assert done.returncode == 0 and "8 replies" in done.stdout, done.stderr
    again = in_process("audit", runs / "one", runs / "two", "-n", 8, "--out", out)
    assert again.returncode == 2 and "may hold labels" in again.stderr
    with open(out / "audit.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(out / "audit.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "label": "none"} for row in rows)
    read = in_process("audit", "--labels", out)
    assert read.returncode == 0 and "8 of 8 drawn replies are labelled" in read.stdout, read.stderr
    assert json.loads((out / "audit.json").read_text())["tasks"][0]["corrected_gap"]


def test_explain_prints_and_keeps_one_page(runs: Path, tmp_path: Path) -> None:
    assert in_process("compare", runs / "one", runs / "two", "--out", tmp_path).returncode == 0
    done = in_process("explain", tmp_path)
    assert done.returncode == 0 and "## Verdict" in done.stdout, done.stderr
    told = json.loads(in_process("explain", tmp_path, "--json").stdout)["page"]
    assert told == (tmp_path / "explain.md").read_text()


def test_an_anchor_stays_where_it_is(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "anchor.json"
    assert in_process("baseline", "update", runs / "one", "--file", file, "--anchor").returncode == 0
    before = file.read_bytes()
    done = in_process("baseline", "update", runs / "two", "--file", file)
    assert done.returncode == 2 and "is a pinned anchor" in done.stderr and file.read_bytes() == before


def bad_inputs(runs: Path, folder: Path) -> dict[str, tuple[list[object], str]]:
    cut = folder / "cut"
    shutil.copytree(runs / "two", cut)
    lines = (cut / "outcomes.jsonl").read_bytes()
    (cut / "outcomes.jsonl").write_bytes(lines[:-40])
    old = folder / "old"
    shutil.copytree(runs / "two", old)
    manifest = json.loads((old / "run.json").read_text())
    (old / "run.json").write_text(json.dumps({**manifest, "schema": "evalkit.run/0"}))
    nan = folder / "nan"
    shutil.copytree(runs / "two", nan)
    first, _, rest = (nan / "outcomes.jsonl").read_text().partition("\n")
    record = json.loads(first)
    record["outcomes"][0]["logprobs"][0] = float("nan")
    (nan / "outcomes.jsonl").write_text(json.dumps(record) + "\n" + rest)
    margins = folder / "margins.yaml"
    margins.write_text("margin: 2\n")
    one, out = runs / "one", ["--out", folder / "out"]
    return {
        "one checkpoint": (["rank", one, *out], "rank needs at least 2 runs and got 1 (one)"),
        "cut off": (["rank", one, cut, *out], "line 12: cut off in the middle"),
        "schema": (["rank", one, old, *out], "has the schema 'evalkit.run/0'; this evalkit reads 'evalkit.run/1'"),
        "not finite": (["rank", one, nan, *out], "has the log-probability nan"),
        "not finite in check": (["check", nan, "-b", one, *out], "has the log-probability nan"),
        "cut baseline": (["check", one, "-b", cut, *out], "cut off in the middle"),
        "no run": (["rank", one, folder / "nothing", *out], "is not a run: it has no run.json"),
        "no task": (["rank", one, runs / "two", "--tasks", "piqa", *out], "task 'piqa' is not in all runs"),
        "no baseline": (["check", one, "-b", folder / "none.json", *out], "there is no baseline"),
        "folder": (["check", one, "-b", folder, *out], "a folder without run.json"),
        "no new": (["check", "-b", one, *out], "check needs the NEW run or model"),
        "no baseline option": (["check", one, *out], "Missing option '--baseline'"),
        "margins": (["check", one, "-b", one, "--margins", margins, *out], "field 'margin' is 2"),
        "no margins": (["check", one, "-b", one, "--margins", folder / "none.yaml", *out], "none.yaml"),
        "negative": (["check", one, "-b", one, "--margin-generation", "-1", *out], "greater than or equal to 0.01"),
        "calibrate": (["check", runs / "two", "--calibrate", "-b", one, *out], "compares a model with itself"),
        "explain a run": (["explain", one], "is one run; explain needs a comparison"),
        "explain nothing": (["explain", folder / "nothing"], "is no comparison: it has no compare.json"),
        "audit of one": (["audit", one, *out], "audit needs two runs, the teacher's and the student's, and got 1"),
        "audit without a sheet": (["audit", "--labels", folder / "none"], "draw a sample first"),
        "audit both": (["audit", one, one, "--labels", folder], "leave the runs out"),
        "audit cut": (["audit", one, cut, *out], "cut off in the middle"),
        "baseline folder": (["baseline", "update", one, "--file", folder], "is a folder; name a file"),
        "not a baseline": (["baseline", "update", one, "--file", runs / "one" / "run.json"], "this evalkit reads"),
    }


def test_bad_input_gets_one_clear_line_and_exit_code_2(runs: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()}
    for name, (arguments, told) in bad_inputs(runs, tmp_path).items():
        done = in_process(*arguments)
        assert done.returncode == 2, f"{name}: exit code {done.returncode}: {done.stderr}"
        assert told in " ".join(done.stderr.replace("│", " ").split()), f"{name}: {done.stderr}"
        assert "Traceback" not in done.stderr, name
        own = [line for line in done.stderr.splitlines() if line.startswith("evalkit: ")]
        assert len(own) == 1 or "Usage:" in done.stderr, f"{name}: {done.stderr}"
        assert not (tmp_path / "out").exists(), f"{name} left files behind"
    assert {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "command", [["rank"], ["check"], ["baseline", "update"], ["audit"], ["explain"], ["divergence"]]
)
def test_each_command_shows_an_example(command: list[str]) -> None:
    assert "Example" in in_process(*command, "--help").stdout


@pytest.mark.usefixtures("altair")
def test_report_of_a_comparison_of_a_run_and_of_two(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "compare"
    assert in_process("compare", runs / "one", runs / "two", "--out", folder).returncode == 0
    done = in_process("report", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"Report: {folder / 'report.md'} · {folder / 'report.html'}"
    explained = in_process("explain", folder).stdout
    verdict = explained.split("## Verdict")[1].split("##")[0].strip().removeprefix("* ")
    assert " ".join(verdict.split()) in (folder / "report.md").read_text(), "opens with the sentence of explain"
    one = in_process("report", runs / "one", "--format", "html", "--no-text", "--out", tmp_path / "o", "--json")
    assert json.loads(one.stdout) == {"files": [str(tmp_path / "o" / "report.html")]}
    both = in_process("report", runs / "one", runs / "two", "--format", "md", "--out", tmp_path / "two")
    assert both.returncode == 0 and (tmp_path / "two" / "report-charts" / "scatter.svg").exists()


@pytest.mark.usefixtures("altair")
def test_report_of_what_is_no_run_is_one_line(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one", tmp_path / "cut")
    outcomes = tmp_path / "cut" / "outcomes.jsonl"
    outcomes.write_bytes(outcomes.read_bytes()[:-9])
    for wrong, told in ((tmp_path, "no compare.json"), (tmp_path / "cut", "cut off in the middle")):
        done = evalkit("report", wrong, "--out", tmp_path / "report")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert told in done.stderr and not (tmp_path / "report").exists()
