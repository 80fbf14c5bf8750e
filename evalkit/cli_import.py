"""The commands that read what other harnesses wrote."""

import json
from pathlib import Path
from typing import Annotated

import typer

from evalkit import api
from evalkit.cli import Json, app, console


@app.command(
    "import",
    epilog="Example: `lm_eval run --model hf --model_args pretrained=MODEL --tasks arc_easy --log_samples "
    "--output_path old`, then `evalkit import old --out runs/old` and `evalkit show runs/old`",
)
def import_(
    folder: Annotated[Path, typer.Argument(help="Folder that lm-eval wrote (--output_path, with --log_samples).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")],
    tasks: Annotated[str | None, typer.Option(help="Comma-separated, lm-eval's names.", show_default="all")] = None,
    json_output: Json = False,
) -> None:
    """Read lm-eval's results as a run, to be shown and compared like any other."""
    from reports.summary import run_summary, run_table

    made = api.import_run(folder, out=out, tasks=None if tasks is None else [one for one in tasks.split(",") if one])
    if json_output:
        print(json.dumps(run_summary(made), indent=2))
        return
    console.print(run_table(made))
    console.print(f"Run kept in {out}: {made.manifest.model.note}. Next: evalkit show {out}")
