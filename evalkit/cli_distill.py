"""The commands that train: `evalkit distill`, `evalkit generate-data`, `evalkit bench distill`."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from evalkit.cli import BatchSize, DataDir, Device, DType, Json, Seed, Temperature, _quiet, app, console
from evalkit.cli_bench import bench

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change the recipe: seed=1, student.keep=uniform:8, stages.distill.tokens=5M; repeat."),
]


@app.command(
    epilog="Examples: `evalkit distill smoke --out student` · `evalkit distill smollm2-135m --data-dir data --out "
    "student --minutes 9`, then the same with `--resume` until it is done · `evalkit distill qwen3-0.6b-paper "
    "--dry-run` · `torchrun --nproc-per-node 8 -m evalkit distill my.yaml --out student`. A run that was stopped goes "
    "on, exactly, with `--resume`."
)
def distill(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`--dry-run` shows what is in it), or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")] = Path("distilled"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    stage: Annotated[str | None, typer.Option(help="Train this stage alone, after those before it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will cost, and stop.")] = False,
    changes: Changes = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Save and stop after so long; --resume goes on.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Curves for TensorBoard, too.")] = False,
    json_output: Json = False,
) -> None:
    """Train a student of a teacher by the stages of RECIPE: OUT/checkpoints holds a model folder for each stage."""
    _quiet()
    from distill.plan import make_plan
    from distill.recipe import read_recipe

    made = read_recipe(recipe, changes or ())
    if dry_run:
        plan = make_plan(made)
        print(json.dumps(_plan_json(plan), indent=2)) if json_output else _show_plan(made.name, plan)
        return
    from distill.folder import METRICS
    from distill.parallel import processes
    from distill.progress import shown
    from distill.run import distill as run
    from distill.train import Stopped, listening
    from models.load import load, pick_device

    train = partial(run, resume=resume, stage=stage, data_dir=data_dir, tensorboard=tensorboard)
    where = pick_device(device)
    with processes(where) as several, listening(minutes) as stop:
        where = f"cuda:{several.local_rank}" if where == "cuda" else where
        teacher = load(made.teacher, dtype=made.dtype, device=where)
        errors = Console(stderr=True, markup=False)
        try:
            with shown(errors, several.first) as report:
                folder = train(made, out, teacher, stop=stop, processes=several, report=report)
        except Stopped as stopped:
            errors.print(
                f"evalkit: {stopped}; all is saved, and the same command with --resume goes on", soft_wrap=True
            )
            raise typer.Exit(stopped.exit_code) from None
    if not several.first:
        return
    if json_output:
        print(json.dumps(json.loads((folder / "evalkit.json").read_text(encoding="utf-8")), indent=2))
        return
    console.print(f"Student kept in {folder}; every step in {out / METRICS}.", soft_wrap=True)
    console.print(f"Next: evalkit compare {made.teacher} {folder} --mode both", soft_wrap=True)


@app.command(
    "generate-data",
    epilog="Example: `evalkit generate-data smollm2-135m --prompts chats.jsonl --out answers.jsonl`, then in a recipe "
    "`data: {answers: [{chat: [answers.jsonl]}]}`. A run that was cut off goes on with the same command.",
)
def generate_data(
    teacher: Annotated[str, typer.Argument(help="Who answers: hub id, model folder, or a built-in name.")],
    prompts: Annotated[
        list[Path], typer.Option(help="JSONL files with messages; the last answer is replaced. Repeat.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSONL file of the answers.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts, from the first.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Limit of an answer.")] = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    dtype: DType = "auto",
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Let TEACHER answer prompts: instruction data in its own words, for a recipe's mixtures."""
    _quiet()
    from distill.generate import generate_answers, read_prompts
    from evalkit.progress import bars
    from models.load import load

    asked = read_prompts(prompts)[:limit]
    loaded = load(teacher, dtype=dtype, device=device)
    with bars(True, loaded.name) as report:
        answer = partial(generate_answers, loaded, asked, max_tokens=max_tokens, temperature=temperature, seed=seed)
        counts = answer(batch_size=batch_size, out=out, report=report)
    if json_output:
        print(json.dumps(counts, indent=2))
        return
    console.print(f"Answers kept in {out}: " + ", ".join(f"{number} {what}" for what, number in counts.items()))


