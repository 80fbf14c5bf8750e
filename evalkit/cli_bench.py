"""`evalkit bench`: kernels and models measured on this machine."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from evalkit.cli import BatchSize, DataDir, Device, Json, _quiet, app, console

bench = typer.Typer(no_args_is_help=True, help="Measure kernels and models on this machine.")
app.add_typer(bench, name="bench")

Lengths = Annotated[str, typer.Option("--tokens", help="Comma-separated; 8k is 8192.", show_default="by the device")]
BenchDir = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the JSON and the Markdown.")]
BenchDType = Annotated[str, typer.Option(help="auto (bfloat16 on a GPU, float32 on a CPU), or a dtype's name.")]
Repeats = Annotated[int, typer.Option(min=0, help="Repetitions.", show_default="by the device")]
Profile = Annotated[bool, typer.Option("--profile", help="The time of each kernel, too (a GPU only).")]


@bench.command(
    "kda",
    epilog="Examples: `evalkit bench kda --out bench` · `evalkit bench kda --tokens 8k --impl triton --profile`. "
    "Exit code 1: an implementation failed.",
)
def bench_kda(
    tokens: Lengths = "",
    heads: Annotated[int, typer.Option(help="Heads of q.")] = 16,
    kv_heads: Annotated[int | None, typer.Option(help="Heads of k and v.", show_default="as q")] = None,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    dtype: BenchDType = "auto",
    gate: Annotated[str, typer.Option(help="Comma-separated.")] = "bounded,softplus",
    impl: Annotated[
        str, typer.Option(help="Comma-separated: triton, fla, reference, recurrent.", show_default="by the device")
    ] = "",
    backward: Annotated[bool, typer.Option("--backward/--no-backward", help="Forward with backward, too.")] = True,
    decode_batch: Annotated[int, typer.Option(help="Sequences of a decode step; 0: none.")] = 64,
    repeats: Repeats = 0,
    profile: Profile = False,
    keep_compiled: Annotated[
        bool, typer.Option("--keep-compiled", help="Use Triton's cache: first calls are no longer first.")
    ] = False,
    fla_configs: Annotated[
        int, typer.Option(help="Configurations that fla's autotuner tries a kernel; 0: all, minutes a size.")
    ] = 0,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    out: BenchDir = None,
    json_output: Json = False,
) -> None:
    """Time every implementation of Kimi Delta Attention on the same inputs, against the device's floor."""
    _quiet()
    from models.bench import kda, kda_settings, kda_tables
    from models.bench.arguments import names, numbers

    lists: dict[str, Any] = {
        "tokens": numbers("tokens", tokens) if tokens else (),
        "gates": names(gate),
        "impls": names(impl),
    }
    shape: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "batch": batch}
    what: dict[str, Any] = {"dtype": dtype, "backward": backward, "decode_batch": decode_batch, "profile": profile}
    how: dict[str, Any] = {"device": device, "repeats": repeats, "keep_compiled": keep_compiled, "seed": seed}
    how["fla_configs"] = fla_configs
    settings = kda_settings.Settings(**lists, **shape, **what, **how)
    _bench(kda, kda_tables, settings, "bench-kda", out, json_output)


@bench.command(
    "ttft",
    epilog="Examples: `evalkit bench ttft --shapes qwen3-0.6b --tokens 8k,128k --out bench` · "
    "`evalkit bench ttft ./teacher --keep 0,5,10`. Exit code 1: a side failed.",
)
def bench_ttft(
    model: Annotated[str | None, typer.Argument(help="Take this model's shapes (id, folder or built-in name).")] = None,
    shapes: Annotated[str, typer.Option(help="Comma-separated built-in shapes.", show_default="by the device")] = "",
    config: Annotated[str | None, typer.Option(help="Shapes from a config.json.")] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Layers that keep attention: 0,2,6, a preset, uniform[:N].", show_default="the model's"),
    ] = None,
    tokens: Lengths = "",
    batch: Annotated[int, typer.Option(help="Prompts.")] = 1,
    decode_steps: Annotated[int, typer.Option(help="Steps timed after each prefill.")] = 16,
    repeats: Annotated[int, typer.Option(help="Repetitions.")] = 5,
    dtype: BenchDType = "auto",
    device: Device = "auto",
    attention: Annotated[str, typer.Option(help="sdpa (torch chooses), flash, cudnn, efficient or math.")] = "sdpa",
    impl: Annotated[str | None, typer.Option(help="Of KDA.", show_default="by the device")] = None,
    gate: Annotated[str | None, typer.Option(help="Of KDA: bounded or softplus.", show_default="bounded")] = None,
    profile: Profile = False,
    seed: Annotated[int, typer.Option(help="Of weights and prompts.")] = 0,
    out: BenchDir = None,
    json_output: Json = False,
) -> None:
    """Time to first token, decode step and cache of a teacher beside its hybrid, with random weights."""
    _quiet()
    from models.bench import ttft, ttft_settings, ttft_tables
    from models.bench.arguments import names, numbers

    lists: dict[str, Any] = {"tokens": numbers("tokens", tokens) if tokens else (), "shapes": names(shapes)}
    who: dict[str, Any] = {"model": model, "config": config, "keep": keep, "dtype": dtype, "gate": gate}
    what: dict[str, Any] = {"batch": batch, "decode_steps": decode_steps, "attention": attention, "impl": impl}
    how: dict[str, Any] = {"device": device, "repeats": repeats, "profile": profile, "seed": seed}
    settings = ttft_settings.Settings(**lists, **who, **what, **how)
    _bench(ttft, ttft_tables, settings, "bench-ttft", out, json_output)


