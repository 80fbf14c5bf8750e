"""What `--engine` names -> an engine that is ready, and what run.json says of it.

Nothing in a ``Spec`` changes a score beyond rounding. It pickles, so a worker elsewhere opens the same engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from evalkit.engines.base import Engine
from evalkit.settings import Settings
from evalkit.store import Model

EngineName = Literal["hf", "vllm", "openai"]
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
    base_url: str = ""
    """Of the server that runs the model (engine openai)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the engine itself, passed through (tensor_parallel_size=2)."""


def _any(settings: Settings) -> None:
    """Every setting can be served."""


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
    check: Callable[[Settings], None] = _any
    """ValueError for settings that the engine can't serve, before anything is written."""
    profile: Callable[[], Mapping[str, Any]] = dict
    """Where time and tokens went so far, for run.json and the progress line."""
    close: Callable[[], None] = lambda: None
    """Gives back what outlives the object: servers, worker processes."""
    workers: int = 1
    """Engines that answer at the same time."""
    live: bool = False
    """A module of the caller's: hooks and code of its own may change replies, and nothing tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Over which workers a run's requests are spread. None named: the engine runs in this process."""

    workers: int | None = None
    """Processes of this machine, one a GPU."""
    ray: str | None = None
    """Address of a Ray cluster, or "auto"."""
    ray_actors: int | None = None
    """None: as many as the cluster has room for."""
    ray_resources: str = ""
    """Of each actor, e.g. "num_gpus=1,num_cpus=2"."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.ray is not None:
            raise ValueError("--workers are processes of this machine and --ray uses a cluster: give one of them")
        if self.ray is None and (self.ray_actors is not None or self.ray_resources):
            raise ValueError("--ray-actors and --ray-resources need --ray ADDRESS (or auto)")
        for name, value in (("--workers", self.workers), ("--ray-actors", self.ray_actors)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: expected 1 or more")

    def __bool__(self) -> bool:
        return self.workers is not None or self.ray is not None


def own_files(model: str) -> Path | None:
    """The user's folder or file that ``model`` means; None: a name, of a built-in model (those come first) or of one
    elsewhere."""
    path = Path(model).expanduser()
    if not path.exists():
        return None
    from models.builtin import BUILTIN

    return None if model in BUILTIN else path


def open_spread(spec: Spec, spread: Spread) -> Opened:
    """``spec`` in every worker of ``spread``, behind one engine; the model is loaded in the workers alone."""
    from dataclasses import replace
    from functools import partial

    from evalkit.engines.pool import Pool

    if spec.engine == "openai":
        raise ValueError("engine 'openai' is one server's; ask more of it at once with --engine-option concurrency=32")
    own = own_files(spec.model)
    if own is not None:  # workers elsewhere start in another folder
        spec = replace(spec, name=spec.name or spec.model, model=str(own.resolve()))
    opener = partial(open_engine, spec)
    leave: Callable[[], None] = lambda: None  # noqa: E731
    if spread.ray is not None:
        from evalkit.engines.ray import RayWorker, connect, read_resources, room

        asked = read_resources(spread.ray_resources)
        leave = connect(spread.ray)
        try:
            resources, fits = room(asked)
            pool = Pool(lambda number: RayWorker(number, opener, resources), spread.ray_actors or fits)
        except BaseException:
            leave()
            raise
        where = {"ray": resources}
    else:
        from evalkit.engines.local import LocalWorker, environments

        if ":" in spec.device:
            raise ValueError(
                f"--workers deals out the GPUs itself, but --device {spec.device} names one; leave it out, and choose "
                f"among them with CUDA_VISIBLE_DEVICES=0,2"
            )
        seen = environments(spread.workers or 1, spec.device)
        pool = Pool(lambda number: LocalWorker(number, opener, seen[number]), len(seen))
        where = {}

    def close() -> None:
        try:
            pool.close()
        finally:
            leave()

    session = {**pool.opened.session, "workers": pool.size, **where}
    opened: Opened = replace(pool.opened, engine=pool, session=session, close=close, workers=pool.size)
    return opened


def open_engine(spec: Spec) -> Opened:
    """Load ``spec.model`` into its engine. ValueError says what is missing and what to do."""
    if spec.engine not in ENGINES:
        raise ValueError(f"unknown engine {spec.engine!r}: expected {', '.join(ENGINES)}")
    if spec.engine == "openai":
        from evalkit.open_served import open_served

        return open_served(spec)
    if spec.base_url:
        raise ValueError(f"engine {spec.engine!r} runs the model here, not at --base-url; add --engine openai")
    if spec.engine == "vllm":
        from evalkit.open_vllm import open_vllm

        return open_vllm(spec)
    from dataclasses import replace

    from models.load import load

    options = dict(spec.options)
    dequantise = options.pop("dequantise", None)
    if options:
        raise ValueError(f"engine {spec.engine!r} takes no option {next(iter(options))!r}: it has dequantise alone")
    if dequantise not in (None, True, False):
        raise ValueError(f"dequantise is {dequantise!r}: expected true or false")
    loaded = load(
        spec.model,
        dtype=spec.dtype,
        device=spec.device,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
        dequantise=dequantise,
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
            note=loaded.note,
        ),
        session={
            "engine": "hf",
            "batch_size": engine.batch_size,
            "head": engine.head_dtype,
            "device": loaded.device,
            "class": type(loaded.model).__name__,
            "attention": getattr(getattr(loaded.model, "config", None), "_attn_implementation", None),
        },
        versions=loaded.quantisation.versions if loaded.quantisation else {},
        checkpoint=loaded.checkpoint,
        profile=engine.profile.row,
        close=engine.close,
    )
