"""A model's name on a server -> an engine that asks that server."""

from collections.abc import Mapping
from typing import Any

from evalkit.engines.base import Engine
from evalkit.opening import Opened, Spec
from evalkit.store import Model

_SERVED = ("tokenizer", "endpoint", "api_key_env", "concurrency", "timeout", "retries", "max_length")
"""Options of engine openai."""


def open_served(spec: Spec) -> Opened:
    """The model that ``spec.base_url`` knows as ``spec.model``; ``_SERVED`` are its options."""
    from evalkit.engines.server import Server

    chat = spec.options.get("endpoint") == "chat"
    allowed = [name for name in _SERVED if not (chat and name in ("tokenizer", "max_length"))]
    unknown = [name for name in spec.options if name not in allowed]
    if unknown:  # the value is not repeated: it may be a key
        raise ValueError(
            f"engine 'openai' takes no option {unknown[0]!r}{' with endpoint=chat' if chat else ''}: expected "
            f"{', '.join(allowed)} (keys come from the environment alone)"
        )
    if not spec.base_url:
        raise ValueError("engine 'openai' needs its server: --base-url http://HOST:PORT/v1")
    fixed = {"batch_size": spec.batch_size is None, "dtype": spec.dtype == "auto", "device": spec.device == "auto"}
    for name, untouched in fixed.items():
        if not untouched:
            raise ValueError(f"the server chooses its own {name}; leave --{name.replace('_', '-')} out")
    if chat and (spec.revision is not None or spec.trust_remote_code):
        raise ValueError("endpoint=chat loads no tokenizer here; leave --revision and --trust-remote-code out")
    threads = _at_least(spec.options, "concurrency", 1, 16)
    variable = spec.options.get("api_key_env")
    server = Server(
        spec.base_url,
        key_variable=None if variable is None else str(variable),
        timeout=_at_least(spec.options, "timeout", 1, 600),
        retries=_at_least(spec.options, "retries", 0, 6),
        threads=threads,
    )
    try:
        return _open_at(server, spec, threads)
    except BaseException:
        server.close()
        raise


def _open_at(server: Any, spec: Spec, threads: int) -> Opened:
    from evalkit.engines.hf import window_of
    from evalkit.engines.messages import ChatEngine
    from evalkit.engines.openai import OpenAIEngine
    from evalkit.engines.replies import eos_ids
    from evalkit.engines.server import served_models
    from models.fingerprint import fingerprint_served
    from models.served import load_served

    known = served_models(server, spec.model)
    weights = f"unknown: {spec.model} at {server.url}"
    session: dict[str, Any] = {"engine": "openai", "server": server.url, "concurrency": threads}
    endpoint = spec.options.get("endpoint", "completions")
    engine: Engine
    if endpoint == "chat":
        chat = engine = ChatEngine(server, spec.model, threads=threads)
        parts, identity = fingerprint_served(None, None, weights)
        session |= {"prompts": "messages"}
        check = chat.check
    elif endpoint == "completions":
        source = str(spec.options.get("tokenizer") or known.get("root") or spec.model)
        try:
            local = load_served(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        except ValueError as error:
            raise ValueError(
                f"the tokenizer of {source!r} could not be loaded ({error}); name it: --engine-option "
                f"tokenizer=FOLDER_OR_ID, or send messages, which need none: --engine-option endpoint=chat"
            ) from error
        window = _at_least(spec.options, "max_length", 2, known.get("max_model_len") or window_of(local.config))
        plain = engine = OpenAIEngine(
            server,
            spec.model,
            local.tokenizer,
            eos=eos_ids(local, local.tokenizer),
            window=window,
            threads=threads,
        )
        parts, identity = fingerprint_served(local.tokenizer, local, weights)
        found = plain.dialect
        session |= {"prompts": "token ids" if found.ids else "text", "scores": found.scores or "none"}
        session |= {"window": plain.max_length, "system_fingerprint": found.system or None}
        check = plain.check
    else:
        raise ValueError(f"endpoint is {endpoint!r}: expected completions or chat")
    model = Model(name=spec.name or spec.model, fingerprint=identity, parts=parts)
    return Opened(engine=engine, model=model, session=session, check=check, close=server.close)


def _at_least(options: Mapping[str, Any], name: str, least: int, default: int) -> int:
    """A whole number among ``options``."""
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"engine option {name} is {value!r}: expected a whole number of {least} or more")
    return value
