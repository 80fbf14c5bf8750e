"""Hybrid-KDA models in vLLM against the same folders in transformers, float32: scores and greedy replies."""

import itertools
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evalkit.opening import Spec, open_engine
from evalkit.records import Generation, Request
from models.hybrid_config import HybridKDAConfig
from models.load import load
from tests.models.hybrids import CLOSE, tiny_hybrid, tiny_teacher
from tests.tiny import tiny_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("vllm")]  # vLLM's own warnings

TOLERANCE = 1e-4
STEP = 64
"""Tokens that vLLM runs at a time, of all requests together: prompts come in pieces, beside others' and replies."""
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama-mlp-bias": ("llama", {"attention_bias": True, "mlp_bias": True}, {"kda_rope": True}),
    "qwen2-softplus": ("qwen2", {"hidden_size": 128}, {"kda_gate": "softplus", "kda_output_gate": False}),
    "qwen3-heads": ("qwen3", {}, {"kda_heads": 6, "kda_kv_heads": 3, "kda_head_dim": 16, "kda_conv_size": 3}),
}
"""teacher's family and options, the student's. vLLM's attention on the CPU wants heads of 32 and more."""


def saved(case: str, folder: Path, keep: tuple[int, ...] = (1,)) -> Path:
    family, of_teacher, of_student = CASES[case]
    tokenizer = tiny_tokenizer()
    teacher = tiny_teacher(family, vocab_size=len(tokenizer), head_dim=32, **of_teacher)
    tiny_hybrid(teacher, keep, **of_student).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ids(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, 400, (count,), generator=generator).tolist())


def requests() -> list[Request]:
    """Prompts shorter than the convolution, around a chunk and a step, and some that share their beginning."""
    found = []
    for n in (1, 2, 3, 17, 63, 64, 65, 130):
        tails = tuple(ids(m, 10 * n + m) for m in (1, 1, 2, 9))
        found.append(Request(prompt=ids(n, n), continuations=tails, generation=Generation(max_tokens=12)))
    for n in (1, 2, 40):
        tails = tuple(ids(m, 20 * n + m) for m in (1, 3, 20))
        prompt = ids(70, 0) + ids(n, 3)
        found.append(Request(prompt=prompt, continuations=tails, generation=Generation(max_tokens=5)))
    return found


@pytest.mark.parametrize(
    ("case", "caching"), [("llama", True), ("llama", False), *((case, True) for case in CASES if case != "llama")]
)
def test_vllm_scores_and_says_what_transformers_does(case: str, caching: bool, tmp_path: Path) -> None:
    folder, asked = saved(case, tmp_path), requests()
    wanted = dict(open_engine(Spec(model=str(folder), dtype="float32", device="cpu")).engine.answer(asked))
    options = {
        "enforce_eager": True,
        "max_num_batched_tokens": STEP,
        "max_num_seqs": 8,
        "enable_prefix_caching": caching,
        "block_size": 32,
    }
    opened = open_engine(Spec(model=str(folder), dtype="float32", engine="vllm", options=options))
    try:
        found = [dict(opened.engine.answer(asked)) for _ in range(2)]  # the second time from states in the cache
        hits = cached_tokens(opened.engine, asked[7].prompt)
    finally:
        opened.close()
    for replies, (i, reply) in itertools.product(found, wanted.items()):
        assert replies[i].generated == reply.generated
        for row, expected in zip(replies[i].logprobs, reply.logprobs, strict=True):
            for a, b in zip(row, expected, strict=True):
                assert abs(a - b) <= TOLERANCE * max(1.0, abs(b)), (i, a, b)
    assert len({reply.generated for reply in wanted.values()}) > 8, "the model says the same whatever it reads"
    assert bool(hits) == caching, "states were read from the cache, or were not, against what was asked"


def cached_tokens(engine: Any, prompt: tuple[int, ...]) -> int:
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    llm = engine.llm.llm_engine
    llm.add_request("hits", tokens_input(list(prompt)), SamplingParams(max_tokens=1))
    while llm.has_unfinished_requests():
        for output in llm.step():
            hits = output.num_cached_tokens
    return int(hits)


def test_heads_are_split_over_tensor_parallel_ranks(tmp_path: Path) -> None:
    """In a process of its own: vLLM starts others for the ranks."""
    folder, asked = saved("llama", tmp_path / "model"), requests()[3:8]
    wanted = dict(open_engine(Spec(model=str(folder), dtype="float32", device="cpu")).engine.answer(asked))
    code = """
        if __name__ == "__main__":
            import json, sys
            from evalkit.opening import Spec, open_engine
            from tests.models.test_vllm_plugin import requests
            options = {"enforce_eager": True, "tensor_parallel_size": 2, "max_num_batched_tokens": 64}
            opened = open_engine(Spec(model=sys.argv[1], dtype="float32", engine="vllm", options=options))
            replies = dict(opened.engine.answer(requests()[3:8]))
            opened.close()
            rows = [[replies[i].logprobs, replies[i].generated.tokens] for i in range(len(replies))]
            open(sys.argv[2], "w").write(json.dumps(rows))
    """
    script, out = tmp_path / "ranks.py", tmp_path / "rows.json"
    script.write_text("\n".join(line[8:] for line in code.splitlines()))
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, script, folder, out], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for i, (rows, tokens) in enumerate(json.loads(out.read_text())):
        assert tuple(tokens) == wanted[i].generated.tokens  # type: ignore[union-attr]
        for row, expected in zip(rows, wanted[i].logprobs, strict=True):
            assert row == pytest.approx(list(expected), rel=TOLERANCE, abs=TOLERANCE)


