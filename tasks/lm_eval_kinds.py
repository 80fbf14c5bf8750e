"""Which modes a task of lm-evaluation-harness can be scored in, told from its YAML alone."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evalkit.records import LOGLIKELIHOOD, MODES, Mode

RIGHT_OR_WRONG = (
    *("exact_match", "acc", "em", "accuracy", "quasi_exact_match", "numerical_match", "math_verify", "is_included"),
    *("prompt_level_strict_acc", "exact", "relaxed_accuracy", "anywhere_accuracy"),
)
"""Metrics that say of each generated reply 1 (right) or 0 (wrong), as code under ``process_results`` makes them or as
lm-eval logs them; all others are degrees."""
TWO_VALUED = ("exact", "is_included", "relaxed_accuracy", "anywhere_accuracy")
"""Functions of a YAML's own, named as metrics, that do so. Others return what their aggregation needs (multirc's em,
lingoly's exact_match)."""
SHARES = ("coqa/utils.process_results", "coqa.utils.process_results", "process_results_coqcat")
"""Code whose em is a mean over the reference answers."""
RANKING = ("process_results_mcqa",)
"""Functions under ``process_results`` that do what lm-eval does without one (AGIEval's: several choices are right)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What evalkit can make of one task."""

    modes: tuple[Mode, ...]
    reason: str = ""
    """Why it is not both."""


def kind_of(config: Mapping[str, Any]) -> Kind:
    """``config``: the task's YAML, its functions resolved or not."""
    kind = {
        "multiple_choice": _multiple_choice,
        "loglikelihood": _loglikelihood,
        "generate_until": _generate_until,
    }.get(config.get("output_type") or "generate_until")
    if config.get("class") is not None:
        return Kind(modes=(), reason="a Python class of its own, which need not have choices")
    if config.get("doc_to_image") is not None or config.get("doc_to_audio") is not None:
        return Kind(modes=(), reason="its documents hold images or sound")
    if kind is None:
        return Kind(modes=(), reason=f"output_type {config['output_type']}: there is no answer to rank or to say")
    return kind(config)


def _multiple_choice(config: Mapping[str, Any]) -> Kind:
    if config.get("doc_to_choice") is None:
        return Kind(modes=(), reason="output_type multiple_choice without doc_to_choice")
    own = _code(config.get("process_results"))
    if own and own not in RANKING:
        return Kind(modes=(), reason=f"its own code ({own}) scores the choices, not which of them is likeliest")
    return Kind(modes=MODES)


def _loglikelihood(config: Mapping[str, Any]) -> Kind:
    if own := _code(config.get("process_results")):
        return Kind(modes=(), reason=f"its own code ({own}) reads the log-likelihoods")
    return Kind(modes=MODES)


def _generate_until(config: Mapping[str, Any]) -> Kind:
    if config.get("unsafe_code"):
        return Kind(modes=(), reason="it runs code that the model wrote")
    target = config.get("doc_to_target")
    if target is None or target == "" or (isinstance(target, int) and config.get("doc_to_choice") is None):
        return Kind(modes=(), reason="it names no answer as text (doc_to_target)")
    if (config.get("repeats") or 1) > 1:
        return Kind(modes=(LOGLIKELIHOOD,), reason=f"its verdict is on {config['repeats']} sampled replies an item")
    if metric_of(config) is None:
        found = ", ".join(metrics(config)) or "none"
        return Kind(modes=(LOGLIKELIHOOD,), reason=f"no metric says right or wrong (it has {found})")
    return Kind(modes=MODES)


def metric_of(config: Mapping[str, Any]) -> str | None:
    """The metric that a verdict on a generated reply comes from; None: all are degrees."""
    entries = config.get("metric_list") or [{"metric": "exact_match"}]
    return next(
        (_name(entry["metric"]) for entry in entries if _two_valued(entry, config.get("process_results"))), None
    )


def _two_valued(entry: Mapping[str, Any], process_results: Any) -> bool:
    """Whether a metric says right or wrong of a reply. lm-eval's own `acc` does not: of a generated reply it returns
    its arguments, for code under ``process_results`` to take its place."""
    metric = entry["metric"]
    if process_results is not None:
        return _name(metric) in RIGHT_OR_WRONG and not _place(process_results).endswith(SHARES)
    if _code(metric):
        return _code(metric) in TWO_VALUED
    return metric == "exact_match" or (bool(entry.get("hf_evaluate")) and metric in RIGHT_OR_WRONG)


def metrics(config: Mapping[str, Any]) -> Iterator[str]:
    for entry in config.get("metric_list") or [{"metric": "exact_match"}]:
        yield _name(entry["metric"])


def _name(metric: Any) -> str:
    return _code(metric) or str(metric)


def _place(function: Any) -> str:
    """A function's file or module, and its name."""
    return f"{function.__module__}.{function.__name__}" if callable(function) else str(function)


def _code(value: Any) -> str:
    """The name of the function that a YAML names by ``!function``; empty: it is none."""
    if callable(value):
        return str(getattr(value, "__name__", value))
    return value.rpartition(".")[2] if isinstance(value, str) and os.path.isabs(value) and _PATH.search(value) else ""


_PATH = re.compile(r"[\w-]\.\w+$")


def mode_word(modes: tuple[Mode, ...]) -> str:
    """As `evalkit tasks --source lm_eval` says it."""
    return "both" if modes == MODES else modes[0] if modes else "refused"
