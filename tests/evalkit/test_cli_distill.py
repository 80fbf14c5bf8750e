"""`evalkit distill`, `generate-data` and `bench distill` as their user has them: exit codes, one line for an error."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.distill.runs import tiny_recipe, write_data

ROOT = Path(__file__).resolve().parents[2]


def evalkit(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "evalkit", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )


@pytest.fixture
def place(tmp_path: Path, tiny_folder: Path) -> Path:
    """A folder with a recipe (mine.yaml) and its data."""
    write_data(tmp_path / "data")
    content = tiny_recipe(teacher=str(tiny_folder)).model_dump(mode="json")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return tmp_path


@pytest.mark.slow  # half a minute
def test_a_recipe_is_run_stopped_and_resumed(place: Path) -> None:
    words = ("distill", "mine.yaml", "--data-dir", "data", "--out", "run")
    cut = evalkit(*words, "--minutes", "0.01", cwd=place)
    assert (cut.returncode, cut.stdout) == (0, ""), cut.stderr
    assert "the time given is used up" in cut.stderr and "--resume goes on" in cut.stderr
    again = evalkit(*words, cwd=place)
    assert again.returncode == 2 and "add --resume" in again.stderr
    done = evalkit(*words, "--resume", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    note = json.loads(done.stdout)
    assert note["stage"] == "instruct" and note["recipe"] == "tiny"
    scored = evalkit("run", f"run/checkpoints/instruct-{note['tokens']}", "--tasks", "quick", "--limit", "2",
                     "--out", "scores", "--json", cwd=place)  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    checkpoint = json.loads((place / "scores" / "run.json").read_text(encoding="utf-8"))["checkpoint"]
    assert checkpoint == note, "a run copies what the checkpoint says of itself"


def test_sigterm_saves_and_says_so(place: Path) -> None:
    words = ["distill", "mine.yaml", "--data-dir", "data", "--out", "run", "--set", "stages.distill.tokens=5M"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with subprocess.Popen(
        [sys.executable, "-m", "evalkit", *words], cwd=place, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        file = place / "run" / "metrics.jsonl"
        limit = time.monotonic() + 120
        while time.monotonic() < limit and not (file.is_file() and '"distill"' in file.read_text(encoding="utf-8")):
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "stopped by SIGTERM in distill at step" in errors
    assert (place / "run" / "state" / "state.pt").is_file()


def test_a_dry_run_says_what_it_costs_and_writes_nothing(place: Path) -> None:
    done = evalkit("distill", "mine.yaml", "--dry-run", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert [stage["name"] for stage in plan["stages"]] == ["align-qk", "align-block", "distill", "instruct"]
    assert plan["tokens"] == 4 * 3 * 2 * 64 and plan["flops"] > 0
    assert sorted(path.name for path in place.iterdir()) == ["data", "mine.yaml"]
    shown = evalkit("distill", "mine.yaml", "--dry-run", cwd=place)
    assert "align-qk" in shown.stdout and "FLOPs in all" in shown.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("distill", "smoky"), "there is no recipe 'smoky': did you mean 'smoke'"),
        (("distill", "mine.yaml", "--set", "stages.distil.lr=1"), "there is no 'distil' among align-qk"),
        (("distill", "mine.yaml", "--set", "data.text=[{text: [none.jsonl]}]", "--data-dir", "data"), "none.jsonl"),
        (("distill", "mine.yaml", "--set", "teacher=./nowhere"), "there is no model folder ./nowhere"),
        (("generate-data", "x", "--prompts", "none.jsonl", "--out", "o.jsonl"), "none.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words: tuple[str, ...], says: str, place: Path) -> None:
    done = evalkit(*words, cwd=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_generated_answers_are_a_source_of_chats(place: Path, tiny_folder: Path) -> None:
    words = ("generate-data", str(tiny_folder), "--prompts", "data/chat.jsonl", "--limit", "3", "--max-tokens", "4")
    done = evalkit(*words, "--out", "answers.jsonl", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (place / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3 and all(row["messages"][-1]["role"] == "assistant" for row in rows)


def test_bench_distill_times_every_stage(place: Path) -> None:
    done = evalkit("bench", "distill", "mine.yaml", "--steps", "1", "--random", "--json", "--out", "bench", cwd=place)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["stage"] for row in result["stages"]] == ["align-qk", "align-block", "distill", "instruct"]
    assert all(row["tokens_per_s"] > 0 for row in result["stages"])
    assert json.loads((place / "bench" / "bench-distill.json").read_text(encoding="utf-8")) == result
