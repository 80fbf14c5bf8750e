"""What is read out of a reply: one hand-written row for each rule of the design, then properties over any text."""

import string
import time
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evalkit.extract import Extraction, extract
from evalkit.numerals import parse_number, same_number
from evalkit.records import Item
from evalkit.registry import Task
from evalkit.views import Ask, ask, labels

ANIMALS = ("cat", "dog", "fish", "bird")
CITIES = ("Rome", "Oslo", "Paris", "Paris, Texas")
WRONG = "a parsed answer that is no option"

Case = tuple[Any, ...]


def item(choices: Sequence[str], gold: int = 0, aliases: Sequence[str] = ()) -> Item:
    return Item(id="item", question="?", choices=tuple(choices), gold=gold, aliases=tuple(aliases))


def asked(view: str, of: Item, answer: str = "choice") -> Ask:
    task = Task(
        items=lambda _: [of],
        views=(view,),
        loglikelihood=view,
        generation=view,
        answer=answer,  # type: ignore[arg-type]
    )
    return ask(view, task, of)


def read(reply: str, view: str, of: Item, rules: str = "lenient", answer: str = "choice") -> Extraction:
    found = extract(reply, asked(view, of, answer), of, rules)  # type: ignore[arg-type]
    if found.span is not None:
        assert reply[slice(*found.span)] == found.answer, "the span is not the answer's"
        assert found.answer == found.answer.strip() != ""
    assert (found.span is None) == (found.status == "unparsed")
    return found


def check(found: Extraction, expected: Any, said: str | None = None, rule: str | None = None) -> None:
    """``expected``: a choice, WRONG, "ambiguous" or "unparsed"."""
    if expected in ("ambiguous", "unparsed"):
        assert (found.status, found.choice) == (expected, None), found
    else:
        assert (found.status, found.choice) == ("parsed", None if expected == WRONG else expected), found
    if said is not None:
        assert found.answer == said
    if rule is not None:
        assert found.rule == rule


# --- letters -------------------------------------------------------------------------------------------------------

MARKED: list[Case] = [
    ("Answer: C", 2, "C"),
    ("answer: c", 2, "c"),
    ("The answer is C.", 2, "C"),
    ("the answer is (C)", 2, "C"),
    ("The correct answer is: [C]", 2, "C"),
    ("The answer is option C", 2, "C"),
    ("The best choice is C", 2, "C"),
    ("The correct option would be C", 2, "C"),
    ("The answer must be C", 2, "C"),
    ("The answer is therefore C", 2, "C"),
    ("The answer to this question is C.", 2, "C"),
    ("Answer:\nC", 2, "C"),
    ("Answer - C", 2, "C"),
    ("Answer = C", 2, "C"),
    ("Answer → C", 2, "C"),
    ("Answer: C. fish", 2, "C"),
    ("Answer: C) fish, because it swims", 2, "C"),
    ("Answer: C fish", 2, "C"),
    ("**Answer:** C", 2, "C"),
    ("**Answer**: **C**", 2, "C"),
    ("__Answer:__ _C_", 2, "C"),
    ("Answer: `C`", 2, "C"),
    ("Answer: “C”", 2, "C"),
    ("Answer: $C$", 2, "C"),
    ("Answer: \\(\\text{C}\\)", 2, "C"),
    ('{"answer": "C"}', 2, "C"),
    ("<answer>C</answer>", 2, "C"),
    ("A cat purrs.\n\n**Final Answer**\n\nC", 2, "C"),
    ("A cat purrs.\n### Answer\nC. fish", 2, "C"),
    ("\\boxed{C}", 2, "C"),
    ("\\boxed{ C }", 2, "C"),
    ("\\boxed{(C)}", 2, "C"),
    ("\\boxed{\\text{C}}", 2, "C"),
    ("\\boxed{\\mathbf{C}}", 2, "C"),
    ("\\boxed{C. fish}", 2, "C"),
    ("Final answer: \\boxed{C}", 2, "C"),
    ("So $\\boxed{\\text{(C) fish}}$.", 2, "C"),
    ("答案：C", 2, "C"),
    ("答案：【C】", 2, "C"),
    ("答案：A、C", "ambiguous", "A、C"),
    ("答案是A和C", "ambiguous", "A和C"),
    ("答案是C", 2, "C"),
    ("答案是C。", 2, "C"),
    ("答案为 C", 2, "C"),
    ("正确答案选C", 2, "C"),
    ("答えはCです", 2, "C"),
    ("答えはAです", 0, "A"),
    ("정답은 C입니다", 2, "C"),
    ("Réponse : C", 2, "C"),
    ("Réponse\u00a0: C", 2, "C"),  # French sets a no-break space before the colon
    ("La re\u0301ponse est C", 2, "C"),  # the accent as a character of its own
    ("Antwort: C", 2, "C"),
    ("Die Antwort ist C.", 2, "C"),
    ("Respuesta: C", 2, "C"),
    ("La respuesta correcta es C", 2, "C"),
    ("A resposta é C", 2, "C"),
    ("La risposta è C", 2, "C"),
    ("Ответ: C", 2, "C"),
    # Full-width letters, colons and brackets.
    ("Answer： Ｃ", 2, "Ｃ"),
    ("答案：（Ｃ）", 2, "Ｃ"),
    # The last marker wins: models correct themselves.
    ("Answer: A. No, wait. Answer: C", 2, "C"),
    ("The answer is A.\nThe answer is C.", 2, "C"),
    ("Answer: C. I first thought the answer is A wolf, but no.", 2, "C"),
    ("\\boxed{A} ... sorry, \\boxed{C}", 2, "C"),
    ("\\boxed{A}, so the answer is C", 2, "C"),
    ("Answer: A or B? The answer is C.", 2, "C"),
    ("Answer: C\nI hope that this answer is helpful.", 2, "C"),
    # An explicit marker beats bare letters, before and after it.
    ("A is wrong, and B too. Answer: C. D is worse.", 2, "C"),
    ("Answer: C, because A and B cannot swim", 2, "C"),
    ("The answer is C, and A is wrong", 2, "C"),
    # "A" as an option, not an article.
    ("The answer is A", 0, "A"),
    ("The answer is A.", 0, "A"),
    ("The answer is A because it purrs", 0, "A"),
    ("The answer is a because it purrs", 0, "a"),
    ("Answer: A Explanation: it is big", 0, "A"),
    ("The answer is A here.", 0, "A"),
    ("Answer: A based on the text", 0, "A"),
    ("The correct option is A which says", 0, "A"),
    ("Answer is A not B", 0, "A"),
    ("Answer: A - cat", 0, "A"),
    ("Answer: A (cat)", 0, "A"),
    ("Answer: A cat", 0, "A"),
    ("Answer: A\nThe cat purrs.", 0, "A"),
    ("Answer: C\nD. It flies, so it is wrong.", 2, "C"),
    # The option's text behind the marker.
    ("The answer is fish.", 2, "fish"),
    ("The answer is a dog", 1, "dog"),
    ("the answer is a **dog**", 1, "dog"),
    ('The answer is a "dog"', 1, "dog"),
    ("Answer: A dog barks", 1, "dog"),
    ("\\boxed{fish}", 2, "fish"),
    ("cat? No. The answer is fish.", 2, "fish"),
    # What is rejected or supposed is no answer.
    ("The correct answer is C. The wrong answer is A.", 2, "C"),
    ("Answer: C\n\nThe incorrect answers are A, B and D.", 2, "C"),
    ("The answer is C. Another choice is B, but it is wrong.", 2, "C"),
    ("If the correct answer is B, it barks. So the answer is C.", 2, "C"),
    # Two at once.
    ("Answer: A or B", "ambiguous", "A or B"),
    ("Answer: A, B", "ambiguous", "A, B"),
    ("The answer is a or b", "ambiguous", "a or b"),
    ("The answer is B and C.", "ambiguous", "B and C"),
    ("Answer: (B), (C)", "ambiguous", None),
    ("\\boxed{A/B}", "ambiguous", None),
    ("The answer is cat or dog", "ambiguous", "cat or dog"),
]