def test_a_delta_checkpoint_is_served_too(tmp_path: Path) -> None:
    from models.delta import save_delta

    folder = saved("llama", tmp_path / "base")
    teacher = load(str(folder), device="cpu")
    student = load(str(folder), device="cpu").model
    with torch.no_grad():
        student.model.layers[0].kda.A_log += 0.5
    save_delta(student, teacher, tmp_path / "delta")
    asked = requests()[3:5]
    replies, models = [], []
    for engine, options in (("hf", {}), ("vllm", {"enforce_eager": True})):
        spec = Spec(model=str(tmp_path / "delta"), engine=engine, options=options)  # type: ignore[arg-type]
        opened = open_engine(spec)
        models.append(opened.model)
        replies.append(dict(opened.engine.answer(asked)))
        opened.close()
    assert models[0].fingerprint == models[1].fingerprint != teacher.identity
    for i in range(len(asked)):
        assert replies[0][i].generated == replies[1][i].generated
        for row, expected in zip(replies[1][i].logprobs, replies[0][i].logprobs, strict=True):
            assert row == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_layer_takes_requests_in_pieces_side_by_side(
    impl: Any, triton_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the transformers layer on each request alone; on our kernels too, which vLLM runs on a GPU."""
    from models import vllm_kda
    from models.kda.layer import KimiDeltaAttention

    monkeypatch.setattr(vllm_kda, "get_tensor_model_parallel_world_size", lambda: 1)
    config = tiny_hybrid(tiny_teacher("llama", head_dim=16)).config
    contexts: dict[str, Any] = {}
    known = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=contexts))
    torch.manual_seed(0)
    alone = KimiDeltaAttention(config, 0).eval()
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    layer = vllm_kda.VLLMKimiDeltaAttention(config, 0, known, "layers.0.kda").eval()
    layer.load_state_dict(alone.state_dict())
    layer.impl = impl
    assert contexts == {"layers.0.kda": layer}

    lengths, blocks = (1, 2, 5, 9, 20), torch.tensor([4, 2, 7, 1, 5])
    texts = [torch.randn(1, n, config.hidden_size) for n in lengths]
    inputs, states = (torch.full((8, *shape), torch.nan) for shape in layer.get_state_shape())  # of others before
    steps = [[1, 1, 0, 3, 2], [0, 1, 1, 1, 15], [0, 0, 4, 5, 1], [0, 0, 0, 0, 2]]
    done = [0] * len(texts)
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    for step in steps:
        here = sorted((r for r, n in enumerate(step) if n), key=lambda r: step[r] > 1)  # vLLM puts single tokens first
        counts = torch.tensor([0, *(step[r] for r in here)])
        fresh = torch.tensor([done[r] == 0 for r in here])
        singles = sum(step[r] == 1 for r in here)
        metadata = vllm_kda.KDAMetadata.of(counts.cumsum(0), singles, blocks[here], fresh, config.kda_conv_size - 1)
        row = torch.cat([texts[r][0, done[r] : done[r] + step[r]] for r in here])
        with torch.no_grad():
            y = layer._mix(row, metadata, inputs, states, None)
        for r, part in zip(here, y.split([step[r] for r in here]), strict=True):
            found[r].append(part)
            done[r] += step[r]
    assert tuple(done) == lengths
    for text, parts in zip(texts, found, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(torch.cat(parts), alone(text)[0], atol=CLOSE, rtol=CLOSE)
    assert states[[0, 3, 6]].isnan().all(), "a block of no request was written"


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    [found] = entry_points(group="vllm.general_plugins", name="hybrid_kda")
    found.load()()
    from vllm import ModelRegistry

    assert "HybridKDAForCausalLM" in ModelRegistry.get_supported_archs()


def test_what_cannot_be_split_or_served_is_named() -> None:
    from models.vllm_kda import split_config

    config = HybridKDAConfig.from_teacher(tiny_teacher("llama").config, [1])
    assert (split_config(config, 2).kda_heads, split_config(config, 2).kda_kv_heads) == (2, 1)
    assert (config.kda_heads, config.kda_kv_heads) == (4, 2), "the model's own configuration is left alone"
    from models.vllm_hybrid import HybridKDAModel

    teacher = tiny_teacher("qwen3", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    sliding = HybridKDAConfig.from_teacher(teacher.config, [1])
    with pytest.raises(ValueError, match="full attention in kept layers, this one has 'sliding_attention'"):
        HybridKDAModel(vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=sliding)))
    with pytest.raises(ValueError, match=r"tensor_parallel_size is 4: expected a divisor of kda_kv_heads \(2\)"):
        split_config(config, 4)
