"""What the tests of the measurements share: tiny settings, a tiny configuration, a child process, a report's check."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from models.bench import render
from models.bench.kda_settings import Settings as KDASettings
from tests.conftest import missing

ROOT = Path(__file__).resolve().parents[2]
KDA = KDASettings(
    tokens=(16, 70), heads=2, kv_heads=1, head_dim=16, decode_batch=2, impls=("reference", "recurrent"), repeats=3,
    device="cpu",
)  # fmt: skip


def tiny_config(folder: Path, family: str = "qwen3", **more: Any) -> str:
    config = {
        "model_type": family,
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 61,
        "max_position_embeddings": 64,
    }
    file = folder / f"{family}.json"
    file.write_text(json.dumps(config | more))
    return str(file)


def check_markdown(result: dict[str, Any], title: str, grids: Sequence[render.Grid]) -> None:
    """The report names device, versions, dtype, seed, date and method, and its tables are whole."""
    text = render.markdown(result, title, grids)
    device = result["environment"]["device"]["name"]
    for words in (device, torch.__version__, "triton", "transformers", "flash-linear-attention"):
        assert words in text
    assert f"dtype {result['settings']['dtype']}, seed 0, {result['environment']['date']}" in text
    assert all(line in text for line in result["method"])
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == len(grids)
    for lines in tables:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, lines
    assert "UNFINISHED" not in text and "UNFINISHED" in render.markdown(result | {"complete": False}, title, grids)


def child(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "TRITON_INTERPRET": "0"}
    arguments = [sys.executable, *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)


def need_gpu() -> None:
    if not torch.cuda.is_available():
        missing("cuda", "there is no CUDA GPU")
