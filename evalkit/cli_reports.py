"""The commands on finished runs: rank, check, baseline, rescore, audit, explain, bridge, divergence, report.

Only those that run a model need torch.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from evalkit import api, api_reports
from evalkit.cli import BatchSize, DataDir, Device, DType, IncludePath, Json, Remote, app, console
from evalkit.cli import _quiet as quiet
from evalkit.records import Normalisation, Rules

OutDir = Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")]
TaskNames = Annotated[
    str | None, typer.Option("--tasks", "-t", help="Comma-separated names.", show_default="all common ones")
]
Points = Annotated[
    float | None, typer.Option(min=0.01, max=99, help="Points of accuracy.", show_default="2, or the file's")
]


@app.command(epilog="Example: `evalkit rank runs/step-1000 runs/step-2000 runs/step-4000 --out rank`")
def rank(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, one a checkpoint.")],
    out: OutDir = Path("rank"),
    tasks: TaskNames = None,
    json_output: Json = False,
) -> None:
    """Does log-likelihood rank the checkpoints as generation does? Writes rank.md and rank.json."""
    from reports.rank_markdown import rank_table, sentence

    made = api_reports.rank(runs, None if tasks is None else [name for name in tasks.split(",") if name])
    made.save(out)
    if json_output:
        print(json.dumps(made.result, indent=2, ensure_ascii=False))
        return
    console.print(sentence(made.result))
    console.print(rank_table(made.result))
    console.print(f"Report: {out / 'rank.md'}")


@app.command(
    epilog="Examples: `evalkit check runs/new --baseline baseline.json --margins margins.yaml` · "
    "`evalkit check ./checkpoint --baseline anchor.json --baseline release.json` · "
    "`evalkit check --calibrate --baseline runs/old --batch-size 3`"
)
def check(
    baseline: Annotated[list[Path], typer.Option("--baseline", "-b", help="Run folder or baseline file; repeatable.")],
    new: Annotated[str | None, typer.Argument(help="Run folder, or a model to score as the baseline was.")] = None,
    margins: Annotated[Path | None, typer.Option(help="YAML with alpha, margins, guardrail.", dir_okay=False)] = None,
    margin_loglikelihood: Points = None,
    margin_generation: Points = None,
    guardrail: Annotated[float | None, typer.Option(min=0.01, max=99, help="Of every task.", show_default="5")] = None,
    alpha: Annotated[float | None, typer.Option(min=1e-6, max=0.49, help="Error rate.", show_default="0.05")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Flip floor of the baseline against itself.")] = False,
    out: OutDir = Path("check"),
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", "-t", help="Names or files to score a model on.", show_default="the baseline's names"),
    ] = None,
    data_dir: DataDir = None,
    include_path: IncludePath = None,
    batch_size: BatchSize = None,
    dtype: DType = "auto",
    device: Device = "auto",
    trust_remote_code: Remote = False,
    json_output: Json = False,
) -> None:
    """Is NEW no worse than the baseline on the same items? Writes check.md, check.json and junit.xml.

    Exit code 0: pass; 1: regression; 2: wrong usage or input; 3: inconclusive, or not comparable.
    """
    from reports.gate import exit_code, sentence
    from reports.gate_output import check_json, read_margins, save_check

    engine: dict[str, Any] = {
        "tasks": None if tasks is None else [name for name in tasks.split(",") if name],
        "data_dir": data_dir,
        "include_path": include_path,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    if calibrate:
        _calibrate(baseline, new, out, engine, json_output)
        return
    if new is None:
        raise ValueError("check needs the NEW run or model: evalkit check NEW --baseline RUN")
    flags = {
        "loglikelihood": margin_loglikelihood,
        "generation": margin_generation,
        "guardrail": guardrail,
        "alpha": alpha,
    }
    limits = read_margins(margins, flags)
    made, verdicts = api_reports.check(new, baseline, limits, out=out, prepare=quiet, **engine)
    save_check(out, made, verdicts, limits)
    if json_output:
        print(json.dumps(check_json(made, verdicts, limits), indent=2, ensure_ascii=False))
    else:
        for verdict in verdicts:
            console.print(sentence(verdict))
        console.print(f"Report: {out / 'check.md'}")
    raise typer.Exit(exit_code(verdicts))


def _calibrate(baseline: list[Path], new: str | None, out: Path, engine: dict[str, Any], json_output: bool) -> None:
    from evalkit.store import write_json, write_text
    from reports.gate_output import calibration, calibration_markdown

    first, again = api_reports.score_again(baseline, new, out=out, prepare=quiet, **engine)
    result = calibration(again, first)
    write_json(out / "calibration.json", result)
    write_text(out / "calibration.md", calibration_markdown(result))
    print(json.dumps(result, indent=2)) if json_output else console.print(calibration_markdown(result))


baselines = typer.Typer(no_args_is_help=True, help="Baselines for `evalkit check`, small enough for git.")
app.add_typer(baselines, name="baseline")


@baselines.command(epilog="Example: `evalkit baseline update runs/release-3 --file baselines/release.json`")
def update(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    file: Annotated[Path, typer.Option("--file", "-f", help="The baseline file to write.")],
    anchor: Annotated[bool, typer.Option("--anchor", help="Pin it: no later update writes over this file.")] = False,
) -> None:
    """Make RUN the baseline in FILE; an anchor is never moved."""
    from reports.baseline import update_baseline

    made = update_baseline(api.load_run(run), file, anchor)
    told = ", ".join(f"{task.entry.name} ({len(task.items)})" for task in made.tasks)
    console.print(f"Baseline {file}{' (anchor)' if anchor else ''}: {made.name} on {told}")


@app.command(
    epilog="Examples: `evalkit rescore runs/student --rules strict --out runs/student-strict` · `evalkit rescore "
    "runs/student --normalisation byte --out runs/student-byte`, then `evalkit compare` as with any run"
)
def rescore(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run; it is left as it is.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new run's folder.")],
    rules: Annotated[Rules | None, typer.Option(help="Extraction.", show_default="the run's")] = None,
    normalisation: Annotated[
        Normalisation | None, typer.Option(help="Of log-likelihood.", show_default="the run's")
    ] = None,
    files: Annotated[str, typer.Option("--tasks", "-t", help="Comma-separated files of tasks that are your own.")] = "",
    data_dir: DataDir = None,
    include_path: IncludePath = None,
    json_output: Json = False,
) -> None:
    """The same replies and scores under other rules; no model is needed."""
    from reports.summary import run_summary, run_table

    own = [name for name in files.split(",") if name]
    where: dict[str, Any] = {"files": own, "data_dir": data_dir, "include_path": include_path}
    made = api_reports.rescore(run, rules=rules, normalisation=normalisation, **where, out=out)
    print(json.dumps(run_summary(made), indent=2)) if json_output else console.print(run_table(made))


@app.command(
    epilog="Example: `evalkit audit runs/teacher runs/student -n 200 --out audit`, then write a label in every row of "
    "audit/audit.csv, then `evalkit audit --labels audit`"
)
def audit(
    runs: Annotated[list[Path] | None, typer.Argument(help="Teacher's and student's run folders.")] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="Replies to draw.")] = 200,
    seed: Annotated[int, typer.Option(help="Another seed draws other replies.")] = 0,
    labels: Annotated[Path | None, typer.Option(help="Folder of a sheet that holds labels now.")] = None,
    form: Annotated[
        Literal["csv", "jsonl"], typer.Option("--format", help="Of the sheet: audit.csv, audit.jsonl.")
    ] = "csv",
    out: OutDir = Path("audit"),
    json_output: Json = False,
) -> None:
    """How often does extraction err, for each model? Draws replies for a person to label, blind to the model and to
    what was read from them; --labels reads them back. A label is an option's letter, 'other', or 'none'.
    """
    from evalkit.store import write_json, write_text
    from reports.audit import KEY, RESULT, audit_markdown, draw, read_labels, save_sheet, score

    if labels is not None:
        if runs:
            raise ValueError("--labels reads a sheet that was drawn before; leave the runs out")
        result = score(*read_labels(labels))
        write_json(labels / RESULT, result)
        write_text(labels / "audit.md", audit_markdown(result))
        print(json.dumps(result, indent=2)) if json_output else console.print(audit_markdown(result))
        return
    if not runs or len(runs) != 2:
        raise ValueError(f"audit needs two runs, the teacher's and the student's, and got {len(runs or ())}")
    rows, key = draw(api.load_run(runs[0]), api.load_run(runs[1]), number, seed)
    sheet = save_sheet(out, rows, key, form)
    if json_output:
        print(json.dumps({"drawn": len(rows), "strata": key["strata"]}, indent=2))
    else:
        console.print(f"{len(rows)} replies in {sheet}. Label them without looking at {KEY}, then:")
        console.print(f"evalkit audit --labels {out}")


@app.command(epilog="Example: `evalkit explain compare`")
def explain(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison.")],
    json_output: Json = False,
) -> None:
    """One page in plain sentences on a comparison: verdict, figures, why, where, and what can't be concluded."""
    from evalkit.store import write_text
    from reports.explain import explain as page
    from reports.explain import read_comparison

    text = page(*read_comparison(folder), str(folder))
    write_text(folder / "explain.md", text)
    print(json.dumps({"page": text})) if json_output else console.print(text)


