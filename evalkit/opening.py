"""What `--engine` names -> an engine that is ready, and what run.json says of it.

Nothing in a ``Spec`` changes a score beyond rounding. It pickles, so a worker elsewhere opens the same engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from evalkit.engines.base import Engine
from evalkit.store import Model

EngineName = Literal["hf"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Which model, and how it is run."""

    model: str
    engine: EngineName = "hf"
    name: str = ""
    """Shown instead of the model's own."""
    batch_size: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the engine itself, passed through (tensor_parallel_size=2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """An engine over a loaded model."""

    engine: Engine
    model: Model
    session: Mapping[str, Any]
    """How it ran, for run.json: engine, batch_size, head, device."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages behind the engine."""
    checkpoint: dict[str, Any] | None = None
    """evalkit.json of a distilled checkpoint."""
    profile: Callable[[], Mapping[str, Any]] = dict
    """Where time and tokens went so far, for run.json and the progress line."""
    close: Callable[[], None] = lambda: None
    """Gives back what outlives the object: servers, worker processes."""


def open_engine(spec: Spec) -> Opened:
    """Load ``spec.model`` into its engine. ValueError says what is missing and what to do."""
    if spec.engine not in ENGINES:
        raise ValueError(f"unknown engine {spec.engine!r}: expected {', '.join(ENGINES)}")
    from dataclasses import replace

    from models.load import load

    if spec.options:
        raise ValueError(f"engine {spec.engine!r} takes no option {next(iter(spec.options))!r}")
    loaded = load(
        spec.model,
        dtype=spec.dtype,
        device=spec.device,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
    )
    return open_loaded(replace(loaded, name=spec.name) if spec.name else loaded, spec.batch_size)


def open_loaded(loaded: Any, batch_size: int | None = None) -> Opened:
    """The transformers engine over a model in memory (``models.load.Loaded``)."""
    from evalkit.engines.hf import HFEngine

    engine = HFEngine(loaded.model, loaded.tokenizer, batch_size=batch_size)
    return Opened(
        engine=engine,
        model=Model(
            name=loaded.name,
            fingerprint=loaded.identity,
            parts=loaded.parts,
            dtype=loaded.dtype,
            device=loaded.device,
            parameters=loaded.parameters,
            note=str((loaded.checkpoint or {}).get("note", "")),
        ),
        session={
            "engine": "hf",
            "batch_size": engine.batch_size,
            "head": engine.head_dtype,
            "device": loaded.device,
        },
        checkpoint=loaded.checkpoint,
        profile=engine.profile.row,
    )
