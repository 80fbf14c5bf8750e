"""`evalkit bench distill`: how fast each stage of a recipe trains on this device, on made-up batches.

The same steps as a run's: teacher, student, loss, backward, clipping, AdamW. Weights may be random, which changes no
time. Tokens a second are of the median step after the warm-up; the share of each kernel comes from torch's profiler.
"""

import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.groups import freeze, mixer_layers
from distill.objectives import Objective, place
from distill.optimiser import Masters
from distill.packing import Batch, share
from distill.parallel import Processes
from distill.plan import peak_flops, stage_plan
from distill.select import keep_layers_of
from distill.speed import compiled
from distill.stage import Recipe, Stage
from distill.student import make_student
from models.convert import cast
from models.load import DTYPES, Loaded, load, resolve

WARM = 3


def bench_recipe(
    recipe: Recipe,
    *,
    device: str,
    steps: int = 10,
    random: bool = False,
    fuse: bool = True,
    profile: bool = False,
    document: int = 170,
) -> dict[str, Any]:
    """Measure every stage of ``recipe``; ready for JSON.

    random: the teacher's shapes with random weights. fuse: as runs on a GPU do (distill/speed.py). document: tokens of
    each made-up document.
    """
    where = torch.device(device)
    teacher, student = _models(recipe, where, random)
    rows = []
    with compiled(teacher, student, wanted=fuse and where.type == "cuda"):
        for stage in recipe.stages:
            rows.append(_measure(stage, recipe, teacher, student, where, steps, document, profile))
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    return {
        "recipe": recipe.name,
        "device": name,
        "torch": torch.__version__,
        "random": random,
        "fused": fuse,
        "stages": rows,
    }


def _models(recipe: Recipe, device: torch.device, random: bool) -> tuple[Any, Any]:
    if not random:
        loaded = load(recipe.teacher, dtype=recipe.dtype, device=str(device))
        return loaded.model, make_student(loaded, recipe)
    config = AutoConfig.from_pretrained(resolve(recipe.teacher))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    cast(model, DTYPES[recipe.dtype])
    model = model.to(device).eval()
    number = keep_layers_of(recipe.student.keep)
    return model, make_student(
        Loaded(name="random", model=model, tokenizer=None),
        recipe,
        keep=tuple(range(number)) if number else None,
        begin=False,
    )


def _measure(
    stage: Stage,
    recipe: Recipe,
    teacher: Any,
    student: Any,
    device: torch.device,
    steps: int,
    document: int,
    profile: bool,
) -> dict[str, Any]:
    mixers = tuple(sorted(mixer_layers(student)))
    teacher.requires_grad_(False)
    objective = Objective(stage, teacher, student, mixers)
    masters = Masters(freeze(student, stage.train, mixers), stage, mixers)
    batch = made_up(stage, teacher.config.vocab_size, document)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def step(number: int) -> None:
        size = stage.micro_batch or stage.batch
        total = float(batch.weights.sum())
        for start in range(0, stage.batch, size):
            objective(place(share(batch, slice(start, start + size)), device), 1 / total)
            masters.collect(first=start == 0)
        masters.step(number, 10**6, Processes())

    begun = time.perf_counter()
    step(0)
    _wait(device)
    first = time.perf_counter() - begun
    for number in range(1, WARM):
        step(number)
    _wait(device)
    seconds = []
    for number in range(steps):
        begun = time.perf_counter()
        step(WARM + number)
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    launched = time.perf_counter()
    step(0)
    launched = time.perf_counter() - launched
    _wait(device)
    speed = batch.valid / statistics.median(seconds)
    peak = peak_flops(device)
    cost, targets = stage_plan(stage, teacher, student, recipe), int((batch.weights != 0).sum())
    row: dict[str, Any] = {
        "stage": stage.name,
        "loss": stage.loss,
        "tokens_per_s": speed,
        "mfu": None if peak is None else cost.work(batch.valid, targets) / statistics.median(seconds) / peak,
        "step_s": statistics.median(seconds),
        "launch_s": launched,
        "first_step_s": first,
        "seconds": seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }
    if profile:
        row["kernels"] = _kernels(lambda: step(0), device)
    return row


def made_up(stage: Stage, vocabulary: int, document: int) -> Batch:
    """Random tokens in documents of ``document`` tokens; where the mask is on answers, the last third counts."""
    B, T = stage.batch, stage.seq_len
    document = min(document, T)
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(T) % document
    weights = (position + 1 < document).float()
    if stage.mask != "all":
        weights *= position >= document * 2 // 3
    weights[-1] = 0
    starts = [row * T + at for row in range(B) for at in range(0, T, document)]
    return Batch(
        tokens=torch.randint(0, vocabulary, (B, T), generator=generator),
        weights=weights.expand(B, T).contiguous(),
        starts=torch.tensor([*starts, B * T]),
        position=position.expand(B, T).contiguous(),
        valid=B * T,
        examples=("made up",),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _kernels(work: Any, device: torch.device) -> list[dict[str, Any]]:
    """Time of each kernel in one step, the longest first (milliseconds, calls)."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watching

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with watching(activities=kinds) as seen:
        work()
        _wait(device)
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in seen.events():
        if device.type == "cpu" or event.device_type == torch.autograd.DeviceType.CUDA:
            entry = total[event.name[:90]]
            entry[0] += event.self_device_time_total / 1e3 if device.type == "cuda" else event.self_cpu_time_total / 1e3
            entry[1] += 1
    ranked = sorted(total.items(), key=lambda one: -one[1][0])[:40]
    return [{"kernel": name, "ms": round(ms, 3), "calls": int(calls)} for name, (ms, calls) in ranked]
