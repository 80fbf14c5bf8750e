"""Prompt and answer as tokens, for tokenizers of every manner, each made in memory."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from evalkit.encoding import Encoder
from evalkit.records import Item
from evalkit.registry import Task
from evalkit.views import VIEWS, Ask, ask
from tests.oracles import CharTokenizer
from tests.tiny import CHATML, THINKING, tiny_tokenizer

CAPITAL = Item(id="capital", question="What is the capital of France?", choices=("Paris", "Rome"), gold=0)
EXAMPLE = Item(id="example", question="Which animal barks?", choices=("a dog", "a cat"), gold=0)
BOS_CHATML = "{{ bos_token }}" + CHATML
OPENED = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
"""DeepSeek-R1's manner: the template opens the block."""
SELF_OPENING = CHATML + "{# replies may hold <think> blocks #}"
HARMONY = CHATML.replace("assistant\n' }}", "assistant<|channel|>' }}")
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def asked(item: Item = CAPITAL, view: str = "cloze", **fields: Any) -> Ask:
    task = Task(items=lambda _: [item], views=(view,), loglikelihood=view, generation=view, **fields)
    return ask(view, task, item)


def fast(backend: Tokenizer, **fields: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **fields)


def metaspace(*, bos: bool) -> Any:
    """SentencePiece's manner: Unigram, and a dummy space before every text."""
    words = ["▁Paris", "▁Rome", "▁Answer", "▁", "Answer", "Paris", "Rome", ":", "▁a", "▁dog", "<think>"]
    letters = [chr(i) for i in range(33, 127)]
    pieces = ["<unk>", "<s>", "</s>", "\n", *words, *(letter for letter in letters if letter not in words)]
    vocabulary = [(piece, -2.0 if len(piece) > 1 else -9.0) for piece in pieces]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=BOS_CHATML)


