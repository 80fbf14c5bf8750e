"""What `lm_eval run --log_samples` wrote -> a run: old results shown and compared without the model.

Read are results_DATE.json and samples_TASK_DATE.jsonl of lm-eval 0.4. Multiple choice gives log-likelihood outcomes,
with the sums that lm-eval stored and the choices' characters and bytes; tasks that generate give generation outcomes,
with the verdict of lm-eval's own filter and metric. The run says where it came from, and its fingerprint is of what
lm-eval stored of the model (name, revision, arguments), never of weights.
"""

import ast
import datetime
import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit.records import GENERATION, LOGLIKELIHOOD, MODES, ItemRecord, Mode, Normalisation, Outcome, TaskEntry
from evalkit.scoring import decide
from evalkit.settings import Settings
from evalkit.store import Manifest, Model, Run, write_run
from tasks.lm_eval_free import INVALID
from tasks.lm_eval_kinds import RIGHT_OR_WRONG
from tasks.lm_eval_tasks import PREFIX

logger = logging.getLogger("evalkit")
IMPORTED = "lm-eval "
"""Begins the fingerprint of a model whose run was imported."""
IDENTITY = (
    "model_source",
    "model_name",
    "model_sha",
    "model_revision",
    "model_args",
    "model_dtype",
    "chat_template_sha",
)
"""What lm-eval stores of a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One task of lm-eval's output."""

    task: str
    results: Mapping[str, Any]
    """Of the results file that belongs to ``samples``."""
    samples: Path

    @property
    def config(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.results["configs"][self.task]
        return found


def import_run(folder: Path, out: Path | None, tasks: Collection[str] | None = None) -> Run:
    """Read lm-eval's output ``folder`` and write it as the run ``out`` (None: in memory only). ``tasks``: only these.

    Documents whose gold is none of their choices are left out with a warning, as in a run of evalkit's own.
    ValueError: samples are missing or damaged, the version is unknown, the results are of two models or were asked in
    two ways, or ``out`` holds something.
    """
    parts = _parts(folder, tasks)
    identity = _identity(folder, parts)
    records = {part.task: _records(part) for part in parts}
    found = {outcome.mode for rows in records.values() for record in rows for outcome in record.outcomes}
    newest, modes = parts[-1].results, tuple(mode for mode in MODES if mode in found)
    settings = _common_settings(folder, parts, modes)
    entries = tuple(_entry(part, records[part.task]) for part in parts)
    manifest = Manifest(
        model=Model(
            name=str(newest["model_name"]),
            fingerprint=f"{IMPORTED}{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}",
            parts=identity,
            dtype=identity.get("model_dtype", "").removeprefix("torch."),
            parameters=max(0, int(newest["config"].get("model_num_parameters") or 0)),
            note=f"imported from lm-eval {newest['lm_eval_version']}, which stored its name and no hash of its weights",
        ),
        settings=settings,
        tasks=entries,
        versions={"lm_eval": newest["lm_eval_version"], "transformers": str(newest.get("transformers_version", ""))},
        sessions=(
            {
                "imported_from": str(folder),
                "files": sorted({part.samples.name for part in parts}),
                "imported": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "scored": [str(part.results.get("date", "")) for part in parts],
                "lm_eval_config": {key: value for key, value in newest["config"].items() if _plain(value)},
            },
        ),
    )
    return write_run(out, manifest, [record for part in parts for record in records[part.task]], "the imported run")


# --- files ---------------------------------------------------------------------------------------------------------


def _parts(folder: Path, tasks: Collection[str] | None) -> list[Part]:
    """Of each task the newest results that have samples, in order of time."""
    files = sorted(folder.rglob("results_*.json"), key=lambda file: file.name)
    if not files:
        raise ValueError(
            f"{folder} has no results_*.json of lm-eval (`lm_eval run --output_path {folder} --log_samples`)"
        )
    parts: dict[str, Part] = {}
    for file in files:
        results = _results(file)
        date = file.stem.removeprefix("results_")
        for task in results["configs"]:
            if tasks is not None and task not in tasks:
                continue
            samples = file.with_name(f"samples_{task}_{date}.jsonl")
            if not samples.is_file():
                raise ValueError(f"{file} has no {samples.name} beside it: run lm-eval again with --log_samples")
            parts.pop(task, None)
            parts[task] = Part(task=task, results=results, samples=samples)
    if not parts:
        held = sorted({task for file in files for task in _results(file)["configs"]})
        raise ValueError(f"{folder} has none of the tasks {', '.join(sorted(tasks or ()))}; it has {', '.join(held)}")
    return list(parts.values())


def _results(file: Path) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    version = results.get("lm_eval_version") if isinstance(results, dict) else None
    if not re.match(r"0\.4\.", str(version)):
        raise ValueError(f"{file} is of lm-eval {version or 'of unknown version'}; 0.4 can be imported")
    for field in ("configs", "config", "model_name"):
        if field not in results:
            raise ValueError(f"{file} has no {field!r}: it is not what lm-eval 0.4 writes with --output_path")
    return dict(results)


def _identity(folder: Path, parts: Sequence[Part]) -> dict[str, str]:
    """What all the files say of the model; ValueError if they name two."""
    found = []
    for part in parts:
        known = {**part.results["config"], **part.results}
        told = {key: known[key] for key in IDENTITY if known.get(key)}
        found.append(
            {key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in told.items()}
        )
    for part, one in zip(parts, found, strict=True):
        if one != found[0]:
            key = next(key for key in IDENTITY if one.get(key) != found[0].get(key))
            raise ValueError(
                f"{folder} holds results of two models: {key} is {found[0].get(key)!r} in {parts[0].samples.name} and "
                f"{one.get(key)!r} in {part.samples.name}; import each model's own folder"
            )
    return found[0]


def _samples(part: Part) -> list[dict[str, Any]]:
    """The lines of the first filter, in order of documents."""
    rows = []
    for number, line in enumerate(part.samples.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            missing = {"doc_id", "target", "arguments", "resps", "filtered_resps"} - set(row)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{part.samples}, line {number}: damaged ({error})") from error
        if missing:
            raise ValueError(f"{part.samples}, line {number}: no field {sorted(missing)[0]!r}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{part.samples} is empty: run lm-eval again with --log_samples")
    kept = [row for row in rows if row.get("filter") == rows[0].get("filter")]
    return sorted(kept, key=lambda row: int(row["doc_id"]))


# --- tasks ---------------------------------------------------------------------------------------------------------


def _entry(part: Part, records: Sequence[ItemRecord]) -> TaskEntry:
    config = part.config
    normalised = any(metric.get("metric") == "acc_norm" for metric in config.get("metric_list") or [])
    ranked = _kind(part) == "multiple_choice"
    normalisation: Normalisation = "character" if normalised and ranked else "raw"
    return TaskEntry(
        name=f"{PREFIX}{part.task}",
        version=_version(part),
        loglikelihood="native",
        generation="native",
        normalisation=normalisation,
        shots=int((part.results.get("n-shot") or {}).get(part.task) or config.get("num_fewshot") or 0),
        n=len(records),
    )


def _version(part: Part) -> str:
    versions = part.results.get("versions") or {}
    return f"{versions.get(part.task, 'unknown')} (imported from lm-eval {part.results['lm_eval_version']})"


def _kind(part: Part) -> str:
    return str(part.config.get("output_type") or "generate_until")


def _common_settings(folder: Path, parts: Sequence[Part], modes: tuple[Mode, ...]) -> Settings:
    """What all the files say of how the model was asked; ValueError if they say two things."""
    found = [_settings(part.results, modes).model_dump() for part in parts]
    for part, one in zip(parts, found, strict=True):
        if one != found[0]:
            key = next(key for key in one if one[key] != found[0][key])
            raise ValueError(
                f"{folder} holds results that were asked in two ways: {key} is {found[0][key]!r} in "
                f"{parts[0].samples.name} and {one[key]!r} in {part.samples.name}; import them apart, with --tasks"
            )
    return _settings(parts[0].results, modes)


def _settings(results: Mapping[str, Any], modes: tuple[Mode, ...]) -> Settings:
    limit = results["config"].get("limit")
    return Settings(
        modes=modes,
        chat=bool(results.get("chat_template")),
        system=str(results.get("system_instruction") or ""),
        limit=int(limit) if limit and float(limit) >= 1 else None,
    )


def _records(part: Part) -> list[ItemRecord]:
    samples = _samples(part)
    if _kind(part) == "multiple_choice":
        try:
            return _all_ranked(part, samples, by_text=False)
        except ValueError as error:
            try:
                return _all_ranked(part, samples, by_text=True)
            except ValueError:
                raise error from None  # of the reading that lm-eval's own tasks mostly have
    if _kind(part) == "generate_until":
        return [_said(part, sample) for sample in samples]
    raise ValueError(
        f"task {part.task!r} can't be imported: its output_type {_kind(part)} has neither choices nor replies; "
        f"name the others with --tasks"
    )


def _all_ranked(part: Part, samples: Sequence[Mapping[str, Any]], by_text: bool) -> list[ItemRecord]:
    """``by_text``: whether a target that is both a choice's place and a choice's text means the text. lm-eval logs
    both alike; only one of them gives the accuracies that it logged."""
    records, bad = [], []
    for sample in samples:
        try:
            records.append(_ranked(part, sample, by_text))
        except _NoGold as error:
            bad.append(str(error))
    if not records:
        raise ValueError(bad[0])
    if bad:
        logger.warning("%s: %d of %d documents are left out; %s", part.task, len(bad), len(samples), bad[0])
    return records


class _NoGold(ValueError):
    """A document whose target is none of its choices."""


def _ranked(part: Part, sample: Mapping[str, Any], by_text: bool) -> ItemRecord:
    """A document of multiple choice."""
    arguments = [(str(one[0]), str(one[1])) for one in _arguments(part, sample)]
    sums = [_loglikelihood(part, sample, resp) for resp in sample["filtered_resps"]]
    blind: list[float] = []
    half = len(arguments) // 2
    if len(arguments) > 2 and all(not context for context, _ in arguments[half:]) and arguments[0][0]:
        arguments, sums, blind = arguments[:half], sums[:half], sums[half:]  # acc_mutual_info's second half
    if len(sums) != len(arguments) or len(sums) < 2:
        raise _bad(part, sample, f"it has {len(sums)} log-likelihoods for {len(arguments)} choices")
    contexts = [context for context, _ in arguments]
    delimiter = _delimiter(part)
    apart = len(set(contexts)) > 1
    choices = contexts if apart else [answer.removeprefix(delimiter) for _, answer in arguments]
    scored = [answer.removeprefix(delimiter) for _, answer in arguments]
    right = _golds(part, sample, choices, sums, apart, by_text)
    outcome = Outcome(
        mode=LOGLIKELIHOOD,
        view="native",
        outcome="wrong",
        logprobs=tuple(sums),
        characters=tuple(map(len, scored)),
        bytes=tuple(len(text.encode()) for text in scored),
        blind=tuple(blind),
    )
    normalisation = _entry(part, []).normalisation
    logged: tuple[tuple[str, Normalisation], ...] = (("acc", "raw"), ("acc_norm", "character"))
    for metric, how in logged[: 1 if apart else 2]:  # of contexts lm-eval's acc_norm counts the contexts' characters
        made = decide(outcome, right[0], choices, how, right[1:])
        if metric in sample and not made.tied and float(sample[metric]) != float(made.outcome == "correct"):
            what = "the likeliest choice" + (" per character" if how == "character" else "")
            raise _bad(part, sample, f"lm-eval's {metric} is {sample[metric]}, which is not that of {what}")
    return _record(
        part,
        sample,
        choices=choices,
        golds=right,
        prompt=contexts[0] if not apart else f"[{' | '.join(contexts)}]",
        texts=[text for argument in arguments for text in argument],
        outcome=decide(outcome, right[0], choices, normalisation, right[1:]),
    )


def _said(part: Part, sample: Mapping[str, Any]) -> ItemRecord:
    """A document with a generated reply."""
    metric = next((name for name in sample.get("metrics", []) if name in RIGHT_OR_WRONG), None)
    score = sample.get(metric or "")
    if metric is None or score not in (0, 1):
        names = ", ".join(map(str, sample.get("metrics", []))) or "none"
        raise _bad(part, sample, f"no metric says right (1) or wrong (0); it has {names}")
    reply, read = sample["resps"][0], sample["filtered_resps"][0]
    reply = str(reply[0] if isinstance(reply, list) else reply)
    read = read[0] if isinstance(read, list) and read else read
    read = str(read) if isinstance(read, (str, int, float)) else ""  # a filter may give None, or an object
    none = not score and (read in ("", INVALID) or not reply.strip())
    at = reply.rfind(read) if read else -1
    outcome = Outcome(
        mode=GENERATION,
        view="native",
        outcome="correct" if score else "wrong" if not none else "unparsed" if reply.strip() else "empty",
        choice=0 if score else None,
        answer="" if none else read,
        reply=reply,
        span=(at, at + len(read)) if at >= 0 and not none else None,
        rule=f"lm-eval's {metric} after filter {sample.get('filter', 'none')}",
    )
    prompt = str(_arguments(part, sample)[0][0])
    target = str(sample["target"])
    return _record(part, sample, choices=[target], golds=[0], prompt=prompt, texts=[prompt, target], outcome=outcome)


def _record(
    part: Part,
    sample: Mapping[str, Any],
    *,
    choices: Sequence[str],
    golds: Sequence[int],
    prompt: str,
    texts: Sequence[str],
    outcome: Outcome,
) -> ItemRecord:
    name = f"{PREFIX}{part.task}"
    item = f"{name}-{int(sample['doc_id']):05d}"
    return ItemRecord(
        task=name,
        version=_version(part),
        item=item,
        prompt_sha256=hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest(),
        gold=golds[0],
        also=tuple(golds[1:]),
        choices=tuple(choices),
        cluster=item,
        prompts={"native": prompt},
        outcomes=(outcome,),
    )


def _arguments(part: Part, sample: Mapping[str, Any]) -> list[list[Any]]:
    """(prompt, continuation or settings) of each request, however the log spells them."""
    found = sample["arguments"]
    try:
        rows = list(found.values()) if isinstance(found, Mapping) else list(found)
        return [list(row.values()) if isinstance(row, Mapping) else list(row) for row in rows]
    except (TypeError, AttributeError) as error:
        raise _bad(part, sample, f"its arguments are {str(found)[:40]!r}") from error


def _loglikelihood(part: Part, sample: Mapping[str, Any], resp: Any) -> float:
    """lm-eval writes every number as text."""
    try:
        return float(resp[0] if isinstance(resp, list) else resp)
    except (TypeError, ValueError, IndexError) as error:
        raise _bad(part, sample, f"{resp!r} is no log-likelihood") from error


def _golds(
    part: Part, sample: Mapping[str, Any], choices: Sequence[str], sums: Sequence[float], apart: bool, by_text: bool
) -> list[int]:
    """Places of the right choices, from lm-eval's target as text: a place, a list of places, or a choice."""
    target = str(sample["target"])
    if apart:  # the target is the text after all contexts; which one is right, only the metric tells
        top = max(range(len(sums)), key=lambda i: sums[i])
        if float(sample.get("acc", 0)) == 1:
            return [top]
        if len(choices) == 2 and "acc" in sample:
            return [1 - top]
        raise _bad(part, sample, "which of its contexts is right is not in the log")
    text = [choices.index(target)] if target in choices else []
    if text and by_text:
        return text
    try:
        found = ast.literal_eval(target)
    except (ValueError, SyntaxError):
        found = None
    golds = [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, int)]
    golds = [one for one in golds if 0 <= one < len(choices)]
    if not golds and not text:
        error = _bad(part, sample, f"its target {target!r} is none of the {len(choices)} choices")
        raise error if float(sample.get("acc", 0)) else _NoGold(error)  # lm-eval counts what has no gold as wrong
    return golds or text


def _delimiter(part: Part) -> str:
    """Between prompt and choice; in a chat a turn begins with the choice, unless a prefix is begun there."""
    prefix = str(part.config.get("gen_prefix") or "")
    chat = part.results.get("chat_template") and (not prefix or prefix[-1].isspace())
    return "" if chat else str(part.config.get("target_delimiter", " "))


def _bad(part: Part, sample: Mapping[str, Any], what: str) -> ValueError:
    return ValueError(
        f"{part.samples}, document {sample['doc_id']} of {part.task!r}: {what}; leave the task out with --tasks"
    )


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))
