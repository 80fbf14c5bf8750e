"""`evalkit bench ttft`: time to first token, decode step and cache of a teacher beside its hybrid, in one run."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from models.bench.profile import kernels
from models.bench.provenance import environment
from models.bench.shapes import Pair
from models.bench.sides import Runner, Side, expected_bytes, tolerant
from models.bench.timing import Stopwatch, failure, free, paired_ratio
from models.bench.ttft_settings import Settings, settled

SCHEMA = "evalkit.bench-ttft/1"
SIDES = ("teacher", "hybrid")

Report = Callable[[str, int, int], None]
"""(step that begins, steps done, steps in all)"""
Save = Callable[[dict[str, Any]], None]


def bench(settings: Settings, *, report: Report | None = None, save: Save | None = None) -> dict[str, Any]:
    """Measure, and return the result (schema evalkit.bench-ttft/1): plain data, times in milliseconds.

    Weights are random. ``save`` gets the result as it grows, after each length. A side that runs out of memory at a
    length has an entry that says so; the others go on. Raises ValueError for settings that can't be measured here.
    """
    settings, device, pairs, notes = settled(settings)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "complete": False,
        "settings": asdict(settings),
        "environment": environment(device),
        "method": _method(settings),
        "models": [],
        "rows": [],
        "kernels": [],
        "notes": notes,
    }
    total, done = len(pairs) * len(settings.tokens), 0

    def say(step: str) -> None:
        if report:
            report(step, done, total)

    for shapes in pairs:
        say(f"{shapes.name} · random weights")
        both = _Both(settings, device, shapes)
        result["models"].append(both.about())
        for tokens in settings.tokens:
            row, profiles = both.measure(tokens, say)
            result["rows"].append(row)
            for side in SIDES:
                if row[side]["status"] == "failed":
                    notes.append(f"{shapes.name}, {side} failed at {tokens} tokens: {row[side]['reason']}")
            result["kernels"] += profiles
            done += 1
            if save:
                save(result)
        del both
        free()
    result["complete"] = True
    say("done")
    if save:
        save(result)
    return result


def failed(result: dict[str, Any]) -> bool:
    """Whether a side broke, beyond running out of memory."""
    return any(row[side]["status"] == "failed" for row in result["rows"] for side in SIDES)


class _Both:
    """A teacher and its hybrid with random weights, both on the device."""

    def __init__(self, settings: Settings, device: torch.device, shapes: Pair) -> None:
        self.settings, self.device, self.shapes = settings, device, shapes
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.watch = Stopwatch(device)
        self.configs: dict[str, PretrainedConfig] = {"teacher": shapes.teacher, "hybrid": shapes.hybrid}
        self.runners = {
            side: Runner(self._model(config), self.watch, settings.attention) for side, config in self.configs.items()
        }

    def _model(self, config: PretrainedConfig) -> Any:
        torch.manual_seed(self.settings.seed)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa").eval()
        if hasattr(model, "set_kda_impl"):
            model.set_kda_impl(self.settings.impl)
        return model

    def about(self) -> dict[str, Any]:
        hybrid = self.shapes.hybrid
        return {
            "name": self.shapes.name,
            "family": self.shapes.teacher.model_type,
            "layers": hybrid.num_hidden_layers,
            "kept": [layer for layer in range(hybrid.num_hidden_layers) if layer not in hybrid.kda_layers],
            "parameters": {
                side: sum(p.numel() for p in runner.model.parameters()) for side, runner in self.runners.items()
            },
            "weights": "random",
            "config": hybrid.to_dict(),
        }

    def measure(self, tokens: int, say: Callable[[str], None]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(row, kernels where they are wanted): both sides in turn, each pair on one fresh prompt of ``tokens``."""
        asked, name = self.settings, f"{self.shapes.name} · {tokens} tokens"
        sides = {side: Side() for side in SIDES}
        for side in SIDES:
            say(f"{name} · {side}, first prefill")
            work = partial(self.runners[side].warm, sides[side], self._prompt(tokens), asked.decode_steps)
            self._attempt(sides[side], work)
        for repetition in range(asked.repeats):
            say(f"{name} · repetition {repetition + 1} of {asked.repeats}")
            prompt = self._prompt(tokens)
            for side in SIDES if repetition % 2 == 0 else SIDES[::-1]:
                if sides[side].status == "ok":
                    work = partial(self.runners[side].sample, sides[side], prompt, asked.decode_steps)
                    self._attempt(sides[side], work)
        profiles = []
        for side in SIDES if asked.profile else ():
            if sides[side].status == "ok":
                say(f"{name} · {side}, profile")
                known = {"model": self.shapes.name, "tokens": tokens, "side": side}
                profiles.append(known | self._profile(side, tokens))
        return self._row(tokens, sides), profiles

    def _prompt(self, tokens: int) -> Tensor:
        """[batch, tokens] on the CPU: its place on the device is part of a side's work, since it may fail there."""
        shape = (self.settings.batch, tokens)
        return torch.randint(self.shapes.teacher.vocab_size, shape, generator=self.generator)

    def _attempt(self, side: Side, work: Callable[[], None]) -> None:
        """One side's work; its cache is gone before the other side's turn.

        The allocator keeps the memory, unless the work failed for want of it: to ask the device for it again is time
        that the next prompt's first token would seem to take (at 8K tokens, a third of it).
        """
        tolerant(side, work)
        if side.status != "ok":
            free()

    def _profile(self, side: str, tokens: int) -> dict[str, Any]:
        try:
            prompt = self._prompt(tokens).to(self.device)
            return {"kernels": kernels(partial(self.runners[side].prefill, prompt), calls=1), "reason": ""}
        except Exception as error:  # the measurement stands without it
            return {"kernels": [], "reason": failure(error)}

    def _row(self, tokens: int, sides: dict[str, Side]) -> dict[str, Any]:
        batch = self.settings.batch
        row: dict[str, Any] = {"model": self.shapes.name, "batch": batch, "tokens": tokens}
        for name, side in sides.items():
            attention, linear = expected_bytes(self.configs[name], batch, tokens, self.dtype.itemsize)
            found = (side.kv_cache_bytes, side.kda_state_bytes)
            if side.status == "ok" and found != (attention, linear):
                side.status = "failed"
                side.reason = f"the cache holds {found} bytes (k/v, states); the formula gives {(attention, linear)}"
            formula = {"kv_cache_formula_bytes": attention, "kda_state_formula_bytes": linear}
            row[name] = side.row() | formula
        teacher, hybrid = (sides[name] for name in SIDES)
        both = teacher.status == hybrid.status == "ok"
        return row | {
            "ttft_ratio": paired_ratio(teacher.ttft_samples_ms, hybrid.ttft_samples_ms) if both else None,
            "decode_ratio": paired_ratio(teacher.decode_medians(), hybrid.decode_medians()) if both else None,
            "kv_cache_saved": 1 - row["hybrid"]["kv_cache_formula_bytes"] / row["teacher"]["kv_cache_formula_bytes"],
            "cache_saved": 1 - _cache(row["hybrid"]) / _cache(row["teacher"]),
            "same_attention": teacher.attention == hybrid.attention if teacher.attention and hybrid.attention else None,
        }


