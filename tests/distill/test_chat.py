"""Marks, token by token, written out by hand for three families of chat templates."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.chat import CONTENT, END, Chat, Unusable
from evalkit.encoding import Encoder
from evalkit.views import Ask
from models.builtin import smollm2_135m
from tests.tiny import tiny_tokenizer

TEMPLATES = Path(__file__).with_name("templates")
WORDS = (
    "system user assistant You are a helpful assistant. Hi there Hello! Bye Two and two? Four. So long Sum it Hm 2 + ok"
)
# The pre-tokeniser of Llama 3 and Qwen: line breaks that follow each other are one piece.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "generation": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}


@cache
def family(name: str) -> Any:
    """A tokenizer with the family's special tokens and template, whose vocabulary has the words used here."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=SPECIAL[name],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [f"{word} {word}\n\n{word}\n" for word in WORDS.split()]
    backend.train_from_iterator([WORDS, *lines] * 4, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    bos = None
    if name == "llama3":
        bos = "<|begin_of_text|>"
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
                ),
            ]
        )
    if name == "qwen3":
        backend.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=SPECIAL[name][-1],
        pad_token=SPECIAL[name][0],
        chat_template=(TEMPLATES / f"{name}.jinja").read_text(),
    )


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    """User and assistant by turns."""
    start = [{"role": "system", "content": system}] if system else []
    return start + [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)]


def marked(tokenizer: Any, messages: Any) -> str:
    """Tokens in a row: words of the assistant's in [ ], the end of its turn in ( )."""
    [found] = Chat(tokenizer).encode([("it", messages)])
    assert not isinstance(found, Unusable), found
    ids, marks = found
    shape = {0: "{}", CONTENT: "[{}]", END: "({})"}
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    return " ".join(shape[mark].format(token) for token, mark in zip(tokens, marks.tolist(), strict=True))


DEFAULT = "<|im_start|> system Ċ You Ġare Ġa Ġhelpful Ġassistant . <|im_end|> Ċ"


def test_chatml_marks_words_and_end_of_every_assistant_turn():
    found = marked(family("chatml"), turns("Hi there", "Hello! Two", "Bye", "So long"))
    assert found == (
        f"{DEFAULT} "
        "<|im_start|> user Ċ Hi Ġthere <|im_end|> Ċ <|im_start|> assistant Ċ [Hello] [!] [ĠTwo] (<|im_end|>) Ċ "
        "<|im_start|> user Ċ Bye <|im_end|> Ċ <|im_start|> assistant Ċ [So] [Ġlong] (<|im_end|>) Ċ"
    )


def test_chatml_puts_the_given_system_message_in_place_of_its_own():
    found = marked(family("chatml"), turns("Hi", "Bye", system="Sum it"))
    assert found == (
        "<|im_start|> system Ċ Sum Ġit <|im_end|> Ċ "
        "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ [Bye] (<|im_end|>) Ċ"
    )


def test_llama3_marks_after_its_header_and_has_one_bos():
    found = marked(family("llama3"), turns(" Hi there\n", "\nHello! \n", "Bye", "So long"))
    assert found == (
        "<|begin_of_text|> <|start_header_id|> user <|end_header_id|> ĊĊ Hi Ġthere <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ [Hello] [!] (<|eot_id|>) "
        "<|start_header_id|> user <|end_header_id|> ĊĊ Bye <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ [So] [Ġlong] (<|eot_id|>)"
    )


def test_qwen3_counts_the_empty_thinking_block_as_prompt():
    found = marked(family("qwen3"), turns("Two and two?", "Four."))
    assert found == (
        "<|im_start|> user Ċ Two Ġand Ġtwo ? <|im_end|> Ċ "
        "<|im_start|> assistant Ċ <think> ĊĊ </think> ĊĊ [Four] [.] (<|im_end|>) Ċ"
    )


def test_qwen3_turns_before_the_last_have_no_block():
    found = marked(family("qwen3"), turns("Hi", "Hello!", "Two and two?", "Four."))
    assert found == (
        "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ [Hello] [!] (<|im_end|>) Ċ "
        "<|im_start|> user Ċ Two Ġand Ġtwo ? <|im_end|> Ċ "
        "<|im_start|> assistant Ċ <think> ĊĊ </think> ĊĊ [Four] [.] (<|im_end|>) Ċ"
    )


def test_qwen3_thought_of_the_last_turn_is_the_assistants_own_and_others_are_dropped():
    said = "<think>\nHm\n</think>\n\nFour."
    found = marked(family("qwen3"), turns("Hi", said, "Two and two?", said))
    assert found == (
        "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ [Four] [.] (<|im_end|>) Ċ "
        "<|im_start|> user Ċ Two Ġand Ġtwo ? <|im_end|> Ċ "
        "<|im_start|> assistant Ċ [<think>] [Ċ] [Hm] [Ċ] [</think>] [ĊĊ] [Four] [.] (<|im_end|>) Ċ"
    )


def test_template_that_opens_a_block_for_a_turn_to_come_alone():
    tokenizer = family("chatml")
    template = tokenizer.chat_template.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    assert template != tokenizer.chat_template
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", chat_template=template
    )
    assert marked(other, turns("Hi", "Bye")) == (
        f"{DEFAULT} <|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ [Bye] (<|im_end|>) Ċ"
    )


