"""Small runs of the distiller: a tiny teacher, all four stages, seconds each."""

import json
from pathlib import Path
from typing import Any

import torch

from distill.recipe import parse
from distill.run import distill
from distill.stage import Recipe
from models.load import Loaded, load
from tests.distill.students import loaded

TEXTS = (
    "The capital of France is Paris. A dog barks, a cat does not.",
    "Think step by step. The answer is 42. Copy: anchor, apple, arrow.",
    "A number belongs to the golden falcon: 417. Yes or no?",
    "Which animal barks? A dog. Repeat the options, then give the letter of the right one.",
)


def write_data(folder: Path) -> None:
    """text.jsonl and chat.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [{"id": f"t{i}", "text": f"{text} {i} {text}"} for i, text in enumerate(TEXTS * 6)]
    chats = [
        {"id": f"c{i}", "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"{a} {i}."}]}
        for i, (q, a) in enumerate([("Which animal barks?", "a dog"), ("The capital of France?", "Paris")] * 12)
    ]
    for name, rows in (("text", texts), ("chat", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tiny_recipe(**other: Any) -> Recipe:
    """Four stages of three steps."""
    each = {"tokens": 3 * 2 * 64, "seq_len": 64, "batch": 2, "lr": 3e-3, "warmup": 0.3}
    full = ["mixer", "mlp", "norms"]
    stages = [
        {"name": "align-qk", "loss": "align-qk", "train": ["q", "k", "conv"], "data": "text", **each},
        {"name": "align-block", "loss": "align-block", "train": ["mixer"], "data": "text", **each},
        {"name": "distill", "loss": "forward-kl", "train": full, "data": "text", "schedule": "wsd", **each},
        {"name": "instruct", "loss": "forward-kl", "mask": "completion-eos", "train": full, "data": "chat", **each},
    ]
    content = {
        "name": "tiny",
        "teacher": "tiny",
        "student": {"keep": "1"},
        "dtype": "float32",
        "data": {"text": [{"text": ["text.jsonl"]}], "chat": [{"chat": ["chat.jsonl"]}]},
        "stages": stages,
        **other,
    }
    return parse(content)


def run(recipe: Recipe, out: Path, teacher: Loaded | None = None, **options: Any) -> Path:
    """`distill.run.distill` with the data beside ``out``."""
    data = out.parent / "data"
    if not data.exists():
        write_data(data)
    return distill(recipe, out, teacher or loaded(), data_dir=data, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint, as they are on disk."""
    return {name: tensor.clone() for name, tensor in load(str(folder)).model.state_dict().items()}


def lines(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl"""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
