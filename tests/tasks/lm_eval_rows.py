"""Rows of the data sets that lm-eval's tasks read, and what a case of such a task is."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    path: str
    """lm-eval's YAML, under its folder of tasks."""
    splits: dict[str, list[dict[str, Any]]]
    """The rows of each split that the YAML names; those of the evaluated one first."""
    native: str
    """The first document as lm-eval writes it."""
    generated: str = ""
    """The first document as generation sees it. Empty: the same."""
    choices: tuple[str, ...]
    gold: int
    view: str = "letters"
    """Generation's."""
    shots: bool = True
    """It takes few-shot examples."""
    also: tuple[int, ...] = field(default=())


def arc(question: str, *texts: str, key: str) -> dict[str, Any]:
    return {"id": question, "question": question, "choices": options(*texts), "answerKey": key}


def options(*texts: str) -> dict[str, list[str]]:
    return {"text": list(texts), "label": list("ABCDE"[: len(texts)])}


ARC = [
    arc("Which part of a plant takes up water?", "leaf", "root", "petal", "seed", key="B"),
    arc("What do lungs take in?", "sand", "light", "air", key="C"),
]
ARC_TRAIN = [
    arc("Which animal barks?", "a cat", "a dog", "a fish", key="B"),
    arc("Which is a colour?", "red", "loud", "seven", "old", key="A"),
    arc("What falls from clouds?", "sand", "iron", "rain", "milk", key="C"),
]
ARC_NATIVE = "Question: Which part of a plant takes up water?\nAnswer:"
ARC_LETTERS = "Question: Which part of a plant takes up water?\nA. leaf\nB. root\nC. petal\nD. seed\nAnswer:"


def boolq(passage: str, question: str, label: int) -> dict[str, Any]:
    return {"passage": passage, "question": question, "idx": 0, "label": label}


def piqa(goal: str, one: str, two: str, label: int) -> dict[str, Any]:
    return {"goal": goal, "sol1": one, "sol2": two, "label": label}


def hellaswag(activity: str, a: str, b: str, endings: list[str], label: str) -> dict[str, Any]:
    return {"activity_label": activity, "ctx_a": a, "ctx_b": b, "endings": endings, "label": label}


def winogrande(sentence: str, one: str, two: str, answer: str) -> dict[str, Any]:
    return {"sentence": sentence, "option1": one, "option2": two, "answer": answer}


def copa(premise: str, one: str, two: str, question: str, label: int) -> dict[str, Any]:
    return {"premise": premise, "choice1": one, "choice2": two, "question": question, "idx": 0, "label": label}


def sciq(support: str, question: str, right: str, *wrong: str) -> dict[str, Any]:
    one, two, three = wrong
    parts = {"distractor1": one, "distractor2": two, "distractor3": three, "correct_answer": right}
    return {"support": support, "question": question, **parts}


def logiqa(context: str, question: str, texts: list[str], label: str) -> dict[str, Any]:
    return {"context": context, "question": question, "options": texts, "label": label}


def mmlu(question: str, choices: list[str], answer: int) -> dict[str, Any]:
    return {"question": question, "subject": "anatomy", "choices": choices, "answer": answer}


def mathqa(problem: str, texts: str, correct: str) -> dict[str, Any]:
    return {"Problem": problem, "options": texts, "correct": correct}


def race(article: str, question: str, texts: list[str], answer: str) -> dict[str, Any]:
    first = {"question": "Who tells this?", "answer": "A", "options": ["a boy", "a king", "a cook", "a cat"]}
    last = {"question": question, "answer": answer, "options": texts}
    return {"article": article, "problems": repr([first, last])}


def siqa(context: str, question: str, texts: tuple[str, str, str], label: str) -> dict[str, Any]:
    answers = dict(zip(("answerA", "answerB", "answerC"), texts, strict=True))
    return {"context": context, "question": question, **answers, "label": label}


def csqa(question: str, texts: tuple[str, ...], key: str) -> dict[str, Any]:
    return {"question": question, "choices": options(*texts), "answerKey": key}


def openbook(stem: str, texts: tuple[str, ...], key: str) -> dict[str, Any]:
    return {"question_stem": stem, "choices": options(*texts), "answerKey": key}


def anli(premise: str, hypothesis: str, label: int) -> dict[str, Any]:
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


def agieval(query: str, choices: list[str], gold: list[int]) -> dict[str, Any]:
    return {"query": query, "choices": choices, "gold": gold}


def mc1(question: str, *choices: str) -> dict[str, Any]:
    return {"question": question, "mc1_targets": {"choices": list(choices), "labels": [1] + [0] * (len(choices) - 1)}}


def gsm8k(question: str, worked: str, number: str) -> dict[str, Any]:
    return {"question": question, "answer": f"{worked}\n#### {number}"}


def trivia(question: str, *aliases: str) -> dict[str, Any]:
    return {"question": question, "answer": {"aliases": list(aliases), "value": aliases[0]}}


TRUTHFUL = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

Q: What happens if you eat seeds?
"""
