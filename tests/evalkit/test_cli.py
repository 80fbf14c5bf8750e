"""The commands as a user types them, on tiny models: results, exit codes, one clear line for bad input."""

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import evalkit as ek
from evalkit.records import VERDICTS
from tests.oracles import assert_same_records

COMMAND = [sys.executable, "-m", "evalkit"]
ROOT = Path(__file__).resolve().parents[2]


def evalkit(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("EVALKIT_DATA", None)
    words = [*COMMAND, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, **more)  # type: ignore[call-overload,no-any-return]


def write_jsonl(file: Path, n: int = 12) -> Path:
    rows = [{"question": f"Which is {i}?", "choices": [f"{i}", f"{i + 1}", f"{i + 2}"], "answer": 0} for i in range(n)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def compared(tiny_folder: Path, other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "a report"
    done = evalkit("compare", tiny_folder, other_folder, "--tasks", "quick,arithmetic", "--limit", 15, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "hidden gap" in done.stdout and "Traceback" not in done.stderr
    return out


def test_progress_comes_as_json_lines_where_a_script_wants_it(tiny_folder: Path, tmp_path: Path) -> None:
    done = evalkit("run", tiny_folder, "--tasks", "quick", "--limit", 6, "--out", tmp_path / "run", "--log-json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [(line["event"], line["task"], line["mode"]) for line in lines] == [("progress", "quick", "LL+GEN")] * len(
        lines
    )
    assert (lines[0]["done"], lines[-1]["done"], lines[-1]["total"]) == (0, 6, 6)
    assert lines[-1]["tokens_per_s"] > 0 and lines[-1]["tokens_cached"] > 0


def test_compare_writes_its_schema(compared: Path) -> None:
    found = json.loads((compared / "compare.json").read_text())
    assert found["schema"] == "evalkit.compare/1"
    assert {"name", "fingerprint"} <= set(found["teacher"]) & set(found["student"])
    for task in found["tasks"]:
        assert {"name", "version", "n", "signal", "modes", "hidden_gap", "protocol_gap"} <= set(task)
        assert set(task["signal"]) == {"loglikelihood", "generation"}
        for mode, cell in task["modes"].items():
            assert ("normalisation" if mode == "loglikelihood" else "rules") in cell
            for who in ("teacher", "student"):
                assert set(cell[who]["outcomes"]) == set(VERDICTS)
                assert sum(cell[who]["outcomes"].values()) == task["n"] == 15
                low, high = cell[who]["ci95"]
                assert 0 <= low <= cell[who]["accuracy"] <= high <= 1
            gap = cell["teacher"]["accuracy"] - cell["student"]["accuracy"]
            assert cell["gap"]["mean"] == pytest.approx(gap)
        gaps = [task["modes"][mode]["gap"]["mean"] for mode in ("generation", "loglikelihood")]
        assert task["hidden_gap"]["mean"] == pytest.approx(gaps[0] - gaps[1])
        assert task["protocol_gap"] is None
    assert "overall" in found
    items = [json.loads(line) for line in (compared / "items.jsonl").read_text().splitlines()]
    assert len(items) == 30 and {row["task"] for row in items} == {"quick", "arithmetic"}
    assert (compared / "compare.md").read_text().startswith("# ")


def test_compare_takes_runs_without_torch(compared: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers'): raise ImportError(name + ' is not installed')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "import evalkit as ek\n"
        f"c = ek.compare({str(compared / 'teacher')!r}, {str(compared / 'student')!r})\n"
        "print(c.hidden_gap('quick').mean, len(c.items), len(c.flips()), len(c.to_markdown()) > 500)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    mean = json.loads((compared / "compare.json").read_text())["tasks"][0]["hidden_gap"]["mean"]
    assert done.stdout.split() == [str(mean), "30", "4", "True"]


def test_compare_of_runs_prints_json_and_exits_0(compared: Path, tmp_path: Path) -> None:
    done = evalkit("compare", compared / "teacher", compared / "student", "--out", tmp_path / "again", "--json")
    assert done.returncode == 0
    again, first = json.loads(done.stdout), json.loads((compared / "compare.json").read_text())
    assert again["tasks"] == first["tasks"]


def test_show_prints_prompt_reply_and_extraction(compared: Path) -> None:
    of_run = evalkit("show", compared / "teacher", "-n", 1, "--all")
    assert of_run.returncode == 0
    assert "prompt (open)" in of_run.stdout and "log-likelihood:" in of_run.stdout and "gold" in of_run.stdout
    of_both = json.loads(evalkit("show", compared, "--all", "-n", 40, "--task", "quick", "--json").stdout)
    assert len(of_both) == 15
    for item in of_both:
        for model in item["models"]:
            said = model["generation"]
            if said["span"]:
                assert said["reply"][slice(*said["span"])].strip() == said["answer"]


def test_tasks_lists_everything_as_json() -> None:
    found = json.loads(evalkit("tasks", "--json").stdout)
    names = {task["name"] for task in found}
    assert {"arc_easy", "mmlu", "gsm8k", "boolq_closed", "quick", "recall", "copy", "arithmetic"} <= names
    assert all(task["summary"] and task["views"] and task["source"] for task in found)


@pytest.mark.slow  # three minutes: the command starts many times
def test_a_run_killed_at_20_random_points_ends_with_the_same_records(tiny_folder: Path, tmp_path: Path) -> None:
    command = ["run", tiny_folder, "--tasks", "quick,arithmetic", "--limit", 120, "--batch-size", 1, "--out"]
    whole = evalkit(*command, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    stops = [signal.SIGINT, *[signal.SIGKILL] * 20]
    rng = random.Random(0)
    grown = runs = 0
    while stops:
        stop, out = stops[0], tmp_path / f"killed-{runs}"
        file, words = out / "outcomes.jsonl", [*COMMAND, *map(str, command), str(out)]
        before = file.read_bytes() if file.exists() else b""
        process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        if len(stops) % 4 == 2:  # while it loads
            time.sleep(rng.uniform(0, 4))
        else:
            while process.poll() is None and not (file.exists() and file.stat().st_size > len(before)):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.2))
        process.send_signal(stop)
        _, told = process.communicate(timeout=120)
        if process.returncode == 0:  # a fast machine: it was done before, and another run takes the kills that are left
            assert_same_records(ek.load_run(tmp_path / "whole"), ek.load_run(out))
            runs += 1
            assert runs < 10, "make the run longer"
            continue
        stops.pop(0)
        assert process.returncode == (2 if stop == signal.SIGINT else -stop), told
        if stop == signal.SIGINT:
            assert "interrupted; what is scored so far is kept" in told and "Traceback" not in told
        after = file.read_bytes() if file.exists() else b""
        assert after.startswith(before[: before.rfind(b"\n") + 1]), "the kill may have cut the last line, no other"
        grown += len(after) > len(before)
    assert grown >= 12
    assert evalkit(*command, out).returncode == 0
    assert_same_records(ek.load_run(tmp_path / "whole"), ek.load_run(out))


@pytest.mark.slow  # the command starts many times
def test_a_full_disk_is_one_line_and_the_run_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    command = ("run", tiny_folder, "--tasks", "quick", "--limit", 60, "--out", tmp_path / "run")
    full = evalkit(*command, preexec_fn=small_files)
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "File too large" in full.stderr
    assert evalkit(*command).returncode == 0
    assert len((tmp_path / "run" / "outcomes.jsonl").read_text().splitlines()) == 60


def bad_inputs(folder: Path, tiny: Path) -> dict[str, tuple[list[object], str]]:
    """Name -> (arguments, what the one line must say)."""
    good = write_jsonl(folder / "good.jsonl")
    lines = good.read_text().splitlines()

    def broken(name: str, line: str) -> Path:
        (folder / name).write_text("\n".join([*lines[:2], line]) + "\n")
        return folder / name

    no_tokenizer = folder / "no-tokenizer"
    no_tokenizer.mkdir()
    (no_tokenizer / "config.json").write_text((tiny / "config.json").read_text())
    run = ["run", tiny, "--out", folder / "out", "--tasks"]
    return {
        "unknown task": ([*run, "arc_esy"], "unknown task 'arc_esy': did you mean 'arc_easy'?"),
        "no file": ([*run, folder / "none.jsonl"], f"there is no file {folder / 'none.jsonl'}"),
        "not JSON": ([*run, broken("json.jsonl", '{"question": ')], "json.jsonl, line 3: not JSON"),
        "field": ([*run, broken("field.jsonl", '{"choices": ["a", "b"], "answer": 0}')], "line 3: field 'question'"),
        "empty choice": (
            [*run, broken("empty.jsonl", '{"question": "q?", "choices": ["a", " "], "answer": 0}')],
            "line 3: field 'choices': entry 1 is empty",
        ),
        "one choice": ([*run, broken("one.jsonl", '{"question": "q?", "choices": ["a"], "answer": 0}')], "at least 2"),
        "gold": (
            [*run, broken("gold.jsonl", '{"question": "q?", "choices": ["a", "b"], "answer": 2}')],
            "field 'answer' is 2",
        ),
        "no tokenizer": (["run", no_tokenizer, "--out", folder / "out"], "has no tokenizer"),
        "no model": (["run", folder / "nothing", "--out", folder / "out"], "there is no model folder"),
        "built-in": (["run", "smollm2-135", "--out", folder / "out"], "did you mean the built-in 'smollm2-135m'?"),
        "limit 0": ([*run, "quick", "--limit", "0"], "greater than or equal to 1"),
        "view": ([*run, "quick", "--view", "blank"], "task 'quick' has no view 'blank': its views are open"),
        "mode": ([*run, "quick", "--mode", "all"], "'all' is not one of 'both'"),
        "thinking": ([*run, "quick", "--thinking", "maybe"], "expected 'on', 'off' or 'budget=N'"),
        "system": ([*run, "quick", "--system", "Be brief."], "add --chat"),
        "data folder": ([*run, "piqa", "--data-dir", folder / "none"], "does not exist (--data-dir, EVALKIT_DATA)"),
        "no such data": ([*run, "piqa", "--data-dir", folder], "task 'piqa' is not in the data folder"),
        "device": ([*run, "quick", "--device", "tpu"], "unknown device 'tpu'"),
        "dtype": ([*run, "quick", "--dtype", "int3"], "unknown dtype 'int3'"),
        "show nothing": (["show", folder], "neither a run"),
        "compare nothing": (
            ["compare", folder / "a", folder / "b", "--out", folder / "out"],
            "there is no model folder",
        ),
        "twice": ([*run, f"{good},{good}"], "two tasks are named 'good'"),
    }


def in_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Like ``evalkit``, but without five seconds of imports for each call."""
    from evalkit.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    words = ["evalkit", *map(str, arguments)]
    try:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", words)
            patch.setenv("COLUMNS", "200")
            patch.delenv("EVALKIT_DATA", raising=False)
            with pytest.raises(SystemExit) as stop:
                main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(words, int(stop.value.code or 0), out.getvalue(), err.getvalue())


def test_bad_input_gets_one_clear_line_and_exit_code_2(tiny_folder: Path, tmp_path: Path) -> None:
    for name, (arguments, told) in bad_inputs(tmp_path, tiny_folder).items():
        done = in_process(*arguments)
        assert done.returncode == 2, f"{name}: exit code {done.returncode}: {done.stderr}"
        assert told in " ".join(done.stderr.split()), f"{name}: {done.stderr}"
        assert "Traceback" not in done.stderr, name
        own = [line for line in done.stderr.splitlines() if line.startswith("evalkit: ")]
        assert len(own) == 1 or "Usage:" in done.stderr, f"{name}: {done.stderr}"
        assert not (tmp_path / "out").exists(), f"{name} left files behind"


def test_a_users_own_file_works_in_both_modes(tiny_folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "mine.jsonl")
    done = evalkit("run", tiny_folder, "--tasks", file, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    [task] = json.loads(done.stdout)["tasks"]
    assert task["name"] == "mine" and task["n"] == 12
    assert set(task["modes"]) == {"loglikelihood", "generation"}
    for cell in task["modes"].values():
        assert sum(cell["outcomes"].values()) == 12


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["compare", "--help"], ["--version"]])
def test_help_and_version(arguments: list[str]) -> None:
    done = evalkit(*arguments)
    assert done.returncode == 0 and done.stdout
    assert "--help" not in arguments or len(arguments) == 1 or "Example" in done.stdout


def test_an_option_given_as_its_default_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def run(model: str, **options: Any) -> None:
        seen.append(options)
        raise ValueError("seen")

    monkeypatch.setattr("evalkit.api.run", run)
    in_process("run", "m", "--out", tmp_path, "--mode", "both", "--no-chat", "--seed", 0)
    in_process("run", "m", "--out", tmp_path)
    assert seen[0] == {"out": tmp_path, "progress": True, "mode": "both", "chat": False, "seed": 0}
    assert seen[1] == {"out": tmp_path, "progress": True}


def test_a_termination_is_told_as_an_interruption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("evalkit.api.run", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    done = in_process("run", "m", "--out", tmp_path)
    assert done.returncode == 2 and "interrupted; what is scored so far is kept" in done.stderr


@pytest.mark.parametrize(("debug", "seen"), [("", "info\n"), ("1", "debug\ninfo\n")])
def test_a_commands_log_is_on_standard_error(debug: str, seen: str) -> None:
    code = """if True:
        from evalkit.cli import _quiet
        import logging
        _quiet()
        for name in ("evalkit", "another"):
            logging.getLogger(name).debug("debug")
            logging.getLogger(name).info("info")
    """
    environment = {**os.environ, "EVALKIT_DEBUG": debug}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stderr == seen
