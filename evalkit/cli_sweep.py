"""`evalkit sweep`: many checkpoints by many tasks from one file."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from evalkit.cli import Json, RayActors, RayAddress, RayResources, Workers, _quiet, app, console


@app.command(
    epilog="Example of a file: `{models: [checkpoints/step-*, smollm2-135m], tasks: [quick, arc_easy], "
    "options: {limit: 200}, out: runs/sweep}`. Then `evalkit sweep sweep.yaml --dry-run`, `evalkit sweep sweep.yaml`, "
    "or on a Ray cluster `evalkit sweep sweep.yaml --ray auto`. Exit code 1: a checkpoint failed."
)
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML with models, tasks, out, and options as of `evalkit run`.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folders go to OUT/NAME.", show_default="the file's")
    ] = None,
    workers: Workers = None,
    ray: RayAddress = None,
    ray_actors: RayActors = None,
    ray_resources: RayResources = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be scored.")] = False,
    json_output: Json = False,
) -> None:
    """Score every checkpoint of FILE on its tasks. Finished runs are skipped, those that were cut off go on; with
    --ray, checkpoints share the cluster."""
    _quiet()
    from evalkit.progress import bars
    from evalkit.sweep import Result, finished, read_sweep, run_sweep

    changes = {"workers": workers, "ray": ray, "ray_actors": ray_actors, "ray_resources": ray_resources or None}
    jobs = read_sweep(file, {"out": out, **changes})
    if dry_run:
        plan = [
            {"name": j.name, "model": j.model, "out": str(j.out), "finished": finished(j) is not None} for j in jobs
        ]
        if json_output:
            print(json.dumps({"runs": plan, "tasks": jobs[0].tasks}, indent=2, ensure_ascii=False))
            return
        for one in plan:
            console.print(f"{one['model']} → {one['out']}{' (finished)' if one['finished'] else ''}")
        console.print(f"{len(jobs)} checkpoints × {', '.join(jobs[0].tasks)}")
        return
    aside = Console(stderr=True, markup=False)

    def told(result: Result) -> None:
        aside.print(f"{result.job.name}: {result.status}{f': {result.why}' if result.why else ''}", soft_wrap=True)

    with bars(True, file.stem) as report:
        results = run_sweep(jobs, report, told)
    failed = [result for result in results if result.status == "failed"]
    good = [str(result.job.out) for result in results if result.status != "failed"]
    following = [f"evalkit rank {' '.join(good)}"] if len(good) > 1 else []
    following += [f"evalkit sweep {file}"] if failed else []
    if json_output:
        runs = [
            {
                "name": r.job.name,
                "model": r.job.model,
                "out": str(r.job.out),
                "status": r.status,
                "why": r.why,
                **r.summary,
            }
            for r in results
        ]
        print(json.dumps({"runs": runs, "next": following}, indent=2, ensure_ascii=False))
    else:
        console.print(_table(results))
        for command in following:
            console.print(f"Next: {command}", soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


def _table(results: Any) -> Table:
    from evalkit.records import MODES
    from reports.table import SHORT, percent

    table = Table("Checkpoint", "Task", "n", *(SHORT[mode] for mode in MODES), box=box.SIMPLE_HEAD)
    for result in results:
        if result.status == "failed":
            table.add_row(result.job.name, f"failed: {result.why}")
        for task in result.summary.get("tasks", ()):
            cells = [task["modes"].get(mode) for mode in MODES]
            figures = ["" if cell is None else percent(cell["accuracy"]) for cell in cells]
            table.add_row(result.job.name, task["name"], str(task["n"]), *figures)
    return table
