"""A model's name -> vLLM with that model in it."""

from typing import Any

from evalkit.opening import Opened, Spec
from evalkit.store import Model


def open_vllm(spec: Spec) -> Opened:
    """The model is loaded twice in turn: by transformers on the CPU, which tells what it is, then by vLLM. Of a
    quantised one, which transformers may not run here, the files tell."""
    from tempfile import TemporaryDirectory

    from evalkit.engines.hf import window_of
    from evalkit.engines.replies import eos_ids
    from evalkit.engines.vllm import (
        VLLMEngine,
        changes_model,
        check_options,
        kernel_name,
        need_vllm,
        start_llm,
        stop_llm,
    )
    from models.fingerprint import changed
    from models.load import is_delta, load, resolve
    from models.unloaded import describe_packed

    need_vllm()
    check_options(spec.options, spec.device)
    how: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    source = resolve(spec.model)
    loaded = None if is_delta(source) else describe_packed(spec.model, kernel_name(), spec.dtype, **how)
    loaded = loaded or load(spec.model, dtype=spec.dtype, device="cpu", **how)
    tokenizer, eos = loaded.tokenizer, eos_ids(loaded.model, loaded.tokenizer)
    window = window_of(loaded.model.config)
    own = changes_model(spec.options)
    parts, identity = changed(loaded.parts, own) if own else (loaded.parts, loaded.identity)
    scratch = TemporaryDirectory(prefix="evalkit-") if is_delta(source) else None
    if scratch is not None:  # vLLM reads whole models only
        source = scratch.name
        loaded.model.save_pretrained(source)
        tokenizer.save_pretrained(source)
    model = Model(
        name=spec.name or loaded.name,
        fingerprint=identity,
        parts=parts,
        dtype=loaded.dtype,
        parameters=loaded.parameters,
        note=loaded.note,
    )
    checkpoint = loaded.checkpoint
    del loaded  # vLLM's own copy comes next
    try:
        llm = start_llm(
            source,
            dtype=model.dtype,
            window=window,
            batch_size=spec.batch_size,
            options=spec.options,
            **how,
        )
    finally:
        if scratch is not None:
            scratch.cleanup()
    import vllm
    from vllm.platforms import current_platform

    engine = VLLMEngine(llm, tokenizer, eos=eos, window=window)
    device = str(current_platform.device_type)
    return Opened(
        engine=engine,
        model=model.model_copy(update={"device": device}),
        session={
            "engine": "vllm",
            "batch_size": engine.batch_size,
            "head": engine.head_dtype,
            "device": device,
            "options": dict(spec.options),
        },
        versions={"vllm": vllm.__version__},
        checkpoint=checkpoint,
        close=lambda: stop_llm(llm),
    )