def _cache(side: dict[str, Any]) -> int:
    return int(side["kv_cache_formula_bytes"] + side["kda_state_formula_bytes"])


def _method(settings: Settings) -> list[str]:
    """How it was measured, as the report says it."""
    return [
        "Weights are random: the time depends on the shapes alone. Both models are on the device in one process, as "
        "transformers builds them, without compilation or graphs.",
        f"Time to first token: the host's clock around one call on a prompt of random tokens, from the call until the "
        f"most likely next token is there; logits of the last position alone. Median of {settings.repeats} repetitions "
        f"after two prefills that are not counted; IQR: the distance between the quartiles over the median. Each "
        f"repetition draws a new prompt for both sides, which take turns in going first; ratios are medians over these "
        f"pairs.",
        f"Decode step: median over {settings.decode_steps} steps after each prefill, one token a sequence, with "
        f"transformers' DynamicCache, which copies keys and values to add a token.",
        f"Attention: torch's scaled_dot_product_attention ({settings.attention}) on both sides; the operators that "
        f"ran are recorded, and named in the table. KDA: impl {settings.impl}.",
        "Cache: counted from the tensors after the prefill, and equal to the formula (2 x layers x batch x tokens x "
        "k/v heads x head_dim x bytes an element; KDA: float32 states and the last inputs of the short convolutions).",
        "Peak memory: of a prefill, above both models' weights. Each side's cache is freed before the other's turn.",
    ]
