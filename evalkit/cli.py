"""The commands. Each reads its arguments, calls the API, and writes; the work is done elsewhere."""

import functools
import inspect
import json
import logging as stdlib_logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from evalkit import __version__, api
from evalkit.records import Normalisation, Rules

app = typer.Typer(
    name="evalkit",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Score language models by log-likelihood and by generation from one task definition.",
    epilog="Start with `evalkit demo`, or `evalkit compare TEACHER STUDENT --tasks quick --mode both`.",
)

Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        "-t",
        help="Comma-separated: task names, paths of JSONL files, or lm_eval:NAME (a task, group or tag of lm-eval).",
        show_default=",".join(api.DEFAULT_TASKS),
    ),
]
Mode = Annotated[Literal["both", "loglikelihood", "generation"], typer.Option(help="How to score.")]
View = Annotated[
    str | None,
    typer.Option(help="Prompt form of both modes ('letters'), or LL:GEN ('cloze:letters').", show_default="the task's"),
]
Shots = Annotated[int | None, typer.Option(min=0, help="Few-shot examples.", show_default="the task's")]
Limit = Annotated[int | None, typer.Option(min=1, help="Items a task, by stable hash: the same for every model.")]
Chat = Annotated[bool, typer.Option("--chat/--no-chat", help="Send prompts through the model's chat template.")]
System = Annotated[str, typer.Option(help="System prompt (needs --chat).")]
Thinking = Annotated[str, typer.Option(help="Thinking block: on, off or budget=N tokens (needs --chat).")]
Shuffle = Annotated[int | None, typer.Option("--shuffle-seed", help="Shuffle every item's options with this seed.")]
Permutations = Annotated[int, typer.Option(min=1, help="Orders of each item's options to score; 4 is usual.")]
Norm = Annotated[
    Normalisation | None,
    typer.Option("--normalisation", help="Of log-likelihood.", show_default="the task's"),
]
RuleSet = Annotated[Rules, typer.Option("--rules", help="Extraction: explicit markers only, or bare mentions too.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Limit of a generated answer.", show_default="the task's")]
Temperature = Annotated[float, typer.Option(min=0, help="0: greedy.")]
Seed = Annotated[int, typer.Option(help="Of sampling.")]
DataDir = Annotated[
    Path | None,
    typer.Option(envvar="EVALKIT_DATA", help="Folder with offline benchmark items.", show_default="the hub"),
]
IncludePath = Annotated[
    Path | None, typer.Option("--include-path", help="Folder with lm-eval YAML files of your own.", show_default="none")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Rows a batch.", show_default="16 on the CPU, 256 on a CUDA GPU")
]
DType = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Let a hub model run its own code.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
ReportDir = Annotated[Path, typer.Option("--out", "-o", help="Folder for the report and the runs made on the way.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Engine = Annotated[
    str, typer.Option("--engine", help="What runs the model: hf (transformers), vllm, or openai (a server).")
]
BaseURL = Annotated[str, typer.Option("--base-url", help="Server of --engine openai: http://HOST:PORT/v1.")]
EngineOptions = Annotated[
    list[str] | None, typer.Option("--engine-option", help="Of the engine itself: KEY=VALUE, YAML's types; repeat.")
]
CacheDir = Annotated[
    Path | None,
    typer.Option("--cache-dir", help="Take replies from this folder's store, and add new ones.", show_default="none"),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Spread the requests over so many processes of this machine: one a GPU.")
]
RayAddress = Annotated[
    str | None, typer.Option("--ray", help="Spread the requests over a Ray cluster: its address, or auto.")
]
RayActors = Annotated[
    int | None,
    typer.Option(min=1, help="Workers on the Ray cluster.", show_default="one a GPU; without GPUs one a node"),
]
RayResources = Annotated[str, typer.Option(help="What each Ray worker takes: num_gpus=1,num_cpus=2, ...")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Progress as JSON lines on standard error.")]

console = Console(markup=False)


def _scoring_options(
    tasks: Tasks = None,
    mode: Mode = "both",
    view: View = None,
    shots: Shots = None,
    limit: Limit = None,
    chat: Chat = False,
    system: System = "",
    thinking: Thinking = "off",
    shuffle_seed: Shuffle = None,
    permutations: Permutations = 1,
    normalisation: Norm = None,
    rules: RuleSet = "lenient",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    data_dir: DataDir = None,
    include_path: IncludePath = None,
    batch_size: BatchSize = None,
    dtype: DType = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: Remote = False,
    engine: Engine = "hf",
    base_url: BaseURL = "",
    engine_options: EngineOptions = None,
    cache_dir: CacheDir = None,
    workers: Workers = None,
    ray: RayAddress = None,
    ray_actors: RayActors = None,
    ray_resources: RayResources = "",
    log_json: LogJson = False,
) -> None:
    """The options of every command that scores a model, with the API's names (``log_json``: its progress)."""


def scores(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` all scoring options behind its own; it takes them as ``**options``, ready for the API."""

    @functools.wraps(command)
    def wrapped(context: typer.Context, **values: Any) -> None:
        _quiet()
        # What the user left out is left out here too: the API takes a run's own, or its defaults.
        sources = {p.name: context.get_parameter_source(p.name) for p in shared}
        untouched = [name for name, source in sources.items() if source is not None and source.name == "DEFAULT"]
        values = {name: value for name, value in values.items() if name not in untouched}
        if "tasks" in values:
            values["tasks"] = [name for name in values["tasks"].split(",") if name]
        if "engine_options" in values:
            values["engine_options"] = _key_values(values["engine_options"])
        progress = "json" if values.pop("log_json", False) else True
        command(**values, progress=progress)

    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = list(inspect.signature(_scoring_options).parameters.values())
    told = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    both = [told, *(p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *shared))]
    wrapped.__signature__ = inspect.Signature(both)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in both}
    return wrapped


def _key_values(given: list[str]) -> dict[str, Any]:
    """KEY=VALUE each, with YAML's types; ValueError for one without "="."""
    import yaml

    for one in given:
        if "=" not in one:
            raise ValueError(f"--engine-option {one!r} is not KEY=VALUE")
    pairs = (one.partition("=") for one in given)
    return {key.strip().replace("-", "_"): yaml.safe_load(value) for key, _, value in pairs}


@app.command(
    epilog="Example: `evalkit run smollm2-135m --tasks quick,recall --mode both --out runs/smollm2`. "
    "With all GPUs of this machine: `--workers 8`; of a Ray cluster: `--ray auto`. "
    "A run that was cut off goes on with the same command."
)
@scores
def run(
    model: Annotated[str, typer.Argument(help="Hugging Face id, model folder, or a built-in name (smollm2-135m).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")],
    json_output: Json = False,
    **options: Any,
) -> None:
    """Score MODEL on tasks in both modes; writes RUN/run.json and RUN/outcomes.jsonl."""
    made = api.run(model, out=out, **options)
    from reports.summary import run_summary, run_table

    if json_output:
        print(json.dumps(run_summary(made), indent=2))
    else:
        console.print(run_table(made))
        console.print(f"Run kept in {out}. Next: evalkit show {out}")


@app.command(
    epilog="Examples: `evalkit compare smollm2-135m ./student --tasks arc_easy,quick --limit 200 --data-dir data "
    "--out report` · `evalkit compare runs/teacher runs/student --out report`"
)
@scores
def compare(
    teacher: Annotated[str, typer.Argument(help="Model, or the folder of a finished run.")],
    student: Annotated[str, typer.Argument(help="Model, or the folder of a finished run.")],
    out: ReportDir = Path("compare"),
    json_output: Json = False,
    **options: Any,
) -> None:
    """How far STUDENT falls behind TEACHER in each mode; writes compare.md, compare.json and items.jsonl."""
    _print_comparison(api.compare(teacher, student, out=out, **options), out, json_output)


@app.command(epilog="Example: `evalkit demo --out demo`")
def demo(
    out: ReportDir = Path("demo"),
    amount: Annotated[float, typer.Option(min=0.01, max=0.99, help="Fraction of linear weights to prune.")] = 0.3,
    limit: Limit = 150,
    json_output: Json = False,
) -> None:
    """Compare the built-in model with a pruned copy of itself on embedded tasks: no download, no GPU."""
    _quiet()
    from models.load import load
    from models.prune import save_pruned

    teacher = "smollm2-135m"
    Console(stderr=True).print(f"Making the student: {teacher} with {amount:.0%} of its linear weights pruned")
    student = save_pruned(load(teacher), amount, out / "pruned-student")
    made = api.compare(teacher, str(student), api.DEFAULT_TASKS, out=out, limit=limit, progress=True)
    _print_comparison(made, out, json_output)


@app.command(
    epilog="Examples: `evalkit convert smollm2-135m --out student` · `evalkit convert Qwen/Qwen3-0.6B "
    "--keep qwen3-0.6b --delta --out student` · then `evalkit compare smollm2-135m student --tasks quick`"
)
def convert(
    teacher: Annotated[str, typer.Argument(help="Llama, Qwen2 or Qwen3: hub id, model folder, or a built-in name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The student's folder.")],
    keep: Annotated[
        str,
        typer.Option(help="Layers whose attention stays: 0,2,6, uniform (1 in 4), uniform:N, none, all, qwen3-0.6b."),
    ] = "uniform",
    gate: Annotated[Literal["bounded", "softplus"], typer.Option(help="Decay gate of the KDA layers.")] = "bounded",
    conv_size: Annotated[int, typer.Option(min=2, help="Taps of their short convolution.")] = 4,
    output_gate: Annotated[bool, typer.Option("--output-gate/--no-output-gate", help="Gate their output.")] = True,
    rope: Annotated[bool, typer.Option("--rope/--no-rope", help="Rotate their q and k, as in attention.")] = False,
    delta: Annotated[bool, typer.Option("--delta", help="Store only what differs from the teacher.")] = False,
    text: Annotated[
        Path | None,
        typer.Option(help="Calibration text: .txt, or .jsonl with a field text.", show_default="evalkit's own"),
    ] = None,
    dtype: DType = "auto",
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Make a student of TEACHER with Kimi Delta Attention in all layers but those kept: calibrated, not trained."""
    _quiet()
    from evalkit.progress import bars
    from models.students import make_student
    from reports.probe import probe_sentence, probe_table

    how: dict[str, Any] = {"keep": keep, "delta": delta, "text": text, "dtype": dtype, "device": device}
    kda: dict[str, Any] = {"gate": gate, "conv_size": conv_size, "output_gate": output_gate, "rope": rope}
    with bars(True, teacher) as report:
        note = make_student(teacher, out, report=report, **how, **kda)
    if json_output:
        print(json.dumps(note, indent=2))
        return
    console.print(probe_table(note["probe"]))
    console.print(probe_sentence(note["probe"]))
    console.print(f"Student kept in {out}. Next: evalkit compare {teacher} {out} --tasks quick")


@app.command(epilog="Examples: `evalkit tasks --json` · `evalkit tasks --source lm_eval --matching arc`")
def tasks(
    source: Annotated[
        Literal["evalkit", "lm_eval"], typer.Option(help="evalkit's own, or lm-eval's and the modes that each has.")
    ] = "evalkit",
    matching: Annotated[str, typer.Option(help="Only names that hold this text.", show_default="all")] = "",
    include_path: IncludePath = None,
    json_output: Json = False,
) -> None:
    """List the tasks: views, primary normalisation, where the items come from."""
    if source == "lm_eval":
        _lm_eval_tasks(matching, include_path, json_output)
        return
    found = [task for task in api.tasks() if matching in task.name]
    if json_output:
        keys = (
            "name",
            "version",
            "summary",
            "views",
            "loglikelihood",
            "generation",
            "normalisation",
            "shots",
            "embedded",
            "source",
        )
        print(json.dumps([{key: getattr(task, key) for key in keys} for task in found], indent=2))
        return
    table = Table("Task", "Views (LL → GEN)", "Shots", "Source", box=box.SIMPLE_HEAD, expand=True)
    table.add_column("What", no_wrap=True, overflow="ellipsis", ratio=1)
    for task in found:
        origin = "embedded" if task.embedded else task.source.partition(" ")[0]
        views = " → ".join(dict.fromkeys((task.loglikelihood, task.generation)))
        table.add_row(task.name, views, str(task.shots), origin, task.summary.partition(": ")[2] or task.summary)
    console.print(table)


@app.command(epilog="Examples: `evalkit show compare --task quick -n 5` · `evalkit show runs/smollm2`")
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or of a comparison.")],
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="Items to show.")] = 10,
    everything: Annotated[bool, typer.Option("--all", help="Items that agree, too.")] = False,
    json_output: Json = False,
) -> None:
    """Items that disagree: right by log-likelihood and wrong by generation (a run), or right by the teacher and
    wrong by the student (a comparison); with prompt, reply and what was read from it."""
    from reports.show import disagreements, print_item

    found = disagreements(folder, task, everything)
    if json_output:
        print(json.dumps(found[:number], indent=2, ensure_ascii=False))
        return
    for item in found[:number]:
        print_item(console, item)
    kind = "items" if everything else "items that disagree"
    console.print(f"{min(number, len(found))} of {len(found)} {kind} in {folder}")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Show the version.")] = False,
) -> None:
    if version:
        print(f"evalkit {__version__}")
        raise typer.Exit


def _lm_eval_tasks(matching: str, include_path: Path | None, json_output: bool) -> None:
    """lm-eval's tasks, told from their YAML alone."""
    _quiet()
    from collections import Counter

    from tasks.lm_eval_kinds import mode_word
    from tasks.lm_eval_tasks import PREFIX, kinds

    found = [
        {"name": f"{PREFIX}{name}", "modes": mode_word(kind.modes), "reason": kind.reason}
        for name, kind in kinds(matching, None if include_path is None else str(include_path))
    ]
    if json_output:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    table = Table("Task", "Modes", "Why not both", box=box.SIMPLE_HEAD)
    for row in found:
        table.add_row(row["name"], row["modes"], row["reason"])
    console.print(table)
    counts = Counter(row["modes"] for row in found)
    console.print(f"{len(found)} tasks: {', '.join(f'{n} {modes}' for modes, n in counts.most_common())}")


def _print_comparison(made: Any, out: Path, json_output: bool) -> None:
    from reports.markdown import sentence
    from reports.table import terminal_table

    if json_output:
        print(json.dumps(made.result, indent=2, ensure_ascii=False))
        return
    for who in ("teacher", "student"):
        if made.result[who]["note"]:
            console.print(f"{who.capitalize()}: {made.result[who]['note']}.")
    console.print(f"Report: {out / 'compare.md'}. Items that disagree: evalkit show {out}")
    console.print(sentence(made.result))
    console.print(terminal_table(made.result, console.width))


def _quiet() -> None:
    """Other libraries' bars and chatter would break ours; EVALKIT_DEBUG=1 lets them through, and all of our own."""
    debugged = bool(os.environ.get("EVALKIT_DEBUG"))
    level = stdlib_logging.DEBUG if debugged else stdlib_logging.INFO
    stdlib_logging.getLogger("evalkit").setLevel(level)
    if stdlib_logging.lastResort is not None:  # the handler on standard error of a program that set up none
        stdlib_logging.lastResort.setLevel(level)
    if debugged:
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if "transformers" not in sys.modules:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    # torchao, which transformers imports where it is installed, tells of kernels for GPUs that aren't here.
    for library in ("huggingface_hub", "lm_eval", "torchao", "torch.utils._pytree"):
        stdlib_logging.getLogger(library).setLevel(stdlib_logging.ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
