"""A hybrid against code that is not ours: transformers' Kimi Linear in plain PyTorch, and evalkit's engine."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from evalkit.engines.hf import HFEngine
from evalkit.records import Generation, Request
from models.kda.layer import KimiDeltaAttention
from models.kda.reference import log_decay
from tests.models.hybrids import FAMILIES, tiny_hybrid, tiny_teacher
from tests.oracles import assert_same_replies
from tests.tiny import tiny_tokenizer


def kimi(name: str) -> Any:
    """The function's plain PyTorch body, without what may swap it for a kernel."""
    try:
        module = importlib.import_module("transformers.models.kimi_linear.modeling_kimi_linear")
    except ImportError:
        pytest.skip("this transformers has no Kimi Linear")
    return getattr(module, name).__wrapped__


def as_kimi(mixer: KimiDeltaAttention, x: torch.Tensor, recurrence: str) -> torch.Tensor:
    """The mixer around transformers' delta rule: torch's own convolution and norm, k and v repeated."""
    H, D, groups = mixer.heads, mixer.head_dim, mixer.heads // mixer.kv_heads

    def conv(projection: Any, weight: torch.Tensor) -> torch.Tensor:
        inputs = F.pad(projection(x).mT, (mixer.conv_size - 1, 0))
        return F.conv1d(inputs, weight[:, None], groups=len(weight)).mT.unflatten(-1, (-1, D))

    q, k, v = conv(mixer.q_proj, mixer.q_conv), conv(mixer.k_proj, mixer.k_conv), conv(mixer.v_proj, mixer.v_conv)
    g = mixer.f_b_proj(mixer.f_a_proj(x)).unflatten(-1, (H, D))
    decay = log_decay(g, mixer.A_log, mixer.dt_bias, mixer.config.kda_gate, mixer.config.kda_lower_bound)
    if mixer.config.kda_gate == "softplus":
        torch.testing.assert_close(decay, -mixer.A_log.exp()[:, None] * F.softplus(g + mixer.dt_bias))
    o, _ = kimi(recurrence)(
        q,
        k.repeat_interleave(groups, 2),
        v.repeat_interleave(groups, 2),
        g=decay,
        beta=torch.sigmoid(mixer.b_proj(x)),
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=True,
    )
    o = F.rms_norm(o, (D,), eps=mixer.config.rms_norm_eps) * mixer.o_norm
    gate = torch.sigmoid(mixer.g_b_proj(mixer.g_a_proj(x))).unflatten(-1, (H, D))
    return mixer.o_proj((o * gate).flatten(-2))


@pytest.mark.parametrize("recurrence", ["chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"])
@pytest.mark.parametrize("gate", ["softplus", "bounded"])
@pytest.mark.parametrize("T", [1, 63, 130])
@torch.no_grad()
def test_the_mixer_agrees_with_transformers_kimi_linear(gate: str, recurrence: str, T: int) -> None:
    mixer = tiny_hybrid(tiny_teacher("qwen2"), kda_gate=gate).model.layers[0].kda
    torch.manual_seed(0)
    x = torch.randn(2, T, 32)
    expected = as_kimi(mixer, x, recurrence)
    torch.testing.assert_close(mixer(x), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_and_padding_change_no_reply_of_the_engine(family: str) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_hybrid(tiny_teacher(family, vocab_size=len(tokenizer), initializer_range=0.3))
    texts = ["Answer:", "Question: Which animal barks?\nAnswer:", "Copy: anchor, apple, arrow." * 4, "1, 2, 3, 4,"]
    requests = [
        Request(
            prompt=tuple(tokenizer.encode(text, add_special_tokens=False)),
            continuations=tuple(tuple(tokenizer.encode(tail)) for tail in (" a dog", " Paris", " the number 12")),
            generation=Generation(max_tokens=4 + i),
        )
        for i, text in enumerate(texts)
    ]
    alone = dict(HFEngine(model, tokenizer, batch_size=1).answer(requests))
    for padding in ("left", "right"):
        together = dict(HFEngine(model, tokenizer, batch_size=4, padding=padding).answer(requests))
        _, ties = assert_same_replies(requests, alone, together)
        assert ties == 0