@pytest.mark.parametrize(("reply", "expected", "said"), MARKED, ids=[row[0] for row in MARKED])
@pytest.mark.parametrize("rules", ["strict", "lenient"])
def test_an_explicit_marker_names_the_letter(reply: str, expected: Any, said: str | None, rules: str) -> None:
    check(read(reply, "letters", item(ANIMALS), rules), expected, said, "marker")


WHOLE: list[Case] = [
    ("C", 2, "C"),
    ("c", 2, "c"),
    (" C\n", 2, "C"),
    ("C.", 2, "C"),
    ("(C)", 2, "C"),
    ("[C]", 2, "C"),
    ("**C**", 2, "C"),
    ("'C'", 2, "C"),
    ("C)", 2, "C"),
    ("A", 0, "A"),
    ("A.", 0, "A"),
    ("a", 0, "a"),
    ("(a)", 0, "a"),
    ("a)", 0, "a"),
    ("Ａ", 0, "Ａ"),
    ("（Ｃ）", 2, "Ｃ"),
    ("【C】", 2, "C"),
    ("Option C", 2, "C"),
    ("C. fish", 2, "C"),
    ("C: fish", 2, "C"),
    ("C fish", 2, "C"),
    ("(c) fish", 2, "c"),
    ("**C.** fish", 2, "C"),
    ("C. A fish swims", 2, "C"),
    ("C) because A cannot swim", 2, "C"),
    ("C - it swims", 2, "C"),
    ("A. cat", 0, "A"),
    ("A cat", 0, "A"),
    ("C\n\nBecause B barks.", 2, "C"),
    ("A\nThe cat purrs.", 0, "A"),
    ("A. cat\nB. dog\nC. fish\nD. bird\n\nC", 2, "C"),
]


@pytest.mark.parametrize(("reply", "expected", "said"), WHOLE, ids=[row[0] for row in WHOLE])
@pytest.mark.parametrize("rules", ["strict", "lenient"])
def test_a_reply_that_is_a_letter_and_what_belongs_to_it_names_it(
    reply: str, expected: Any, said: str, rules: str
) -> None:
    check(read(reply, "letters", item(ANIMALS), rules), expected, said, "whole reply")


