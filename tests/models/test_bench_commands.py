"""`evalkit bench` as a user types it, and the files it writes."""

import json
import os
from pathlib import Path

import pytest

from models.bench import provenance, render
from models.bench.arguments import numbers
from tests.models.benches import child, tiny_config

BARE = """
import json, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "pydantic_core", "datasets", "lm_eval"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Missing())
import typer
from evalkit import cli_bench
try:
    getattr(cli_bench, sys.argv[1])(**json.loads(sys.argv[2]))
except typer.Exit as done:
    sys.exit(done.exit_code)
"""
"""A bare GPU machine. The command's function is called as such: newer versions of typer parse with pydantic."""


def test_bench_kda_writes_its_reports(tmp_path: Path) -> None:
    small = (
        "--heads",
        2,
        "--head-dim",
        16,
        "--decode-batch",
        2,
        "--repeats",
        2,
        "--gate",
        "bounded",
        "--device",
        "cpu",
    )
    out = tmp_path / "a b"
    done = child("-m", "evalkit", "bench", "kda", "--tokens", "16,1k", *small, "--no-backward", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "forward, bounded gate, 2 heads of 16, batch 1, float32" in done.stdout
    assert "Traceback" not in done.stderr
    found = json.loads((out / "bench-kda.json").read_text())
    assert [row["tokens"] for row in found["rows"]] == [16, 1024, 1] and found["complete"]
    assert (out / "bench-kda.md").read_text().startswith("# Kimi Delta Attention")
    assert sorted(p.name for p in out.iterdir()) == ["bench-kda.json", "bench-kda.md"]


def test_bench_ttft_prints_json_alone(tmp_path: Path) -> None:
    asked = ("--config", tiny_config(tmp_path), "--keep", "1", "--tokens", 9, "--repeats", 1, "--device", "cpu")
    done = child("-m", "evalkit", "bench", "ttft", *asked, "--decode-steps", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == "evalkit.bench-ttft/1"
    assert list(tmp_path.iterdir()) == [tmp_path / "qwen3.json"], "nothing is written without --out"


def test_bad_usage_is_one_line(tmp_path: Path) -> None:
    done = child("-m", "evalkit", "bench", "ttft", "--shapes", "qwen-0.6b", "--device", "cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "did you mean 'qwen3-0.6b'?" in done.stderr


def test_both_run_without_pydantic_and_datasets(tmp_path: Path) -> None:
    small = {"tokens": "16", "heads": 2, "head_dim": 16, "decode_batch": 2, "repeats": 1, "device": "cpu"}
    done = child("-c", BARE, "bench_kda", json.dumps(small | {"gate": "softplus", "out": None}))
    assert (done.returncode, "softplus gate" in done.stdout) == (0, True), done.stderr
    small = {"config": tiny_config(tmp_path), "keep": "1", "tokens": "9", "repeats": 1, "device": "cpu"}
    done = child("-c", BARE, "bench_ttft", json.dumps(small | {"decode_steps": 1}))
    assert (done.returncode, "qwen3, random weights" in done.stdout) == (0, True), done.stderr


def test_lengths_are_read_from_text() -> None:
    assert numbers("tokens", "4096, 8k,128K") == (4096, 8192, 131072)
    for text in ("", "8q", "1.5k", "-4", "8,,9"):
        with pytest.raises(ValueError, match="tokens is .*expected whole numbers between commas"):
            numbers("tokens", text)


def test_sizes_and_times_are_told_in_their_unit() -> None:
    assert [render.size(n) for n in (0, 1023, 1024, 14 * 2**30, None)] == ["0 B", "1023 B", "1.0 KiB", "14.0 GiB", "–"]
    assert [render.milliseconds(t) for t in (0.03091, 4.3, 1493.21, None)] == ["0.0309", "4.300", "1493.2", "–"]
    assert render.median({"median": 2.0, "p25": 1.9, "p75": 2.1}) == ("2.000", "10.0%")


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "bench-kda.json"
    provenance.write(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        provenance.write(file, "new")
    assert [(p.name, p.read_text()) for p in file.parent.iterdir()] == [("bench-kda.json", "old")]
