"""Tiny random models and tokenizers, made in memory: the same on every machine."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CORPUS = (
    "Question: What is the capital of France?\nAnswer: Paris\n\nQuestion: Which animal barks?\nAnswer: a dog\n",
    "A. cat\nB. dog\nC. fish\nD. bird\nAnswer: B. Repeat the options, then give the letter of the right one.",
    "Think step by step. End with: The answer is 42. Copy: anchor, apple, arrow. Answer with a word or a phrase.",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 100 number belongs to the golden falcon: 417 yes no <think> </think>",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = CHATML.replace(
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
)
"""Qwen3's manner: the block is left to the model, or written empty and closed."""


def tiny_tokenizer(*, bos: bool = False, chat: str | None = CHATML) -> Any:
    """Byte-level BPE, 400 tokens; ``bos``: the tokenizer puts <s> before every text, as Llama's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=chat
    )


def tiny_llama(vocab_size: int, *, seed: int = 0, window: int = 2048) -> LlamaForCausalLM:
    """Two layers, float32, random weights large enough that choices do not tie."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(vocab_size: int, *, window: int = 256) -> GPT2LMHeadModel:
    """Learned positions, tied head, dropout: what Llama lacks."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=window,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config).eval()


def tiny_qwen3(vocab_size: int, **changes: Any) -> Qwen3ForCausalLM:
    """Normalised queries and keys, heads wider than hidden size / heads, tied head."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, **{**options, **changes})).eval()


def chain_llama(vocab_size: int, *chains: Sequence[int], head_dim: int = 8) -> LlamaForCausalLM:
    """Says what it is told: after a token of a chain comes the chain's next one, whatever stood before.

    One layer that adds nothing, embeddings that are unit vectors, and a head that maps each token to the next. No
    token may have two successors; one without any is followed by token 1 (</s>).
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=vocab_size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=head_dim,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    following = [1] * vocab_size
    known: set[int] = set()
    for chain in chains:
        for token, after in pairwise(chain):
            assert token not in known, f"token {token} would have two successors"
            known.add(token)
            following[token] = after
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab_size))
        model.lm_head.weight.copy_(torch.eye(vocab_size)[:, following])
    return model