BARE: list[Case] = [
    ("I would go with C here.", 2, "bare letter"),
    ("It must be C, so C it is.", 2, "bare letter"),
    ("我选C", 2, "bare letter"),
    ("We can rule out A and B", "ambiguous", "bare letter"),
    ("Either A or else C", "ambiguous", "bare letter"),
    ("If the answer is A, then it would purr. That's wrong, so C.", "ambiguous", "bare letter"),
    ("I like A\nBecause it purrs", 0, "bare letter"),
    ("A dog barks, so it is B", 1, "bare letter"),
    ("I think that B barks", 1, "bare letter"),
    ("C++ is no animal, B is", 1, "bare letter"),
    ("It swims, so fish", 2, "option text"),
    ("A dog", 1, "option text"),
    ("a fish, I think", 2, "option text"),
    ("FISH", 2, "option text"),
    ("dog, not fish", "ambiguous", "option text"),
    ("concatenate", "unparsed", None),
    ("A wolf howls", "unparsed", None),
    ("I think so", "unparsed", None),
    ("E", "unparsed", None),
    ("Answer: E", "unparsed", None),
    ("\\boxed{Z}", "unparsed", None),
    ("N/A", "unparsed", None),
    ("Answer: N/A", "unparsed", None),
    ("The U.S.A. says D-Day and T-cells, CÔTE and ÀB", "unparsed", None),
    # Placeholders are no answer, wherever they stand.
    ("ANSWER: [LETTER]", "unparsed", None),
    ("The answer is [LETTER].", "unparsed", None),
    ("Answer: [A/B/C/D]", "unparsed", None),
    ("Answer: A/B/C/D", "unparsed", None),
    ("Answer: A|B|C|D", "unparsed", None),
    ("Answer: A, B, C, or D", "unparsed", None),
    ("Answer: (A), (B), (C) or (D)", "unparsed", None),
    ("Answer with A, B, C, or D.", "unparsed", None),
    ("Pick one of A-D", "unparsed", None),
    ("Answer: [A/B/C/D]\nC", 2, "bare letter"),
    # Options gone through one by one.
    ("\n\nC. fish\nD. bird is wrong", "ambiguous", "bare letter"),
    ("A. cat - incorrect.\nB. dog - incorrect.\nC. fish - correct!\nD. bird - no.", "ambiguous", "bare letter"),
    ("A) cat: This is wrong.\nB) dog: wrong.\nC) fish: the right one.\n\nTherefore, C.", "ambiguous", "bare letter"),
    ("A\nB\nC\nD", "ambiguous", "bare letter"),
    ("The correct answer is:\nA. cat\nB. dog\nC. fish\nD. bird", "unparsed", None),
    ("Answer: A. cat\nB. dog\nC. fish\nD. bird", "unparsed", None),
    # The options, repeated.
    ("A. cat\nB. dog\nC. fish\nD. bird", "unparsed", None),
    ("A. cat\nB. dog\n", "unparsed", None),
    ("A. cat B. dog C. fish D. bird", "ambiguous", "bare letter"),
]


@pytest.mark.parametrize(("reply", "expected", "rule"), BARE, ids=[row[0] for row in BARE])
def test_bare_mentions_count_only_when_lenient_and_alone(reply: str, expected: Any, rule: str | None) -> None:
    check(read(reply, "letters", item(ANIMALS)), expected, None, rule)
    check(read(reply, "letters", item(ANIMALS), "strict"), "unparsed")


HEPATITIS = ("Hepatitis C", "Hepatitis D", "Hepatitis A", "Hepatitis B")
AMPERES = ("2 A", "5 A", "10 A", "1 A")
BACTERIA = ("S. aureus", "E. coli", "B. subtilis", "C. difficile", "None")


@pytest.mark.parametrize(
    ("reply", "choices", "expected", "strict"),
    [
        ("Hepatitis B", HEPATITIS, 3, "unparsed"),
        ("It is hepatitis B, I think", HEPATITIS, 3, "unparsed"),
        ("Hepatitis B, so D", HEPATITIS, 3, "unparsed"),
        ("B", HEPATITIS, 1, 1),
        ("B. Hepatitis D", HEPATITIS, 1, 1),
        ("100 °C", ("0 °C", "50 °C", "90 °C", "100 °C"), 3, "unparsed"),
        ("It boils at 100 °C", ("0 K", "50 K", "90 K", "100 K"), "unparsed", "unparsed"),
        ("5 A", AMPERES, 1, "unparsed"),
        ("That is 7 A in all", AMPERES, "unparsed", "unparsed"),
        ("Vitamin C", ("Vitamin C", "Vitamin D", "Vitamin A", "Iron"), 0, "unparsed"),
        ("E. coli", BACTERIA, 1, "unparsed"),
        ("The answer is E. coli", BACTERIA, 1, 1),
        ("The answer is E. coli, as it is in the gut", BACTERIA, 1, 1),
        ("The answer is E", BACTERIA, 4, 4),
        ("A", ("O", "A", "B"), 0, 0),
        ("Answer: A", ("O", "A", "B"), 0, 0),
    ],
)
def test_an_options_own_text_is_no_label(reply: str, choices: tuple[str, ...], expected: Any, strict: Any) -> None:
    check(read(reply, "letters", item(choices)), expected)
    check(read(reply, "letters", item(choices), "strict"), strict)


def test_a_letter_counts_only_when_the_item_has_it() -> None:
    for n in (2, 3, 5, 26):
        for at, label in enumerate(labels(26)):
            found = read(f"Answer: {label}", "letters", item([f"<{i}>" for i in range(n)]), "strict")
            check(found, at if at < n else "unparsed")


@pytest.mark.parametrize("reply", ["Answer: AB", "AB", "(AB)", "\\boxed{AB}", "It is AB, I guess", "Answer: ab"])
def test_options_behind_z_are_named_by_two_letters(reply: str) -> None:
    check(read(reply, "letters", item([f"<{i}>" for i in range(30)])), 27)
    check(read(reply, "letters", item([f"<{i}>" for i in range(27)])), "unparsed")


