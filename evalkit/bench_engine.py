"""`evalkit bench engine`: items and tokens a second of the transformers engine beside lm-eval's, in one run.

Both get the same model in memory, the same prompts and answers as text, and the same limits of a reply; each tokenises,
runs and reads its own way. Whoever calls gives the model and the items: this file imports neither tasks nor models.
"""

import ctypes
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from evalkit.encoding import Encoder
from evalkit.engines.hf import HFEngine
from evalkit.records import Generation, Item, Reply, Request
from evalkit.registry import Task, get_task
from evalkit.selection import lowest, select
from evalkit.settings import Settings as Scoring
from evalkit.views import ask

SCHEMA = "evalkit.bench-engine/1"
TITLE = "The transformers engine beside lm-evaluation-harness"
Kind = Literal["loglikelihood", "generation", "both"]
Report = Callable[[str, int, int], None]
Save = Callable[[dict[str, Any]], None]

KINDS: tuple[Kind, ...] = ("loglikelihood", "generation", "both")
ITEMS = {"arc_easy": 200}
"""Of other tasks: 100."""
SUBJECTS = 4
TRIED = 24
"""Items on which lm-eval's batch sizes are compared."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured."""

    model: str
    dtype: str
    repeats: int = 3
    max_tokens: int = 32
    batch_size: int | None = None
    """Ours; None: the engine's own."""
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """lm-eval's: the fastest on the first items of each cell is what we are compared with."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """One item as both sides get it."""

    prompt: str
    answers: tuple[str, ...]
    """With the space that joins them to the prompt. Empty: a reply is generated."""
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """Items of one task in one mode. "both": answers are scored and a reply is generated after one prompt; lm-eval has
    no such mode, so it is compared with our generation alone."""

    task: str
    kind: Kind
    texts: tuple[Text, ...]


def cells_of(names: Sequence[str], share: float, data_dir: Path | None, tokenizer: Any) -> list[Cell]:
    """TASK (every mode) or TASK:MODE each; ``share`` of the items that a whole measurement has. Tasks must be
    registered."""
    cells, encoder = [], Encoder(tokenizer)
    for name, _, kind in (name.partition(":") for name in names):
        if kind and kind not in KINDS:
            raise ValueError(f"unknown mode {kind!r} of {name}: expected {', '.join(KINDS)}")
        task = get_task(name)
        chosen = select(task, Scoring(), data_dir)
        items = _some(chosen.items, task, max(1, round(share * ITEMS.get(name, 100))))
        for one in (kind,) if kind else KINDS:
            view = task.loglikelihood if one == "loglikelihood" else task.generation
            texts = []
            for item in items:
                asked = ask(view, task, item)
                prompt = encoder.prompt([ask(view, task, shot) for shot in chosen.examples(item)], asked, closed=True)
                answers = () if one == "generation" else tuple(f" {answer}" for answer in asked.answers)
                texts.append(Text(prompt, answers, asked.stops))
            cells.append(Cell(name, one, tuple(texts)))
    return cells


def _some(items: Sequence[Item], task: Task, number: int) -> list[Item]:
    """``number`` items by stable hash; of a task whose examples come from the item's subject, of a few subjects."""
    if not task.shots_by_stratum:
        return lowest(items, number, f"limit {task.name}")
    subjects = sorted({item.stratum for item in items})[:SUBJECTS]
    each = max(1, number // SUBJECTS)
    return [x for s in subjects for x in lowest([i for i in items if i.stratum == s], each, f"limit {task.name}")]


def bench(
    settings: Settings,
    model: Any,
    tokenizer: Any,
    cells: Sequence[Cell],
    environment: Mapping[str, Any],
    *,
    report: Report | None = None,
    save: Save | None = None,
) -> dict[str, Any]:
    """Measure, and return the result (schema evalkit.bench-engine/1): plain data, times in seconds, memory in bytes."""
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "complete": False,
        "settings": asdict(settings) | {"threads": torch.get_num_threads()},
        "environment": dict(environment),
        "method": METHOD,
        "rows": [],
        "notes": [],
    }
    ours = _Ours(model, tokenizer, settings)
    theirs = _LmEval(model, tokenizer, settings)
    for at, cell in enumerate(cells):

        def say(step: str, at: int = at, cell: Cell = cell) -> None:
            if report:
                report(f"{cell.task} · {cell.kind} · {step}", at, len(cells))

        row = _measure(cell, ours, theirs, settings, say)
        result["rows"].append(row)
        if save:
            save(result)
    result["complete"] = True
    if save:
        save(result)
    return result


def failed(result: dict[str, Any]) -> bool:
    """Whether the two sides disagree on what they measured."""
    return any(row.get("largest_difference", 0.0) > 1e-3 for row in result["rows"])


