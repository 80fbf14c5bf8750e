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
"""Metrics that say of each generated reply 1 (right) or 0 (wrong); all others are degrees."""
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
    return next((name for name in metrics(config) if name in RIGHT_OR_WRONG), None)


def metrics(config: Mapping[str, Any]) -> Iterator[str]:
    for entry in config.get("metric_list") or [{"metric": "exact_match"}]:
        metric = entry["metric"]
        yield _code(metric) or str(metric)


def _code(value: Any) -> str:
    """The name of the function that a YAML names by ``!function``; empty: it is none."""
    if callable(value):
        return str(getattr(value, "__name__", value))
    return value.rpartition(".")[2] if isinstance(value, str) and os.path.isabs(value) and _PATH.search(value) else ""


_PATH = re.compile(r"[\w-]\.\w+$")


def mode_word(modes: tuple[Mode, ...]) -> str:
    """As `evalkit tasks --source lm_eval` says it."""
    return "both" if modes == MODES else modes[0] if modes else "refused"