@pytest.mark.parametrize("reply", ["I think so.", "I am sure", "I'd say so", "I’m not sure", "I was there", "I would"])
def test_the_pronoun_is_no_option(reply: str) -> None:
    ten = item([f"<{i}>" for i in range(10)])
    for text in (reply, f"Answer: {reply}", f"The answer is {reply}"):
        check(read(text, "letters", ten), "unparsed")
    for text in ("I", "Answer: I", "The answer is I, because it is", "The answer is I."):
        check(read(text, "letters", ten), 8)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("Answer: A or B", "ambiguous"), ("A or B", "ambiguous"), ("[A/B]", "unparsed"), ("Answer: A/B", "unparsed")],
)
def test_two_options_in_full_are_a_placeholder_only_with_a_slash(reply: str, expected: str) -> None:
    check(read(reply, "letters", item(("yes", "no"))), expected)


def test_the_repeated_options_of_view_copy_need_an_answer_behind_them() -> None:
    options = "A. cat\nB. dog\nC. fish\nD. bird\n"
    check(read(options + "Answer: C", "copy", item(ANIMALS)), 2, "C", "marker")
    check(read(options, "copy", item(ANIMALS)), "unparsed")
    check(read(f"{options}Answer:", "copy", item(ANIMALS)), "unparsed")


def test_a_chain_of_thought_is_read_at_its_end() -> None:
    reply = "A cat purrs, so not A. A dog barks, so not B. The answer is C."
    check(read(reply, "cot", item(ANIMALS)), 2, "C", "marker")


# --- options by their text -----------------------------------------------------------------------------------------

OPTION: list[Case] = [
    ("Oslo", CITIES, 1, "Oslo", "whole reply"),
    ("oslo.", CITIES, 1, None, "whole reply"),
    ("**Oslo**", CITIES, 1, None, "whole reply"),
    ("  Oslo  \nRome is in Italy", CITIES, 1, "Oslo", "whole reply"),
    ("Answer: Oslo", CITIES, 1, "Oslo", "marker"),
    ("The answer is **Oslo**, in Norway.", CITIES, 1, "Oslo", "marker"),
    ("Rome? No, the answer is Oslo. Rome is in Italy.", CITIES, 1, "Oslo", "marker"),
    ("The answer is Rome. No, wait, the answer is Oslo.", CITIES, 1, "Oslo", "marker"),
    ("The answer is the city of Oslo.", CITIES, 1, "Oslo", "marker"),
    ("The answer is the capital. Oslo, that is.", CITIES, 1, "Oslo", "marker"),
    ("\\boxed{\\text{Oslo}}", CITIES, 1, "Oslo", "marker"),
    ("答案是Oslo。", CITIES, 1, "Oslo", "marker"),
    ("The answer is Rome or Oslo", CITIES, "ambiguous", "Rome or Oslo", "marker"),
    ("The answer is Rome, or the Oslo", CITIES, "ambiguous", None, "marker"),
    ("It lies in Oslo, Norway", CITIES, 1, "Oslo", "mention"),
    ("Oslo, I mean Oslo", CITIES, 1, "Oslo", "mention"),
    ("Neither Rome nor Oslo", CITIES, "ambiguous", None, "mention"),
    # An option inside a longer one.
    ("Paris", CITIES, 2, "Paris", "whole reply"),
    ("Paris, Texas", CITIES, 3, "Paris, Texas", "whole reply"),
    ("I mean Paris, Texas, of course", CITIES, 3, "Paris, Texas", "mention"),
    ("I mean Paris in France, of course", CITIES, 2, "Paris", "mention"),
    ("Paris and also Paris, Texas", CITIES, "ambiguous", None, "mention"),
    # Words of their own.
    ("We concatenate", ("cat", "dog"), WRONG, "We concatenate", "free answer"),
    ("cats", ("cat", "dog"), WRONG, "cats", "free answer"),
    ("cat's", ("cat", "dog"), 0, "cat", "mention"),
    ("a dog", ("cat", "dog"), 1, None, "whole reply"),
    ("dog", ("a cat", "a dog"), 1, "dog", "whole reply"),
    # Equal options are one answer.
    ("Oslo", ("Rome", "Oslo", "Oslo"), 1, "Oslo", "whole reply"),
    ("It is Oslo there", ("Rome", "Oslo", "Oslo"), 1, "Oslo", "mention"),
    ("It is Oslo, or OSLO", ("Rome", "Oslo", "oslo"), 1, "OSLO", "mention"),
    # What differs in marks alone is one answer only if written alike.
    ("f(x)", ("f(x)", "f(x"), 0, None, "whole reply"),
    ("f(x", ("f(x)", "f(x"), 1, None, "whole reply"),
    # Yes and no: what stands behind them explains them.
    ("yes", ("no", "yes"), 1, "yes", "whole reply"),
    ("Yes.", ("no", "yes"), 1, None, "whole reply"),
    ("Yes, there is no doubt.", ("no", "yes"), 1, "Yes", "whole reply"),
    ("**No.** Yes would be wrong.", ("no", "yes"), 0, "No", "whole reply"),
    ("I know nothing", ("no", "yes"), WRONG, None, "free answer"),
    # "no" before a noun answers nothing.
    ("There is no doubt that it is true.", ("no", "yes"), WRONG, None, "free answer"),
    ("I have no idea", ("no", "yes"), WRONG, None, "free answer"),
    ("It has no legs.", ("no", "yes"), WRONG, None, "free answer"),
    ("Yes because there is no reason", ("no", "yes"), 1, "Yes", "mention"),
    ("I say no because it is cold", ("no", "yes"), 0, "no", "mention"),
    # An article in an option may be left out.
    ("Sun. The moon is cold.", ("the sun", "the moon"), "ambiguous", None, "mention"),
    ("It is sun that warms", ("the sun", "the moon"), 0, "sun", "mention"),
    ("The answer is sun, not moon", ("the sun", "the moon"), 0, "sun", "marker"),
    ("It is the sun that warms", ("the sun", "a sun"), 0, "the sun", "mention"),
    ("yes or no", ("no", "yes"), "ambiguous", None, "mention"),
    ("It is true that snow is white", ("false", "true"), 1, "true", "mention"),
    # Characters that mean something to regular expressions.
    ("a+b", ("a+b", "a*b", "(a|b)", "$5.00?"), 0, "a+b", "whole reply"),
    ("It is a*b then", ("a+b", "a*b", "(a|b)", "$5.00?"), 1, "a*b", "mention"),
    ("It is (a|b) then", ("a+b", "a*b", "(a|b)", "$5.00?"), 2, "(a|b)", "mention"),
    ("It costs $5.00? Fine", ("a+b", "a*b", "(a|b)", "$5.00?"), 3, "$5.00?", "mention"),
    ("C:\\new [x", ("C:\\new", "[x", "^$", "\\"), "ambiguous", None, "mention"),
    ("...", ("...", "!"), WRONG, "...", "free answer"),
    # Other scripts: no spaces between words, accents composed or not, full-width forms.
    ("答案是巴黎。", ("罗马", "巴黎"), 1, "巴黎", "marker"),
    ("我认为是巴黎吧", ("罗马", "巴黎"), 1, "巴黎", "mention"),
    ("파리입니다", ("로마", "파리"), 1, "파리", "mention"),
    ("Ｐａｒｉｓ", CITIES, 2, "Ｐａｒｉｓ", "whole reply"),
    ("un cafe\u0301 noir", ("café", "thé"), 0, "cafe\u0301", "mention"),
    ("un café noir", ("cafe\u0301", "the\u0301"), 0, "café", "mention"),
    ("cafétéria or café", ("caf", "café"), 1, "café", "mention"),
    ("Это Москва, да", ("Киев", "Москва"), 1, "Москва", "mention"),
    ("the ﬁsh swims", ("fish", "bird"), 0, "ﬁsh", "mention"),
    # Options that are numbers, letters or short words.
    ("It is 5", ("5", "15", "5.5"), 0, "5", "mention"),
    ("5.5", ("5", "15", "5.5"), 2, "5.5", "whole reply"),
    ("It is 5.5 then", ("5", "15", "5.5"), 2, "5.5", "mention"),
    ("It is 1.5 then", ("5", "15", "5.5"), WRONG, None, "free answer"),
    ("It is -5 then", ("5", "15", "-5"), 2, "-5", "mention"),
    ("It is 1,000 then", ("1000", "2000"), 0, "1,000", "mention"),
    ("It is 1000.0 then", ("1,000", "2,000"), 0, "1000.0", "mention"),
    ("It is 1/2", ("1", "2", "1/2"), 2, "1/2", "mention"),
    ("Type AB", ("A", "B", "AB", "O"), 2, "AB", "mention"),
    ("It is a type like O", ("A", "B", "AB", "O"), 3, "O", "mention"),
    ("they told us in the US", ("US", "UK"), 0, "US", "mention"),
    # A free answer.
    ("London", CITIES, WRONG, "London", "free answer"),
    ("I do not know what to say about any of this at all", CITIES, "unparsed", None, None),
    ("", CITIES, "unparsed", None, None),
    (" \n\t ", CITIES, "unparsed", None, None),
]