@app.command(epilog="Example: `evalkit bridge runs/teacher runs/student --out bridge`, of runs with --view cot")
def bridge(
    teacher: Annotated[Path, typer.Argument(help="The teacher's run, scored with --view cot.")],
    student: Annotated[Path, typer.Argument(help="The student's run, scored alike.")],
    out: OutDir = Path("bridge"),
    tasks: TaskNames = None,
    batch_size: BatchSize = None,
    dtype: DType = "auto",
    device: Device = "auto",
    trust_remote_code: Remote = False,
    json_output: Json = False,
) -> None:
    """Where a chain of thought loses: in reading the answer out of the same reasoning, in rolling the reasoning out, or
    in saying the answer. Loads both models; writes bridge.md and bridge.json."""
    from evalkit.store import write_json, write_text
    from reports.bridge import bridge_markdown

    quiet()
    chosen = None if tasks is None else [name for name in tasks.split(",") if name]
    engine: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "device": device}
    engine["trust_remote_code"] = trust_remote_code
    result = api_reports.bridge(teacher, student, chosen, **engine)
    write_json(out / "bridge.json", result)
    write_text(out / "bridge.md", bridge_markdown(result))
    print(json.dumps(result, indent=2)) if json_output else console.print(bridge_markdown(result))


@app.command(
    epilog="Example: `evalkit divergence runs/teacher --student ./student --student-run runs/student --out divergence`"
)
def divergence(
    run: Annotated[Path, typer.Argument(help="The teacher's run; its replies are read.")],
    student: Annotated[str, typer.Option(help="Hugging Face id, model folder, or a built-in name.")],
    teacher: Annotated[str | None, typer.Option(help="The model that RUN scored.", show_default="the run's")] = None,
    student_run: Annotated[Path | None, typer.Option(help="Its run: the figures by what became of each item.")] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", "--task", "-t", help="Comma-separated names.", show_default="all")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="Items a task, by stable hash.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for divergence.md and .json.")] = None,
    batch_size: BatchSize = None,
    dtype: DType = "auto",
    device: Device = "auto",
    trust_remote_code: Remote = False,
    json_output: Json = False,
) -> None:
    """How far does the student stray on the teacher's replies, and at which token would it part? Loads both models at
    once: KL(teacher || student) a step, the first divergent token, and the share of replies not yet parted."""
    from evalkit.store import write_json, write_text
    from reports.divergence import divergence_markdown, divergence_tables, notes

    quiet()
    chosen = None if tasks is None else [name for name in tasks.split(",") if name]
    what: dict[str, Any] = {"teacher": teacher, "student_run": student_run, "limit": limit, "progress": True}
    how: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    result = api_reports.divergence(run, student, chosen, **what, batch_size=batch_size, **how)
    if out is not None:
        write_json(out / "divergence.json", result)
        write_text(out / "divergence.md", divergence_markdown(result))
    if json_output:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    console.print(*divergence_tables(result), *notes(result), sep="\n")
    if out is not None:
        console.print(f"Report: {out / 'divergence.md'}")


@app.command(
    epilog="Examples: `evalkit report compare` · `evalkit report runs/step-1000 runs/step-2000 --out report` · "
    "`evalkit report compare --format html --no-text`"
)
def report(
    folders: Annotated[list[Path], typer.Argument(help="A comparison, a run, or the runs of several checkpoints.")],
    formats: Annotated[str, typer.Option("--format", help="md, html, or both, with a comma.")] = "md,html",
    no_text: Annotated[
        bool, typer.Option("--no-text", help="No prompts, choices or replies: nothing to leak.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder.", show_default="the one given, or report for several")
    ] = None,
    json_output: Json = False,
) -> None:
    """Write report.md with SVG charts and report.html, one file that opens offline: charts, tables, every item."""
    where = out or (folders[0] if len(folders) == 1 else Path("report"))
    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    made = api_reports.report(folders, where, wanted, text=not no_text)
    print(json.dumps({"files": [str(path) for path in made]})) if json_output else console.print(
        f"Report: {' · '.join(map(str, made))}", soft_wrap=True
    )