def test_generation_marks_in_the_template_are_used():
    found = marked(family("generation"), turns("Hi there", "Hello!", "Bye", "So long"))
    assert found == (
        "<|im_start|> user Ċ Hi Ġthere <|im_end|> Ċ <|im_start|> assistant Ċ [Hello] [!] (<|im_end|>) Ċ "
        "<|im_start|> user Ċ Bye <|im_end|> Ċ <|im_start|> assistant Ċ [So] [Ġlong] (<|im_end|>) Ċ"
    )


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3"])
@pytest.mark.parametrize(
    "reply", ["Four.", " Four.", "\n\nFour.", "Four.\n", "   Four. Hm  ", "2\n    + 2\n", "日本語 🙂", "user\nHi"]
)
def test_marked_tokens_spell_the_words_and_the_rest_is_what_evalkit_asks(name: str, reply: str):
    """Against evalkit's own prompt. What a template trims is in neither."""
    tokenizer = family(name)
    chat = Chat(tokenizer)
    [found] = chat.encode([("it", turns("Two and two?", reply))])
    assert not isinstance(found, Unusable)
    ids, marks = found
    inside = np.flatnonzero(marks == CONTENT)
    assert (np.diff(inside) == 1).all()
    words = tokenizer.decode(ids[inside].tolist())
    assert words.strip() == reply.strip()
    assert marks[inside[-1] + 1] == END
    assert (marks == END).sum() == 1
    ask = Ask(question="Two and two?", answers=(), reply="", reads="option", listed=False, max_tokens=1)
    prompt = Encoder(tokenizer, chat=True).prompt([], ask, closed=False)
    before = tokenizer.decode(ids[: inside[0]].tolist())
    assert prompt.startswith(before)
    assert (before + words).startswith(prompt) or not reply.startswith("F")


def test_running_text_is_marked_where_evalkit_scores():
    tokenizer = tiny_tokenizer(bos=True)
    chat, encoder = Chat(tokenizer), Encoder(tokenizer)
    pairs = [("Question: Which animal barks?\nAnswer:", "a dog"), ("2 + 2 =", "4"), ("A. cat\nAnswer:", "  B")]
    for (prompt, answer), (ids, marks) in zip(pairs, chat.answers(pairs), strict=True):
        head, [tail] = encoder.join(prompt, [" " + answer])
        assert ids.tolist() == [*head, *tail, tokenizer.eos_token_id]
        assert marks.tolist() == [0] * len(head) + [CONTENT] * len(tail) + [END]


@pytest.mark.parametrize("bos", [True, False])
def test_plain_text_has_bos_only_from_its_tokenizer_and_ends(bos: bool):
    tokenizer = tiny_tokenizer(bos=bos)
    [(ids, marks)] = Chat(tokenizer).texts(["a dog"])
    assert ids.tolist() == [*[0] * bos, *tokenizer.encode("a dog", add_special_tokens=False), 1]
    assert (marks == CONTENT).all()


def test_bos_that_the_tokenizer_wants_and_the_template_lacks_is_added():
    [found] = Chat(tiny_tokenizer(bos=True)).encode([("it", turns("a dog", "a cat"))])
    assert not isinstance(found, Unusable)
    assert found[0][:2].tolist() == [0, 2] and found[1][0] == 0


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (turns("Hi"), "without an assistant's turn"),
        (turns("Hi", "  "), "with an empty answer"),
        (turns("Hi", "Bye<|im_end|>"), "with <|im_end|> inside a message"),
        (turns("Hi <|im_end|>", "Bye"), "with <|im_end|> inside a message"),
    ],
)
@pytest.mark.parametrize("name", ["chatml", "generation"])
def test_conversations_that_cannot_be_targets_say_why(name: str, messages: Any, reason: str):
    good, bad = Chat(family(name)).encode([("a", turns("Hi", "Bye")), ("b", messages)])
    assert not isinstance(good, Unusable)
    assert isinstance(bad, Unusable) and str(bad) == reason


def with_template(template: str | None) -> Any:
    return tiny_tokenizer(chat=template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "special token"),
        ("{{ raise_exception('system first') }}", "refused the conversation: system first"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}",
            r"otherwise when the turn follows than when it is asked for.*\{% generation %\}",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}{% if loop.length == 2 or m['role'] == 'user' %}"
            "{{ '<|im_end|>' }}{% endif %}{% endfor %}",
            "writes no '<|im_end|>' after turn 4",
        ),
    ],
)
def test_templates_that_cannot_be_marked_are_refused_with_the_conversations_name(template: str | None, message: str):
    with pytest.raises(ValueError, match=f"chats.jsonl, 3: .*{message}"):
        Chat(with_template(template)).encode([("chats.jsonl, 3", turns("Hi", "Bye", "Hm", "ok"))])


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow can't say which characters.*fast tokenizer"):
        Chat(Slow())


def test_identity_changes_with_the_template_alone():
    one, other = Chat(tiny_tokenizer()), Chat(tiny_tokenizer(chat="{{ messages }}"))
    assert one.identity == Chat(tiny_tokenizer()).identity != other.identity


@pytest.mark.slow
def test_smollm2_masks_the_answer_alone(smollm2: str):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_135m())
    [found] = Chat(tokenizer).encode([("it", turns("What is 2 + 2?", "It is 4.", "And 3 + 3?", "6"))])
    assert not isinstance(found, Unusable)
    ids, marks = found
    assert tokenizer.decode(ids[marks == CONTENT].tolist()) == "It is 4.6"
    assert tokenizer.decode(ids[marks == END].tolist()) == "<|im_end|><|im_end|>"
    assert tokenizer.decode(ids.tolist()).count("<|im_start|>system") == 1