@pytest.mark.parametrize(
    ("reply", "choices", "expected", "said", "rule"), OPTION, ids=[f"{row[0]} of {len(row[1])}" for row in OPTION]
)
def test_an_options_full_text_names_it(
    reply: str, choices: tuple[str, ...], expected: Any, said: str | None, rule: str | None
) -> None:
    check(read(reply, "open", item(choices, gold=1)), expected, said, rule)


def test_options_that_were_listed_leave_no_free_answer() -> None:
    check(read("London", "text", item(CITIES)), "unparsed")
    check(read("London", "open", item(CITIES)), WRONG)
    check(read("Oslo", "text", item(CITIES)), 1)


def test_strict_reads_no_mentions() -> None:
    cities = item(CITIES)
    for reply in ("Oslo", "Answer: Oslo", "The answer is the city of Oslo."):
        check(read(reply, "text", cities, "strict"), 1)
    check(read("It lies in Oslo, Norway", "text", cities, "strict"), "unparsed")


def test_aliases_of_the_gold_answer_count() -> None:
    usa = item(("Mexico", "United States", "Canada"), gold=1, aliases=("USA", "U.S."))
    for reply in ("USA", "the u.s.", "Answer: USA", "I would say the USA here", "United States"):
        check(read(reply, "open", usa), 1)


def test_of_equal_options_the_gold_one_is_named() -> None:
    for gold in (1, 2):
        check(read("Oslo", "open", item(("Rome", "Oslo", "Oslo"), gold)), gold)
        check(read("So it is Oslo then", "open", item(("Rome", "Oslo", "Oslo"), gold)), gold)


# --- numbers -------------------------------------------------------------------------------------------------------

