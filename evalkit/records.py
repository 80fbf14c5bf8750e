"""What passes from file to file: Item -> Prompt -> Request -> Reply -> Outcome.

All are frozen. Every index counts from 0; every log-probability is in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["loglikelihood", "generation"]
LOGLIKELIHOOD: Mode = "loglikelihood"
GENERATION: Mode = "generation"
MODES: tuple[Mode, ...] = (LOGLIKELIHOOD, GENERATION)

Verdict = Literal["correct", "wrong", "unparsed", "ambiguous", "truncated", "empty"]
VERDICTS: tuple[Verdict, ...] = ("correct", "wrong", "unparsed", "ambiguous", "truncated", "empty")

Normalisation = Literal["raw", "token", "character", "byte", "pmi"]
NORMALISATIONS: tuple[Normalisation, ...] = ("raw", "token", "character", "byte", "pmi")

Rules = Literal["strict", "lenient"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A few-shot example whose text is given."""

    question: str
    reply: str
    joint: str = " "
    """Between question and reply in running text."""
    gap: str = "\n\n"
    """Behind the reply in running text."""
    lettered: tuple[str, str] = ("", "")
    """(question, reply) as view ``letters`` shows the example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """The text of an item that comes written, as another harness puts it to a model (view ``native``)."""

    question: str
    """All text up to the answer but for ``before`` and the examples; never ends in white space."""
    joint: str = " "
    """Between question and answer in running text, bytes as given."""
    before: str = ""
    """A description in front of the examples; the system message of a chat."""
    examples: tuple[Example, ...] = ()
    prefix: str = ""
    """What the answer begins with, behind the question and at the start of a chat's turn."""
    stem: str = ""
    """The question without its cue, and..."""
    cue: str = ""
    """... the cue: view ``letters`` lists the options between them."""
    listed: Literal["", "letters", "words"] = ""
    """Whether the question lists the options already, with letters or by their text alone."""
    labels: tuple[str, ...] = ()
    """Scored in the choices' place: the letters under which the question lists them. Empty: the choices."""
    around: tuple[str, str] | None = None
    """Each choice stands between these two in a question of its own, and ``ending`` is scored behind all of them."""
    ending: str = ""
    judge: Callable[[str], tuple[bool | None, str]] | None = None
    """Reply -> (right, the answer as read); None: there is none. Without a judge evalkit's extraction reads replies."""
    stops: tuple[str, ...] = ()
    """Of ``judge``'s replies, also in a chat."""
    max_tokens: int = 0
    """Length limit of a generated answer. 0: the view's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question of a benchmark. Both modes and every view read this and nothing else."""

    id: str
    """Stable over runs and machines: pairs an outcome with its twin in another run."""
    question: str
    choices: tuple[str, ...]
    """What log-likelihood ranks; at least two. Of an open question: the gold answer and distractors."""
    gold: int
    """The right one of ``choices``."""
    also: tuple[int, ...] = ()
    """Other choices that are right too."""
    aliases: tuple[str, ...] = ()
    """Other spellings of the gold choice that a generated answer may use."""
    passage: str = ""
    """Text that the question is about, shown before it. Empty: none."""
    solution: str = ""
    """A worked solution without its final answer, for chain-of-thought examples. Empty: none."""
    cluster: str = ""
    """Items that share a cluster are not independent (one passage, one template). Empty: the item's own id."""
    stratum: str = ""
    """A fixed part of the benchmark (MMLU's subject), reported apart. Empty: none."""
    native: Native | None = None
    """The item as another harness writes it, with its own examples. None: views write it."""

    def __post_init__(self) -> None:
        if len(self.choices) < 2:
            raise ValueError(f"{self.id}: 'choices' has {len(self.choices)} entries; a ranking needs at least 2")
        for i, choice in enumerate(self.choices):
            if not choice.strip():
                raise ValueError(f"{self.id}: choice {i} is empty, so nothing can be scored; correct or drop the item")
        for gold in (self.gold, *self.also):
            if not 0 <= gold < len(self.choices):
                raise ValueError(
                    f"{self.id}: the gold answer is choice {gold}, but choices go from 0 to {len(self.choices) - 1}"
                )

    @property
    def answer(self) -> str:
        return self.choices[self.gold]

    @property
    def answers(self) -> tuple[str, ...]:
        """All right choices, ``answer`` first."""
        return tuple(self.choices[i] for i in (self.gold, *self.also))


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How to generate one reply."""

    max_tokens: int
    stops: tuple[str, ...] = ()
    """The reply ends before the first of these strings; they may be split over tokens."""
    temperature: float = 0.0
    """0: greedy."""
    seed: int = 0
    """Of sampling; without effect when greedy."""
    thought: "Thought | None" = None
    """A thinking block comes before the answer, with a budget of its own. None: no block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """How a thinking block is bounded before the answer is generated."""

    max_tokens: int
    close: str
    """The tag that ends the block."""
    force: bool
    """At the budget: close the block and let the model answer (True), or call the reply truncated (False)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and all that is asked of it: several scores, a reply, or both."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    continuations: tuple[tuple[int, ...], ...] = ()
    """Token ids of each text to score after the prompt, each at least one token."""
    generation: Generation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What the model said."""

    text: str
    """The reply without the end-of-sequence token, the stop string, and what follows it."""
    tokens: tuple[int, ...]
    """Every token generated, stop string included, end-of-sequence token excluded; -1 for one whose id a server keeps
    to itself."""
    finish: Literal["eos", "stop", "length"]
    thought: str = ""
    """The thinking block that came before ``text``, without its tags."""
    cut_in: Literal["", "thought", "answer"] = ""
    """Which budget ran out, if one did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An engine's answer to one request."""

    logprobs: tuple[tuple[float, ...], ...] = ()
    """For each continuation the log-probability of each of its tokens (nats)."""
    generated: Generated | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one mode made of one item in one view."""

    mode: Mode
    view: str
    outcome: Verdict
    choice: int | None = None
    """The choice that was picked; None when there was no single one, or a free answer matched none."""
    answer: str = ""
    """The answer as found: the picked choice's text, or the words taken from the reply."""

    logprobs: tuple[float, ...] = ()
    """Log-likelihood: one a choice, the sum over its tokens (nats)."""
    tokens: tuple[int, ...] = ()
    """Tokens scored of each choice."""
    characters: tuple[int, ...] = ()
    """Characters of each choice's text, without the space that joins it to the prompt (lm-eval's acc_norm)."""
    bytes: tuple[int, ...] = ()
    """The same in UTF-8 bytes."""
    blind: tuple[float, ...] = ()
    """Like ``logprobs``, but without the question (for PMI, and as a floor). Empty: not scored in this view."""
    tied: tuple[int, ...] = ()
    """The choices that share the best score, when there is more than one."""

    reply: str = ""
    """Generation: the reply, thinking block removed."""
    thought: str = ""
    span: tuple[int, int] | None = None
    """Where ``answer`` stands in ``reply`` (characters, half open)."""
    rule: str = ""
    """The extraction rule that found it."""
    finish: str = ""
    """"eos", "stop" or "length"."""
    cut_in: str = ""
    """Which token budget ran out: "thought", "answer", or "" for none."""
    num_tokens: int = 0
    """Tokens generated, thinking included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEntry:
    """What a run declares of one task before it starts."""

    name: str
    version: str
    loglikelihood: str
    """Primary view of log-likelihood, as used."""
    generation: str
    normalisation: Normalisation
    shots: int
    n: int
    """Items."""
    strata: str = ""
    """What the items' strata are. Empty: there are none."""
    listed: bool = False
    """Generation's view lists the options, so that a guess can be right."""

    def view(self, mode: Mode) -> str:
        """The primary view of ``mode``."""
        return self.loglikelihood if mode == LOGLIKELIHOOD else self.generation


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRecord:
    """One line of outcomes.jsonl: an item of a run, with its outcome in every scored mode and view."""

    task: str
    version: str
    item: str
    prompt_sha256: str
    """Of the bytes of all the item's prompts and scored texts: equal in two runs that asked the same."""
    gold: int
    choices: tuple[str, ...]
    also: tuple[int, ...] = ()
    """Other choices that are right too."""
    stratum: str = ""
    cluster: str = ""
    prompts: dict[str, str] = field(default_factory=dict)
    """Prompt text by view, as the model saw it but for what ``cut`` tokens took from its left."""
    cut: int = 0
    """Tokens dropped from the left of the longest prompt because the model's window is too short."""
    outcomes: tuple[Outcome, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """All right choices, the gold one first."""
        return tuple(self.choices[i] for i in (self.gold, *self.also))

    def outcome(self, mode: Mode, view: str) -> Outcome | None:
        return next((o for o in self.outcomes if o.mode == mode and o.view == view), None)
