"""A reply that the token limit cut is truncated, unless its answer was there whole."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalkit.engines.replies import Watch, decode, first_stop
from evalkit.records import Generated, Item
from evalkit.registry import Task
from evalkit.scoring import score_generation
from evalkit.views import ask
from tests.evalkit.test_encoding import metaspace
from tests.tiny import tiny_tokenizer

CAPITAL = Item(id="c", question="What is the capital of France?", choices=("Paris", "Rome", "Oslo"), gold=0)
SUM = Item(id="s", question="What is 9 + 9?", choices=("18", "1", "19"), gold=0)
LIST = Item(id="l", question="a, b, c, d", choices=("a, b, c, d", "a, c, b, d", "a, b, c"), gold=0)


@pytest.mark.parametrize(
    ("item", "answer", "view", "reply", "expected"),
    [
        (CAPITAL, "choice", "open", " The capital of", "truncated"),
        (CAPITAL, "choice", "open", " Paris, which lies on the", "correct"),
        (CAPITAL, "choice", "letters", " The answer is B, since the", "wrong"),
        (CAPITAL, "choice", "letters", " Let us look at option B first. Rome lies in Italy and", "truncated"),
        (CAPITAL, "choice", "letters", " Rome is the capital of Italy, which has", "truncated"),
        (CAPITAL, "choice", "letters", " B. Rome", "wrong"),
        (CAPITAL, "choice", "letters", " B. Rome is the capital of Italy, so it cannot", "wrong"),
        (CAPITAL, "choice", "letters", " Either A or B, so", "truncated"),
        (CAPITAL, "choice", "letters", " Paris or Rome, so", "truncated"),
        (CAPITAL, "choice", "open", " Paris lies in France, Rome in", "truncated"),
        (CAPITAL, "choice", "cot", " B. Rome is the capital of Italy, so it cannot", "truncated"),
        (CAPITAL, "choice", "cot", " A\n\nParis is the", "correct"),
        (CAPITAL, "choice", "cot", " B is in Italy. The answer is A. It", "correct"),
        (SUM, "number", "open", " The answer is 1", "truncated"),
        (SUM, "number", "open", " The answer is 19 and", "wrong"),
        (SUM, "number", "cot", " First we add 3 and then", "truncated"),
        (SUM, "number", "cot", " So the answer is 18. Next we", "correct"),
        (LIST, "list", "cloze", " a, b, c", "truncated"),
        (LIST, "list", "cloze", " a, c, b, d\nand", "wrong"),
    ],
)
def test_only_what_a_cut_cannot_have_changed_counts(
    item: Item, answer: str, view: str, reply: str, expected: str
) -> None:
    task = Task(items=lambda _: [item], views=(view,), loglikelihood=view, generation=view, answer=answer)  # type: ignore[arg-type]
    asked = ask(view, task, item)
    cut = Generated(text=reply, tokens=(1, 2), finish="length")
    assert score_generation(view, asked, item, cut, "lenient").outcome == expected
    whole = Generated(text=reply, tokens=(1, 2), finish="eos")
    assert score_generation(view, asked, item, whole, "lenient").outcome != "truncated"


@pytest.mark.parametrize(
    ("text", "stops", "at"),
    [
        ("Paris\nQ", ("\n",), 5),
        ("<think>\nhm", ("\n",), None),
        ("<think>\nhm</think>Rome\n", ("\n",), 22),
        ("<think>hm</think>", ("</think>",), 9),
        ("a\n\nb\nc", ("\n\n", "\n"), 1),
        ("none", ("\n",), None),
    ],
)
def test_no_stop_string_counts_inside_a_thinking_block(text: str, stops: tuple[str, ...], at: int | None) -> None:
    assert first_stop(text, stops) == at


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), metaspace(bos=False)], ids=["bytes", "sentencepiece"])
@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_stop_string_is_seen_at_the_token_that_completes_it(tokenizer: Any, data: st.DataObject) -> None:
    begins = data.draw(st.sampled_from(["", "<think>", "<think>a</think>", "é is the\n"]))
    more = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    tokens = [*tokenizer.encode(begins, add_special_tokens=False), *more] or [5]
    texts = [decode(tokenizer, tokens[:n], ()) for n in range(1, len(tokens) + 1)]
    inside = [texts[-1][at : at + n] for at in range(len(texts[-1])) for n in (1, 2, 3)]
    stops = tuple(data.draw(st.lists(st.sampled_from(["\n", "é", " the", "is ", *inside]), min_size=1, max_size=2)))
    ends = [n for n, text in enumerate(texts, 1) if first_stop(text, stops) is not None]
    watch = Watch(tokenizer, stops)
    assert [n for n in range(1, len(tokens) + 1) if watch(tokens[:n])][:1] == ends[:1]