NUMBER: list[Case] = [
    ("18", "18", 0, "18", "whole reply"),
    ("18.", "18", 0, "18", "whole reply"),
    ("18.0", "18", 0, "18.0", "whole reply"),
    ("$18", "18", 0, "$18", "whole reply"),
    ("$ 18", "18", 0, "$ 18", "whole reply"),
    ("18%", "18", 0, "18", "whole reply"),
    ("18 apples", "18", 0, "18", "whole reply"),
    ("18kg", "18", 0, "18", "whole reply"),
    ("= 18", "18", 0, "18", "whole reply"),
    ("１８", "18", 0, "１８", "whole reply"),
    ("1,000", "1000", 0, "1,000", "whole reply"),
    ("1000.0", "1,000", 0, "1000.0", "whole reply"),
    ("€1,234,567.50", "1234567.5", 0, "€1,234,567.50", "whole reply"),
    ("-5", "-5", 0, "-5", "whole reply"),
    ("−5", "-5", 0, "−5", "whole reply"),
    ("-$5", "-5", 0, "-$5", "whole reply"),
    ("5", "-5", WRONG, "5", "whole reply"),
    (".5", "0.5", 0, ".5", "whole reply"),
    ("1/2", "0.5", 0, "1/2", "whole reply"),
    ("5/0", "5", WRONG, "5/0", "whole reply"),
    ("5.67", "5.6666667", 0, "5.67", "whole reply"),
    ("5.66", "5.6666667", WRONG, "5.66", "whole reply"),
    ("5.7", "5.6666667", WRONG, "5.7", "whole reply"),
    ("17/3", "5.6666667", 0, "17/3", "whole reply"),
    ("5.66666666666666", "5.6666667", 0, None, "whole reply"),
    ("0.13", "0.125", 0, None, "whole reply"),
    ("0.12", "0.125", 0, None, "whole reply"),
    ("0.2512", "0.25", WRONG, None, "whole reply"),
    ("2e3", "2000", 0, "2e3", "whole reply"),
    ("-1 apple", "-1", 0, "-1", "whole reply"),
    ("\\frac{1}{2}", "0.5", 0, "\\frac{1}{2}", "whole reply"),
    ("3.5.", "3.5", 0, "3.5", "whole reply"),
    # Markers.
    ("The answer is 18.", "18", 0, "18", "marker"),
    ("The answer is 3.5.", "3.5", 0, "3.5", "marker"),
    ("The answer is $18 a day, 3 more than before.", "18", 0, "$18", "marker"),
    ("The answer is 18. He has 3 left.", "18", 0, "18", "marker"),
    ("The answer is 5 + 3 = 8.", "8", 0, "8", "marker"),
    ("The answer is 5 apples + 3 apples = 8 apples.", "8", 0, "8", "marker"),
    ("The answer is 2 * 3 = 6 + 2 = 8.", "8", 0, "8", "marker"),
    ("The answer is 18 (because 9 + 9 = 18 and 2 = 2)", "18", 0, "18", "marker"),
    ("The answer is 12. No, the answer is 18.", "18", 0, "18", "marker"),
    ("Answer: 18\n\n3 apples are left", "18", 0, "18", "marker"),
    ("Answer: x = 18", "18", 0, "18", "marker"),
    ("The answer is approx. 18 eggs", "18", 0, "18", "marker"),
    ("#### 18", "18", 0, "18", "marker"),
    ("She has 9.\n#### 1,800", "1800", 0, "1,800", "marker"),
    ("#### 9 #### 18 a day", "18", 0, "18", "marker"),
    ("Final Answer: The final answer is $18$. I hope it is correct.", "18", 0, "$18", "marker"),
    ("Answer: 18 eggs (9 + 9 of them)", "18", 0, "18", "marker"),
    ("#### 1. Add them up\n9 + 9 = 18", "18", 0, "18", "last line"),
    ("\\boxed{18}", "18", 0, "18", "marker"),
    ("\\boxed{1,234}", "1234", 0, "1,234", "marker"),
    ("\\boxed{1{,}234}", "1234", 0, "1{,}234", "marker"),
    ("\\boxed{\\$18}", "18", 0, "\\$18", "marker"),
    ("\\boxed{\\frac{17}{3}}", "5.6666667", 0, "\\frac{17}{3}", "marker"),
    ("\\boxed{18 \\text{ eggs}}", "18", 0, "18", "marker"),
    ("答案是18。", "18", 0, "18", "marker"),
    ("答案：18个", "18", 0, "18", "marker"),
    ("The answer is 3 times 6 = 18", "18", 0, "18", "marker"),
    ("The answer is 2 1/2 cups", "2.5", 0, "2 1/2", "marker"),
    ("The answer is –5", "-5", 0, "–5", "marker"),
    ("The answer is 5 or 6", "5", "ambiguous", "5", "marker"),
    ("The answer is 1,2,3", "1", "ambiguous", "1", "marker"),
    ("The answer is 1, 2, and 3.", "1", "ambiguous", "1", "marker"),
    ("The answer is [NUMBER].\n9 + 9 = 18", "18", 0, "18", "last line"),
    # An operand is no answer.
    ("The answer is 50 – 8 = 42", "42", 0, "42", "marker"),
    ("The answer is 10% of 420 = 42", "42", 0, "42", "marker"),
    ("The answer is 3 boxes of 14 = 42", "42", 0, "42", "marker"),
    ("The answer is 40 + 2, which is 42.", "42", 0, "42", "marker"),
    ("The answer is 40 + 2, which is 42, which is 2 more than 40.", "42", 0, "42", "marker"),
    ("The answer is 40 plus 2 which equals 42", "42", 0, "42", "marker"),
    ("So we have 40 plus 2 which equals 42", "42", 0, "42", "last line"),
    ("The answer is 40 + 2.", "42", "ambiguous", "40", "marker"),
    ("The answer is 40 – 2", "38", "ambiguous", "40", "marker"),
    ("The answer is 3 boxes of 14", "42", "ambiguous", "3", "marker"),
    ("The answer is 10% of 420", "42", "ambiguous", "10", "marker"),
    ("The answer is 18 of 20", "18", 0, "18", "marker"),
    ("She had 3, which is 2 more than before", "3", "ambiguous", "2", "last line"),
    # Steps are counted, and their count is no number.
    ("Step 1: 40\nStep 2: 42", "42", 0, "42", "last line"),
    ("**Step 1:** 9 + 9 = 18\n**Step 2:** We are done", "18", 0, "18", "last line"),
    ("The answer is 18 (see step 2)", "18", 0, "18", "marker"),
    # The last line that holds a number; two different ones are ambiguous, unless one is a result.
    ("She has 9.\nSo it must be 18 in all", "18", 0, "18", "last line"),
    ("She has 9.\n9 + 9 = 18\nGood luck with that", "18", 0, "18", "last line"),
    ("9 + 9 = 18 in total", "18", 0, "18", "last line"),
    ("9 = 9 and 2 x 9 = $18 a day", "18", 0, "$18", "last line"),
    ("That makes 18 eggs, yes, 18.0", "18", 0, "18.0", "last line"),
    ("She had 3 and got 18 of them", "18", "ambiguous", "18", "last line"),
    ("1, 2, 3", "3", "ambiguous", "3", "last line"),
    ("In 2020 they had 18 eggs", "18", "ambiguous", "18", "last line"),
    ("It was sold in 1984, they say", "1984", 0, "1984", "last line"),
    ("On 2021-03-04 they had 18 eggs", "18", 0, "18", "last line"),
    ("On 3/4/2021 they had 18 eggs", "18", 0, "18", "last line"),
    ("On 03.04.2021 they had 18 eggs", "18", 0, "18", "last line"),
    ("3. So there are 18 eggs left", "18", 0, "18", "last line"),
    ("There are 10 - 4 of them, aren't there", "6", "ambiguous", "4", "last line"),
    ("That is 5-3 of them, isn't it", "2", "ambiguous", "3", "last line"),
    ("The area is 18 m² in all", "18", 0, "18", "last line"),
    ("- 18 eggs are left in the box", "18", 0, "18", "last line"),
    ("no number at all", "18", "unparsed", None, None),
    ("H2O and v1.2 and x5", "2", "unparsed", None, None),
    ("", "18", "unparsed", None, None),
]