def merging(*merges: tuple[str, str]) -> Any:
    """Byte-level BPE that merges over everything: one word, whatever it holds."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "</s>", *alphabet])}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return fast(backend, bos_token="<s>", eos_token="</s>", chat_template=CHATML)


# --- BOS -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, BOS_CHATML], ids=["template without", "template with"])
@pytest.mark.parametrize("bos", [False, True], ids=["tokenizer without", "tokenizer with"])
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_bos_comes_exactly_once_where_anyone_wants_it(chat: bool, bos: bool, template: str) -> None:
    tokenizer = tiny_tokenizer(bos=bos, chat=template)
    encoder = Encoder(tokenizer, chat=chat)
    text = encoder.prompt([asked(EXAMPLE)], asked(), closed=True)
    wanted = bos or (chat and template == BOS_CHATML)
    prompt, tails = encoder.join(text, [" Paris", " Rome"])
    for ids in (encoder.encode(text), prompt):
        assert ids.count(tokenizer.bos_token_id) == int(wanted)
        assert (ids[0] == tokenizer.bos_token_id) == wanted
    assert all(tokenizer.bos_token_id not in tail for tail in tails)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_bos_comes_once_before_a_dummy_space_too(chat: bool, bos: bool) -> None:
    encoder = Encoder(metaspace(bos=bos), chat=chat)
    ids = encoder.encode(encoder.prompt([], asked(), closed=True))
    assert ids.count(1) == int(bos or chat)
    assert (ids[0] == 1) == (bos or chat)


def test_a_byte_level_tokenizer_that_adds_none_gets_none() -> None:
    assert Encoder(merging()).encode("ab") == merging().encode("ab", add_special_tokens=False)


# --- the join ------------------------------------------------------------------------------------------------------

TOKENIZERS = {
    "characters": CharTokenizer(),
    "characters with BOS": CharTokenizer(bos=True),
    "byte-level BPE": tiny_tokenizer(),
    "byte-level BPE with BOS": tiny_tokenizer(bos=True),
    "SentencePiece": metaspace(bos=False),
    "SentencePiece with BOS": metaspace(bos=True),
    "merging": merging(("e", "r"), (":", "Ġ"), ("r", ":Ġ"), ("er", ":Ġ"), ("P", "a"), (":Ġ", "Pa"), ("Ġ", "R")),
}
JOINS = [
    ("Question: ?\nAnswer:", (" Paris", " Rome", " Paris, Texas")),
    ("Answer: ", ("Paris", "Rome")),
    ("Answer:", ("Paris", "Rome", "P")),
    ("", (" Paris", " Rome")),
    ("x", ("€uro", "日本", "e\u0301")),
    ("The Answer:\n\n", (" a dog", "a dog")),
]


def chain(ids: Sequence[int], start: int) -> float:
    """The log-probability of ``ids[start:]`` under a made-up model in which each token depends on all before it."""
    return math.fsum(-1.0 - (sum(ids[:i]) * 7 + ids[i]) % 13 / 13 for i in range(start, len(ids)))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("text", "answers"), JOINS, ids=[repr(text) for text, _ in JOINS])
def test_all_answers_are_scored_whole_and_from_one_place(name: str, text: str, answers: tuple[str, ...]) -> None:
    encoder = Encoder(TOKENIZERS[name])
    prompt, tails = encoder.join(text, answers)
    assert len(prompt) > 0
    assert all(len(tail) > 0 for tail in tails)
    for answer, tail in zip(answers, tails, strict=True):
        whole = encoder.encode(text + answer)
        if whole[: len(prompt)] != prompt:  # only what starts an empty prompt is no token of the text
            assert len(prompt) == 1 and whole == tail
            whole = [*prompt, *whole]
        assert [*prompt, *tail] == whole
        scored = chain([*prompt, *tail], len(prompt))
        assert scored == pytest.approx(chain(whole, 0) - chain(prompt, 0))


def test_a_token_over_the_join_is_scored_with_every_answer() -> None:
    tokenizer = merging(("a", "b"))
    ids = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in ("x", "a", "b", "c", "ab")}
    prompt, tails = Encoder(tokenizer).join("xa", ["b", "c"])
    assert prompt == [ids["x"]]
    assert tails == [[ids["ab"]], [ids["a"], ids["c"]]]


def test_a_token_over_the_whole_prompt_leaves_the_start_token() -> None:
    tokenizer = merging(("a", "b"))
    prompt, tails = Encoder(tokenizer).join("a", ["b", "c"])
    assert prompt == [tokenizer.bos_token_id]
    assert [tokenizer.decode(tail) for tail in tails] == ["ab", "ac"]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if not name.startswith(("characters", "merging"))])
def test_a_space_at_the_prompts_end_changes_nothing(name: str) -> None:
    encoder = Encoder(TOKENIZERS[name])
    assert encoder.join("Answer: ", ["Paris", "Rome"]) == encoder.join("Answer:", [" Paris", " Rome"])


@pytest.mark.parametrize("view", sorted(set(VIEWS) - {"blank", "native"}))
@pytest.mark.parametrize("cue", ["Answer:", "Answer: ", ""])
@pytest.mark.parametrize("stem", ["Question: {question}", "{question} "])
def test_no_view_ends_in_a_space_or_begins_an_answer_with_one(view: str, cue: str, stem: str) -> None:
    one = asked(view=view, cue=cue, stem=stem)
    assert not one.question.endswith(" ")
    assert not any(answer.startswith(" ") for answer in one.answers)


def test_a_space_joins_running_text_and_nothing_begins_a_chat_turn() -> None:
    plain, chat = Encoder(CharTokenizer()), Encoder(CharTokenizer(chat_template="x"), chat=True)
    assert (plain.delimiter, chat.delimiter) == (" ", "")
    shown = "Question: Which animal barks?\nAnswer: a dog\n\nQuestion: What is the capital of France?\nAnswer:"
    assert plain.prompt([asked(EXAMPLE)], asked(), closed=True) == shown
    assert chat.prompt([asked(EXAMPLE)], asked(), closed=True) == (
        "<user>Question: Which animal barks?\nAnswer:<assistant>a dog"
        "<user>Question: What is the capital of France?\nAnswer:<assistant>"
    )


@pytest.mark.parametrize(
    ("tokenizer", "start"),
    [
        (CharTokenizer(), [0]),
        (CharTokenizer(bos=True), [0]),
        (tiny_tokenizer(bos=True), [0]),
        (fast(merging().backend_tokenizer, eos_token="</s>"), [1]),
    ],
    ids=["BOS known", "BOS added", "BOS added by template", "EOS only"],
)
def test_an_empty_prompt_begins_with_bos_or_else_eos(tokenizer: Any, start: list[int]) -> None:
    prompt, tails = Encoder(tokenizer).join("", [" a", " b"])
    assert prompt == start
    assert [tokenizer.decode(tail) for tail in tails] == [" a", " b"]


def test_an_empty_prompt_without_any_start_token_is_an_error() -> None:
    tokenizer = fast(merging().backend_tokenizer)
    assert tokenizer.bos_token_id is None and tokenizer.eos_token_id is None
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token"):
        Encoder(tokenizer).join("", [" a", " b"])


def test_an_answer_without_a_token_of_its_own_is_an_error() -> None:
    with pytest.raises(ValueError, match="answer '' has no token of its own"):
        Encoder(CharTokenizer()).join("x", ["", "y"])


# --- chat ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "asked_for", "message"),
    [
        (None, {"chat": True}, "has no chat template; leave --chat out"),
        (CHATML, {"system": "Be brief."}, "a system prompt goes through the chat template: add --chat"),
        (CHATML, {"thinking": True}, "thinking goes through the chat template: add --chat"),
        (CHATML, {"thinking": True, "chat": True}, "the chat template has no <think> block; use --thinking off"),
        (HARMONY, {"thinking": True, "chat": True}, "the chat template has no <think> block; use --thinking off"),
    ],
)
def test_what_the_tokenizer_cannot_do_is_an_error(template: str | None, asked_for: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(tiny_tokenizer(chat=template), **asked_for)


def test_a_template_that_refuses_is_an_error_with_its_reason() -> None:
    encoder = Encoder(tiny_tokenizer(chat="{{ raise_exception('no system role') }}"), chat=True)
    with pytest.raises(ValueError, match="refused the conversation: no system role"):
        encoder.prompt([], asked(), closed=True)


def test_the_system_message_comes_first() -> None:
    text = Encoder(tiny_tokenizer(), chat=True, system="Be brief.").prompt([], asked(), closed=True)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize(
    ("template", "thinking", "closed", "tail"),
    [
        (CHATML, False, True, "<|im_start|>assistant\n"),
        (CHATML, False, False, "<|im_start|>assistant\n"),
        (THINKING, False, True, CLOSED),
        (THINKING, False, False, CLOSED),
        (THINKING, True, True, CLOSED),
        (THINKING, True, False, "<|im_start|>assistant\n"),
        (OPENED, False, True, CLOSED),
        (OPENED, False, False, CLOSED),
        (OPENED, True, True, CLOSED),
        (OPENED, True, False, "<|im_start|>assistant\n<think>\n"),
        (SELF_OPENING, True, True, CLOSED),
        (SELF_OPENING, True, False, "<|im_start|>assistant\n"),
    ],
)
def test_the_thinking_block_is_empty_and_closed_unless_generation_thinks(
    template: str, thinking: bool, closed: bool, tail: str
) -> None:
    text = Encoder(tiny_tokenizer(chat=template), chat=True, thinking=thinking).prompt([], asked(), closed=closed)
    assert text.endswith(f"<|im_end|>\n{tail}"), text
    assert text.count("<think>") == tail.count("<think>")


def test_a_channel_template_generates_but_refuses_loglikelihood() -> None:
    encoder = Encoder(tiny_tokenizer(chat=HARMONY), chat=True)
    assert encoder.prompt([], asked(), closed=False).endswith("<|im_start|>assistant<|channel|>")
    with pytest.raises(ValueError, match=r"log-likelihood is refused: .* <\|channel\|> .* use --mode generation"):
        encoder.prompt([], asked(), closed=True)