@bench.command(
    "engine",
    epilog="Examples: `evalkit bench engine --data-dir data --out bench` · `evalkit bench engine MODEL --cells "
    "arc_easy:generation --items 0.25`. Exit code 1: the two sides' scores differ. Needs lm-eval.",
)
def bench_engine(
    model: Annotated[str, typer.Argument(help="Hugging Face id, model folder, or a built-in name.")] = "smollm2-135m",
    cells: Annotated[
        str, typer.Option(help="Comma-separated TASK or TASK:MODE (loglikelihood, generation, both).")
    ] = "arc_easy,boolq_closed:loglikelihood,hellaswag:loglikelihood,mmlu",
    items: Annotated[float, typer.Option(min=0.01, max=1, help="Share of each task's items to use.")] = 1.0,
    repeats: Annotated[int, typer.Option(min=1, help="Paired repetitions.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Limit of a reply.")] = 32,
    batch_size: BatchSize = None,
    dtype: BenchDType = "auto",
    device: Device = "auto",
    data_dir: DataDir = None,
    out: BenchDir = None,
    json_output: Json = False,
) -> None:
    """Items and tokens a second in each mode and in both, beside lm-eval's on the same items."""
    _quiet()
    import torch

    import tasks  # noqa: F401  (registers them)
    from evalkit import bench_engine as ours
    from models.bench.arguments import names
    from models.bench.provenance import environment
    from models.bench.render import Grid
    from models.load import load, pick_device

    where = torch.device(pick_device(device))
    chosen = ("bfloat16" if where.type == "cuda" else "float32") if dtype == "auto" else dtype
    loaded = load(model, dtype=chosen, device=str(where))
    asked = ours.cells_of(names(cells), items, data_dir, loaded.tokenizer)
    settings = ours.Settings(model=model, dtype=chosen, repeats=repeats, max_tokens=max_tokens, batch_size=batch_size)

    class Tables:
        TITLE = ours.TITLE

        @staticmethod
        def grids(result: dict[str, Any]) -> list[Grid]:
            return [Grid(*table) for table in ours.tables(result)]

    class Measure:
        failed = staticmethod(ours.failed)

        @staticmethod
        def bench(settings: Any, **how: Any) -> dict[str, Any]:
            return ours.bench(settings, loaded.model, loaded.tokenizer, asked, environment(where), **how)

    _bench(Measure, Tables, settings, "bench-engine", out, json_output)


def _bench(what: Any, tables: Any, settings: Any, name: str, out: Path | None, json_output: bool) -> None:
    """Measure ``settings``, keep what there is of the result as it grows, and print it."""
    from models.bench import render

    def save(result: dict[str, Any]) -> None:
        if out:
            render.write_result(out / name, result, tables.TITLE, tables.grids(result))

    with render.progress(name) as report:
        result = what.bench(settings, report=report, save=save)
    if json_output:
        print(json.dumps(result, indent=2))
    else:
        console.print("\n".join((*render.about(result), *result["notes"])), soft_wrap=True)
        render.show(console, tables.grids(result))
        if out:
            console.print(f"Report: {out / name}.md; every sample: {out / name}.json")
    raise typer.Exit(1 if what.failed(result) else 0)