def numeric(gold: str) -> Item:
    return item((gold, "999", "998"))


@pytest.mark.parametrize(
    ("reply", "gold", "expected", "said", "rule"), NUMBER, ids=[f"{row[0]} for {row[1]}" for row in NUMBER]
)
def test_numbers_are_compared_as_numbers(
    reply: str, gold: str, expected: Any, said: str | None, rule: str | None
) -> None:
    for view in ("open", "cot"):
        check(read(reply, view, numeric(gold), answer="number"), expected, said, rule)


def test_strict_numbers_need_a_marker_or_a_reply_of_their_own() -> None:
    for reply in ("18", "$18.00", "18 apples", "The answer is 18.", "#### 18", "\\boxed{18}"):
        check(read(reply, "open", numeric("18"), "strict", "number"), 0)
    check(read("So she has got 18 of them", "open", numeric("18"), "strict", "number"), "unparsed")


def test_a_distractor_is_named_rather_than_rounded_to_the_gold_answer() -> None:
    close = item(("5.666", "5.67", "5.68"), gold=0)
    check(read("5.67", "open", close, answer="number"), 1)
    check(read("5.67", "open", item(("5.666", "5.68")), answer="number"), 0)


def test_aliases_of_a_gold_number_count() -> None:
    check(read("36", "open", item(("3 dozen", "5"), aliases=("36",)), answer="number"), 0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,000", "1000"),
        ("$1,000.0", "1000"),
        ("1e3", "1000"),
        ("0.00", "0"),
        ("-0.50", "-0.5"),
        ("1/4", "0.25"),
        ("costs £.75 now", "0.75"),
        ("1,0000", "1"),
        ("12345678901234567890123456789012345", "12345678901234567890123456789012345"),
        ("٣", "3"),
    ],
)
def test_a_number_keeps_its_value(text: str, value: str) -> None:
    assert parse_number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "none", "x1", "1/0", "2021-01-02", "."])
def test_what_is_no_number_has_no_value(text: str) -> None:
    assert parse_number(text) is None


def test_long_numbers_that_differ_in_one_digit_differ() -> None:
    one, other = "1" * 40, "1" * 39 + "2"
    assert not same_number(parse_number(one), parse_number(other))
    check(read(other, "open", item((one, "5")), answer="number"), WRONG)


# --- lists ---------------------------------------------------------------------------------------------------------

LIST: list[Case] = [
    ("apple, arrow, anchor", 0, "whole reply"),
    ("Apple, arrow, anchor.", 0, "whole reply"),
    ("apple arrow anchor", 0, "whole reply"),
    (" apple,arrow,  anchor \nand more", 0, "whole reply"),
    ("Sure: apple, arrow, anchor", 0, "mention"),
    ("Answer:\napple, arrow, anchor", 0, "mention"),
    ("apple, anchor, arrow", 1, "first line"),
    ("apple, arrow", WRONG, "first line"),
    ("apple, arrow, anchor, box", WRONG, "first line"),
    ("box, apple, arrow, anchor", WRONG, "first line"),
    ("apple, arrow, anchors", WRONG, "first line"),
    ("", "unparsed", None),
    ("\n \n", "unparsed", None),
]


@pytest.mark.parametrize(("reply", "expected", "rule"), LIST, ids=[row[0] for row in LIST])
def test_a_list_counts_whole_and_in_order(reply: str, expected: Any, rule: str | None) -> None:
    lists = item(("apple, arrow, anchor", "apple, anchor, arrow"))
    check(read(reply, "cloze", lists, answer="list"), expected, None, rule)
    strict = read(reply, "cloze", lists, "strict", "list")
    check(strict, WRONG if rule == "mention" else expected)


