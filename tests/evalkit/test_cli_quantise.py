"""`evalkit quantise` and quantised models as a user types them: what is printed, and one clear line for bad input."""

import json
from pathlib import Path

import pytest

from tests.evalkit.test_cli import evalkit


def test_a_copy_is_made_and_compared(compressed_tensors: None, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    done = evalkit("quantise", tiny_folder, "--format", "int4", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["axes"] == {"compression": "quantisation", "format": "int4", "group_size": 32}
    done = evalkit("compare", tiny_folder, out, "--tasks", "quick", "--limit", 5, "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "rounded to nearest in int4, one scale for 32 weights; compressed-tensors (pack-quantized), " in told
    assert "unpacked by compressed-tensors on cpu." in told
    assert "pack-quantized" in (tmp_path / "report" / "compare.md").read_text()


@pytest.mark.slow  # the command starts many times
def test_what_is_wrong_is_one_line(compressed_tensors: None, tiny_folder: Path, tmp_path: Path) -> None:
    done = evalkit("quantise", tiny_folder, "--format", "int4", "--group-size", 48, "--out", tmp_path / "copy")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "which groups of 48 don't divide; give --group-size 32" in done.stderr
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    done = evalkit("run", tmp_path, "--out", tmp_path / "run")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "holds 2 GGUF files (a.gguf, b.gguf); name one" in done.stderr
    done = evalkit("run", tmp_path / "a.gguf", "--out", tmp_path / "run")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "is no whole GGUF file" in done.stderr
