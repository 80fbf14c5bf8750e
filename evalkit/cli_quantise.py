"""`evalkit quantise`: a quantised copy of a model, to compare with it."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from evalkit.cli import DType, Json, Remote, Revision, _quiet, app, console

Format = Literal["int4", "int8", "w8a8", "fp8", "torchao-int4", "torchao-int8"]


@app.command(
    epilog="Examples: `evalkit quantise smollm2-135m --format int4 --out int4` · then "
    "`evalkit compare smollm2-135m int4 --tasks quick`"
)
def quantise(
    model: Annotated[str, typer.Argument(help="Hugging Face id, model folder, or a built-in name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The copy's folder.")],
    form: Annotated[
        Format,
        typer.Option(
            "--format", help="int4, int8; w8a8, fp8 (activations, too): compressed-tensors, which vLLM reads."
        ),
    ] = "int4",
    group_size: Annotated[
        int | None,
        typer.Option(
            min=0, help="Weights that share a scale; 0: a whole row.", show_default="128, 64 or 32 at 4 bits, else 0"
        ),
    ] = None,
    dtype: DType = "auto",
    revision: Revision = None,
    trust_remote_code: Remote = False,
    json_output: Json = False,
) -> None:
    """Write a copy of MODEL whose linear weights are rounded to nearest: on a CPU, without calibration data.

    The output head stays as it is, and so do the KDA mixers of a hybrid, which vLLM reads plain.
    """
    _quiet()
    from models.quantise import quantise as write

    note = write(
        model,
        out,
        form,
        group_size=group_size,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if json_output:
        print(json.dumps(note, indent=2))
    else:
        console.print(f"{note['note']}.")
        console.print(f"Kept in {out}. Next: evalkit compare {model} {out} --tasks quick")