def _measure(cell: Cell, ours: "_Ours", theirs: "_LmEval", settings: Settings, say: Callable[[str], None]) -> Any:
    row: dict[str, Any] = {"task": cell.task, "kind": cell.kind, "items": len(cell.texts)}
    row |= {"ours": [], "lm_eval": [], "generation": []}
    if cell.kind != "both":
        row["batch_sizes"] = {}
        for size in settings.batch_sizes:
            say(f"lm-eval at batch size {size}")
            row["batch_sizes"][size] = theirs(cell, cell.texts[:TRIED], size)[0]["seconds"]
        row["batch_size"] = min(row["batch_sizes"], key=lambda size: row["batch_sizes"][size])
    sides = ["ours", "generation" if cell.kind == "both" else "lm_eval"]
    alone = replace(cell, kind="generation", texts=tuple(replace(text, answers=()) for text in cell.texts))
    say("warming up")
    ours(cell, cell.texts[:TRIED])
    for repetition in range(settings.repeats):
        say(f"repetition {repetition + 1} of {settings.repeats}")
        for side in sides if repetition % 2 == 0 else sides[::-1]:
            if side == "ours":
                measured, mine = ours(cell, cell.texts)
            elif side == "generation":
                measured, _ = ours(alone, alone.texts)
            else:
                measured, other = theirs(cell, cell.texts, row["batch_size"])
            row[side].append(measured)
    if cell.kind == "loglikelihood":
        row["largest_difference"] = max(
            abs(sum(logprobs) - value)
            for reply, values in zip(mine, other, strict=True)
            for logprobs, value in zip(reply.logprobs, values, strict=True)
        )
    if cell.kind == "generation":
        same = [
            reply.generated is not None and reply.generated.text == text
            for reply, text in zip(mine, other, strict=True)
        ]
        row["same_replies"] = sum(same)
    other_side = row[sides[1]]
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(row["ours"], other_side, strict=True)]
    if cell.kind == "both":
        row["over_generation"] = [1 / ratio for ratio in ratios]
    else:
        row["speedups"] = ratios
    return row


class _Ours:
    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.encoder = Encoder(tokenizer)

    def __call__(self, cell: Cell, texts: Sequence[Text]) -> tuple[dict[str, Any], list[Reply]]:
        engine = HFEngine(self.model, self.tokenizer, batch_size=self.settings.batch_size)
        # The layout is chosen once a model, not once a task; so, where there are any, are CUDA graphs captured.
        list(engine.answer([Request(prompt=(1, 2), continuations=((3,),))]))
        if engine.device.type == "cuda":
            list(engine.answer([self._request(cell.kind, text) for text in texts]))
        before = engine.profile.row()
        watch = _Watch()
        requests = [self._request(cell.kind, text) for text in texts]
        tokenise = watch.seconds()
        found = dict(engine.answer(requests))
        measured = watch.measured(len(texts))
        profile = engine.profile.row()
        phases = {"tokenise": tokenise}
        for name, phase in profile["phases"].items():
            earlier = before["phases"].get(name, {"seconds": 0.0, "tokens": 0})
            phases[name] = phase["seconds"] - earlier["seconds"]
            measured[f"{name}_tokens"] = phase["tokens"] - earlier["tokens"]
        phases["other"] = measured["seconds"] - sum(phases.values())
        run = sum(value for name, value in measured.items() if name.endswith("_tokens"))
        measured |= {"phases": phases, "tokens_per_s": run / measured["seconds"], "profile": profile}
        return measured, [found[i] for i in range(len(requests))]

    def _request(self, kind: Kind, text: Text) -> Request:
        limit = Generation(max_tokens=self.settings.max_tokens, stops=text.stops) if kind != "loglikelihood" else None
        if not text.answers:
            return Request(prompt=tuple(self.encoder.encode(text.prompt)), generation=limit)
        prompt, tails = self.encoder.join(text.prompt, text.answers)
        return Request(prompt=tuple(prompt), continuations=tuple(map(tuple, tails)), generation=limit)


class _LmEval:
    """HFLM as `lm_eval --model hf` makes it, over the same model object."""

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.made: dict[int, Any] = {}

    def __call__(self, cell: Cell, texts: Sequence[Text], batch_size: int) -> tuple[dict[str, Any], list[Any]]:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        if batch_size not in self.made:
            self.made[batch_size] = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=batch_size)
        lm = self.made[batch_size]
        watch = _Watch()
        if cell.kind == "loglikelihood":
            pairs = [(text.prompt, answer) for text in texts for answer in text.answers]
            asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
            values = iter(lm.loglikelihood(asked, disable_tqdm=True))
            found: list[Any] = [[next(values)[0] for _ in text.answers] for text in texts]
        else:
            how = [
                {"until": list(text.stops), "max_gen_toks": self.settings.max_tokens, "do_sample": False}
                for text in texts
            ]
            asked = [
                Instance("generate_until", {}, (t.prompt, h), i)
                for i, (t, h) in enumerate(zip(texts, how, strict=True))
            ]
            found = list(lm.generate_until(asked, disable_tqdm=True))
        return watch.measured(len(texts)), found