@bench.command(
    "distill",
    epilog="Examples: `evalkit bench distill smollm2-135m --random` (the teacher's shapes, random weights) · `evalkit "
    "bench distill my.yaml --set stages.distill.batch=128 --profile --out bench`.",
)
def bench_distill(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a YAML file.")],
    changes: Changes = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each stage, after 3 that are not counted.")] = 10,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights: only the teacher's config is read.")
    ] = False,
    fuse: Annotated[
        bool, typer.Option("--fuse/--no-fuse", help="Compile MLPs and norms on a GPU, as a run does.")
    ] = True,
    profile: Annotated[bool, typer.Option("--profile", help="The time of each kernel in one step, too.")] = False,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for bench-distill.json.")] = None,
    json_output: Json = False,
) -> None:
    """Time the steps of each stage of RECIPE on made-up batches: tokens a second, MFU, memory."""
    _quiet()
    from distill.bench import bench_recipe
    from distill.recipe import read_recipe
    from evalkit.store import write_json
    from models.load import pick_device

    how: dict[str, Any] = {"steps": steps, "random": random, "fuse": fuse, "profile": profile}
    result = bench_recipe(read_recipe(recipe, changes or ()), device=pick_device(device), **how)
    if out is not None:
        write_json(out / "bench-distill.json", result)
    if json_output:
        print(json.dumps(result, indent=2))
        return
    table = Table("Stage", "Loss", box=box.SIMPLE_HEAD)
    for title in ("tokens/s", "MFU", "step ms", "launched in ms", "peak GiB"):
        table.add_column(title, justify="right")
    for row in result["stages"]:
        mfu, memory = row["mfu"], row["peak_memory_gib"]
        times = (f"{row['step_s'] * 1e3:.1f}", f"{row['launch_s'] * 1e3:.1f}")
        shares = ("–" if mfu is None else f"{mfu:.1%}", *times, "–" if memory is None else f"{memory:.1f}")
        numbers = (f"{row['tokens_per_s']:,.0f}", *shares)
        table.add_row(row["stage"], row["loss"], *numbers)
    console.print(table)
    console.print(f"{result['device']}, torch {result['torch']}; medians of {steps} steps.")


def _show_plan(name: str, plan: Any) -> None:
    table = Table("Stage", "Loss", "Data", box=box.SIMPLE_HEAD)
    for title in ("Steps", "Tokens", "Trained", "FLOPs", "Memory"):
        table.add_column(title, justify="right")
    for one in plan.stages:
        trained, memory = f"{one.trained / 1e6:,.1f}M", f"{one.memory / 2**30:,.1f} GiB"
        numbers = (f"{one.steps:,}", _tokens(one.tokens), trained, f"{one.flops:.2e}", memory)
        table.add_row(one.name, one.loss, one.data, *numbers)
    console.print(table)
    kept = ", ".join(map(str, plan.kept)) or "none"
    console.print(
        f"{name}: teacher {plan.teacher_parameters / 1e6:,.1f}M parameters, student "
        f"{plan.student_parameters / 1e6:,.1f}M with attention in layers {kept}; {_tokens(plan.tokens)} tokens and "
        f"{plan.flops:.2e} FLOPs in all, {plan.flops / 4e14 / 60:,.1f} minutes at 4e14 FLOP/s (an H100 at 40 % of its "
        f"peak).",
        soft_wrap=True,
    )


def _tokens(number: int) -> str:
    return f"{number / 1e6:,.2f}M" if number >= 10**5 else f"{number:,}"


def _plan_json(plan: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(plan), "tokens": plan.tokens, "flops": plan.flops}