# --- properties ----------------------------------------------------------------------------------------------------

READERS = [("letters", "choice"), ("open", "choice"), ("text", "choice"), ("open", "number"), ("cloze", "list")]

WORDS = st.sampled_from(
    [
        "Answer:", "answer", "is", "the", "A", "B", "C", "(", ")", "[", "/", ",", ".", "or", "and", "\n", " ", "{", "}",
        "\\boxed{", "####", "1,000", "3.5", "-", "$", "=", "cat", "dog", "apple, arrow", "答案：", "Ａ", "１",
        "e\u0301", "\u0301", "ﬁ", "½", "²", "I", "a", "*", "\\frac{1}{0}", "9" * 40, "1e99", "2021-01-02", "\ud800",
    ]
)  # fmt: skip
REPLIES = st.one_of(st.text(), st.lists(WORDS, max_size=30).map("".join), st.lists(WORDS, max_size=30).map(" ".join))
CHOICE = st.sampled_from(["cat", "dog", "a", "A", "1,000", "5.67", "(", "\\", "e\u0301", "巴黎", "."]) | st.text(
    min_size=1
)
CHOICES = st.lists(CHOICE.filter(str.strip), min_size=2, max_size=6)


@given(reply=REPLIES, choices=CHOICES, reader=st.sampled_from(READERS), rules=st.sampled_from(["strict", "lenient"]))
@example(reply="5." + "6" * 60, choices=["5.6666667", "1"], reader=("open", "number"), rules="lenient")
@example(reply="9" * 5000, choices=["9", "1"], reader=("open", "number"), rules="lenient")
def test_any_reply_gets_one_of_three_statuses_and_a_span_of_its_own(
    reply: str, choices: list[str], reader: tuple[str, str], rules: str
) -> None:
    view, answer = reader
    found = read(reply, view, item(choices), rules, answer)
    assert found.status in ("parsed", "unparsed", "ambiguous")
    if found.span is not None:
        assert 0 <= found.span[0] < found.span[1] <= len(reply)
    if found.choice is not None:
        assert found.status == "parsed" and 0 <= found.choice < len(choices)
    if reader[0] == "letters" and rules == "strict" and found.status != "unparsed":
        assert found == read(reply, view, item(choices), "lenient", answer), "lenient only adds to strict"


NOISE = st.text(st.characters(exclude_characters="A\n"), max_size=30) | st.sampled_from(
    ["", "Ｃ ", "e\u0301\u0301 ", "½ ", "ﬃ ", "\u0301", "１２ ", "答 "]
)


@given(
    before=NOISE, after=NOISE, letter=st.sampled_from("ABCDＡＢＣＤ"), marker=st.sampled_from(["Answer: ", "答案："])
)
def test_the_span_of_a_planted_marker_is_where_it_was_planted(
    before: str, after: str, letter: str, marker: str
) -> None:
    reply = f"{before}\n{marker}{letter}\n{after}"
    at = len(before) + 1 + len(marker)
    # Only what comes later could overrule it.
    if not any(sign in after.casefold() for sign in ("answer", "答", "option", "choice", "boxed", "ответ")):
        found = read(reply, "letters", item([f"<{name}>" for name in "wxyz"]), "strict")
        check(found, "ABCD".index(letter) if letter in "ABCD" else "ＡＢＣＤ".index(letter), letter, "marker")
        assert found.span == (at, at + 1)


@given(before=NOISE, number=st.integers(-(10**9), 10**9), wide=st.booleans())
def test_the_span_of_a_planted_number_is_where_it_was_planted(before: str, number: int, wide: bool) -> None:
    said = f"{number:,}"
    if wide:
        said = said.translate({ord(d): ord(d) + 0xFEE0 for d in string.digits})
    # A sentence of its own: "if\nthe answer is 0" tells none.
    found = read(f"{before}.\nThe answer is {said}.", "open", numeric(str(number)), "strict", "number")
    check(found, 0, said, "marker")


LONG = 100_000
PATHOLOGICAL = [
    "A, ", "A ", "A or ", "A/", "Ａ, ", "I'd ", "A. cat\n", "A. cat\nB. dog\n", "option ", "cat ", "cat, ", "cat or ",
    "a ", "\n", " ", "\t", "(", "* ", "'", ".", "- ", "-", "e\u0301", "\u0301", "{", "apple, arrow, ", "答案：",
    "9", "9,", "1,000,", "9.", "1/", "= ", "=9", "1. 2\n", "9\n", "#### ", "#### 9 ", "a", "\\frac{", "Answer: 9 or ",
    "\\boxed{", "\\boxed{a}{", "\\boxed{{{", "Answer", "Answer: ", "Answer: x ", "Answer: A, B, C, or D ", "answer to ",
]  # fmt: skip


@pytest.mark.parametrize("piece", PATHOLOGICAL, ids=repr)
def test_long_replies_are_read_in_linear_time(piece: str) -> None:
    animals, lists = item((*ANIMALS, "a", "9")), item(("apple, arrow, anchor", "apple"))
    half = piece * (LONG // len(piece) // 2)
    reply = f"{half}\nAnswer: 9 x{half}!"
    for view, answer in (("letters", "choice"), ("open", "choice"), ("open", "number"), ("cloze", "list")):
        started = time.perf_counter()
        read(reply, view, lists if answer == "list" else animals, answer=answer)
        seconds = time.perf_counter() - started
        assert seconds < 3, f"{view}, {answer}: {seconds:.1f} s"