class _Watch:
    """Seconds and the peak of memory from now on."""

    def __init__(self) -> None:
        gc.collect()
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the other side freed is no longer ours
            Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew (man proc_pid_clear_refs)
            self.held = _status("VmRSS")
        self.begin, self.cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - self.begin

    def measured(self, items: int) -> dict[str, Any]:
        """Seconds, items a second, and the peak above what was held before; None where it can't be told."""
        seconds, cpu = self.seconds(), time.process_time() - self.cpu
        peak = None
        if self.cuda:
            peak = torch.cuda.max_memory_allocated() - self.held
        elif sys.platform == "linux":
            peak = _status("VmHWM") - self.held
        return {"seconds": seconds, "cpu_seconds": cpu, "items_per_s": items / seconds, "peak_bytes": peak}


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"/proc/self/status has no {name}"
    return 1024 * int(found[1])


METHOD = [
    "Both sides score the same texts with the same model object, dtype and threads in one process; times include "
    "tokenising. Log-likelihood: the prompts and answers of each task's log-likelihood view, once each (evalkit's runs "
    "also score the answers without the question). Generation: greedy, in the task's generation view, with its stop "
    "strings and the same limit. Both: those prompts with the answers scored and a reply generated.",
    f"lm-eval runs at the batch size that was fastest on the first {TRIED} items of each cell. The sides take turns in "
    "going first; ratios are of pairs measured one after the other, and all are printed.",
    "On a GPU ours answers each cell once before it is timed, to capture its graphs; lm-eval has then answered "
    f"{TRIED} of its items.",
    "Memory: the peak above what was resident before (Linux: VmHWM, begun anew for each measurement; CUDA: allocated). "
    "Tokens: those that our engine ran. Phases: a pass over prompts and choices together is shared out by tokens.",
]


# --- tables: (title, header, rows, columns of names) ---

Table = tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...], int]


def tables(result: dict[str, Any]) -> list[Table]:
    against, both, phases = [], [], []
    for row in result["rows"]:
        name = (row["task"], row["kind"])
        mine, other = row["ours"], row["lm_eval"]
        if row["kind"] == "both":
            ratios = row["over_generation"]
            both.append((row["task"], _rate(mine), _list(ratios), _number(_median(ratios)), _memory(mine)))
        else:
            agree = (
                f"{row['same_replies']}/{row['items']} replies"
                if "same_replies" in row
                else f"{row['largest_difference']:.1e} nats"
            )
            against.append(
                (*name, str(row["items"]), str(row["batch_size"]), _rate(other), _rate(mine), _list(row["speedups"]),
                 _number(_median(row["speedups"])), _memory(other), _memory(mine), agree)
            )  # fmt: skip
        shares = [{name: value / one["seconds"] for name, value in one["phases"].items()} for one in mine]
        columns = ("tokenise", "prefill", "choices", "decode", "other")
        phases.append(
            (
                *name,
                f"{_median([one['tokens_per_s'] for one in mine]):.0f}",
                *(f"{_median([s.get(c, 0.0) for s in shares]):.0%}" for c in columns),
            )
        )
    return [
        (
            "Against lm-eval at its fastest batch size",
            ("task", "mode", "items", "its batch", "its items/s", "ours", "times as fast, each pair", "median")
            + ("its peak", "our peak", "agreement"),
            tuple(against),
            2,
        ),
        (
            "Both modes in the time of generation alone",
            ("task", "items/s", "ratio, each pair", "median", "peak"),
            tuple(both),
            1,
        ),
        (
            "Where our time goes",
            ("task", "mode", "tokens/s", "tokenise", "prefill", "choices", "decode", "other"),
            tuple(phases),
            2,
        ),
    ]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def _rate(side: Sequence[Mapping[str, Any]]) -> str:
    return f"{_median([one['items_per_s'] for one in side]):.2f}"


def _number(value: float) -> str:
    return f"{value:.2f}x"


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _memory(side: Sequence[Mapping[str, Any]]) -> str:
    peaks = [one["peak_bytes"] for one in side if one["peak_bytes"] is not None]
    return f"{max(peaks) / 2**20:.0f} MiB" if peaks else "–"
