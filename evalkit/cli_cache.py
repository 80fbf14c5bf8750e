"""`evalkit cache`: the response stores that `--cache-dir` fills."""

import datetime
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from evalkit.cli import Json, app, console

if TYPE_CHECKING:
    from evalkit.responses import Kept

cache = typer.Typer(no_args_is_help=True, help="Replies kept by `--cache-dir`: show, verify, prune.")
app.add_typer(cache, name="cache")

Folder = Annotated[Path, typer.Argument(help="What --cache-dir was.", file_okay=False)]
MEGABYTE = 1e6


@cache.command(epilog="Example: `evalkit cache show cache`")
def show(folder: Folder, json_output: Json = False) -> None:
    """Which models' replies are kept, how many, how large, when last added to."""
    _print(_found(folder), json_output)


@cache.command(epilog="Example: `evalkit cache verify cache`. Exit code 1: a reply is damaged.")
def verify(folder: Folder, json_output: Json = False) -> None:
    """Compare every reply with its checksum. Damaged ones are never used: they are asked for again."""
    found = _found(folder, check=True)
    _print(found, json_output)
    damaged = [line for one in found for line in one.damaged]
    for line in damaged:
        console.print(f"{line}: damaged", soft_wrap=True) if not json_output else None
    raise typer.Exit(1 if damaged else 0)


@cache.command(
    "prune",
    epilog="Examples: `evalkit cache prune cache` · `evalkit cache prune cache --older-than 30` · `evalkit cache prune "
    "cache --model smollm2-135m`",
)
def prune_command(
    folder: Folder,
    older_than: Annotated[
        float | None, typer.Option(min=0, help="Remove stores that were not added to for so many days.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Remove this model's stores.")] = None,
    json_output: Json = False,
) -> None:
    """Drop damaged and doubled lines, and stores whose first line is damaged; with --older-than or --model, whole
    stores. Runs that use a store meanwhile go on, and add to what is left."""
    from evalkit.responses import prune, remove

    freed = removed = 0
    for one in _found(folder):
        old = older_than is not None and time.time() - one.used > older_than * 86400
        if old or not one.how or (model is not None and one.how["model"] == model):
            freed += remove(one)
            removed += 1
        else:
            freed += prune(one)
    if json_output:
        print(json.dumps({"removed": removed, "bytes": freed}))
    else:
        console.print(f"{removed} stores removed, {freed / MEGABYTE:.1f} MB given back")


def _found(folder: Path, check: bool = False) -> "list[Kept]":
    from evalkit.responses import kept

    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name the one that was given as --cache-dir")
    return kept(folder, check)


def _print(found: "list[Kept]", json_output: bool) -> None:
    if json_output:
        rows: list[dict[str, Any]] = [
            {
                "path": str(one.path),
                **one.how,
                "replies": one.replies,
                "bytes": one.bytes,
                "used": one.used,
                "damaged": list(one.damaged),
            }
            for one in found
        ]
        print(json.dumps(rows, indent=2))
        return
    table = Table("Model", "Engine", "DType", "Device", "Replies", "MB", "Last added", "File", box=box.SIMPLE_HEAD)
    for one in found:
        last = datetime.datetime.fromtimestamp(one.used).strftime("%Y-%m-%d %H:%M")
        how = [str(one.how.get(name, "")) for name in ("model", "engine", "dtype", "device")]
        how = how if one.how else ["(damaged)", "", "", ""]
        table.add_row(*how, f"{one.replies:,}", f"{one.bytes / MEGABYTE:.1f}", last, one.path.name)
    console.print(table)
