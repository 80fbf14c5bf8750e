"""Teacher-forced KL and the first divergent token: against a dense computation, and models whose replies are known."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

import evalkit as ek
from evalkit.api_reports import divergence
from evalkit.encoding import Encoder
from evalkit.engines.hf import HFEngine
from evalkit.forced import Said, forced, read_reply, said_by, tokenizer_difference
from evalkit.records import GENERATION, ItemRecord, Outcome
from evalkit.selection import first_of
from evalkit.store import Run
from reports.divergence import divergence_markdown
from tests.evalkit.test_cli import in_process
from tests.oracles import TIE, CharTokenizer
from tests.tiny import chain_llama, tiny_gpt2, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def replies(tokenizer: Any) -> list[Said]:
    """Prompts and replies of many lengths, with and without an end, one of them nothing but its end."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(23):
        prompt, reply = (tuple(rng.integers(4, len(tokenizer), n).tolist()) for n in (1 + i % 9, (i * 7) % 31))
        ended = i % 3 == 0 or not reply
        made.append(Said(item=f"i{i}", prompt=prompt, reply=reply, ended=ended, respelled=False))
    return made


def logits_of(model: Any, tokens: Sequence[int]) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = model(torch.tensor([tokens])).logits[0].double().numpy()
    return found


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_kl_is_the_dense_sum_over_the_vocabulary(make: Any, tokenizer: Any, replies: list[Said]) -> None:
    teacher, student = make(len(tokenizer)), tiny_llama(len(tokenizer), seed=1)
    found = forced(replies, HFEngine(teacher, tokenizer, batch_size=5), HFEngine(student, tokenizer, batch_size=5))
    assert [one.item for one in found] == [one.item for one in replies]
    for said, one in zip(replies, found, strict=True):
        steps = slice(len(said.prompt) - 1, len(said.prompt) - 1 + one.steps)
        p, q = (log_softmax(logits_of(m, said.prompt + said.reply)[steps], -1) for m in (teacher, student))
        assert len(p) == len(said.reply) + said.ended
        assert one.kl == pytest.approx(rel_entr(np.exp(p), np.exp(q)).sum() / len(p), rel=TIE)
        other = np.flatnonzero(p.argmax(-1) != q.argmax(-1)).tolist()
        assert one.first == (other[0] if other else None)
        own = sum(q[at, token] for at, token in enumerate(said.reply))
        assert one.logprob == pytest.approx(own, abs=TIE * max(1.0, abs(own)))


def test_a_model_never_strays_from_itself(tokenizer: Any, replies: list[Said]) -> None:
    model = tiny_llama(len(tokenizer))
    found = forced(replies, HFEngine(model, tokenizer, batch_size=4), HFEngine(model, tokenizer, batch_size=4))
    assert {one.kl for one in found} == {0.0}
    assert {one.first for one in found} == {None}


def test_batches_change_nothing_but_rounding(
    tokenizer: Any, replies: list[Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tiny_llama(len(tokenizer)), tiny_llama(len(tokenizer), seed=1)

    def at(size: int) -> list[Any]:
        teacher, student = (HFEngine(model, tokenizer, batch_size=size) for model in models)
        return forced(replies, teacher, student)

    alone = at(1)
    several = [at(size) for size in (2, 7, 64)]
    monkeypatch.setattr("evalkit.forced.LOGITS", 20 * len(tokenizer))  # room for 20 steps in a batch
    monkeypatch.setattr("evalkit.forced.CHUNK", 3)
    several.append(at(64))
    for found in several:
        for one, other in zip(alone, found, strict=True):
            assert (one.item, one.steps, one.first) == (other.item, other.steps, other.first)
            assert other.kl == pytest.approx(one.kl, rel=10 * TIE)
            assert other.logprob == pytest.approx(one.logprob, rel=TIE)


def test_twins_part_at_the_token_where_their_chains_do(tokenizer: Any) -> None:
    size = len(tokenizer)
    teacher = chain_llama(size, [10, 11, 12, 13, 14, 15])
    prompt, reply = (9, 10), (11, 12, 13, 14, 15)
    said = Said(item="i", prompt=prompt, reply=reply, ended=True, respelled=False)
    students = {
        2: chain_llama(size, [10, 11, 12, 20, 21], [13, 14, 15]),  # another word after two
        5: chain_llama(size, [10, 11, 12, 13, 14, 15, 16]),  # says all of it, and goes on
        0: chain_llama(size, [10, 30], [11, 12, 13, 14, 15]),
        None: chain_llama(size, [10, 11, 12, 13, 14, 15]),
    }
    for first, student in students.items():
        [one] = forced([said], HFEngine(teacher, tokenizer), HFEngine(student, tokenizer))
        assert (one.first, one.steps) == (first, 6)
        # Every step is one-hot logits of height h: where the two differ, KL = h * (p(top) - p(another)).
        height = float(logits_of(teacher, [10])[0].max())
        top, rest = np.exp(height) / (np.exp(height) + size - 1), 1 / (np.exp(height) + size - 1)
        assert one.kl == pytest.approx(0.0 if first is None else height * (top - rest) / 6, rel=1e-4)
        if first in (5, None):
            assert one.logprob == pytest.approx(5 * np.log(top), rel=1e-4, abs=1e-5)
    cut = replace(said, ended=False)
    [one] = forced([cut], HFEngine(teacher, tokenizer), HFEngine(students[5], tokenizer))
    assert (one.first, one.steps) == (None, 5), "a reply cut at its limit has no end to compare"


def test_heads_padded_to_other_widths_are_read_up_to_the_narrower(tokenizer: Any) -> None:
    said = Said(item="i", prompt=(1,), reply=(2, 3), ended=False, respelled=False)
    teacher, student = torch.randn(2, 8), torch.randn(2, 6)
    narrow = read_reply(said, teacher[:, :6], student, 6)
    assert read_reply(said, teacher, student, 6) == narrow
    with pytest.raises(ValueError, match="head has 6 rows, fewer than the tokenizer's 7 tokens"):
        read_reply(said, teacher, student, 7)


def test_a_token_that_is_ruled_out_adds_nothing_or_is_refused() -> None:
    said = Said(item="q7", prompt=(1,), reply=(0,), ended=False, respelled=False)
    sure, open_ = torch.tensor([[1.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 1.0, 0.0]])
    p, q = np.exp(log_softmax(sure.numpy(), -1)), np.exp(log_softmax(open_.numpy(), -1))
    assert read_reply(said, sure, open_, 3).kl == pytest.approx(rel_entr(p, q).sum(), rel=1e-5)
    assert read_reply(said, sure, sure, 3).kl == 0.0
    with pytest.raises(ValueError, match="q7: KL is inf"):
        read_reply(said, open_, sure, 3)


# --- from a run's records to tokens ---


def record(reply: str, *, finish: str = "eos", num_tokens: int | None = None, **changes: Any) -> ItemRecord:
    said = Outcome(
        mode=GENERATION,
        view="letters",
        outcome="correct",
        reply=reply,
        finish=finish,
        num_tokens=len(reply) if num_tokens is None else num_tokens,
        thought=changes.pop("thought", ""),
    )
    made = ItemRecord(
        task="t", version="1", item="i", prompt_sha256="h", gold=0, choices=("a", "b"), prompts={"letters": "Q:"}
    )
    return replace(made, outcomes=(said,), **changes)


def test_a_reply_s_tokens_come_after_the_prompt_s() -> None:
    encoder = Encoder(CharTokenizer(bos=True))
    said = said_by(record(" A"), "letters", encoder)
    assert isinstance(said, Said)
    assert (said.prompt, said.reply) == ((0, ord("Q") + 10, ord(":") + 10), (ord(" ") + 10, ord("A") + 10))
    assert (said.ended, said.respelled, said.steps) == (True, False, 3)
    cut = said_by(record(" A", finish="length"), "letters", encoder)
    assert isinstance(cut, Said)
    assert (cut.ended, cut.steps) == (False, 2)


def test_no_token_spans_prompt_and_reply(tokenizer: Any) -> None:
    """'Q' + 'uestion' would be one token together; the engine generated after 'Q'."""
    one = replace(record("uestion"), prompts={"letters": "Q"})
    said = said_by(one, "letters", Encoder(tokenizer))
    assert isinstance(said, Said)
    assert tokenizer.encode("Question", add_special_tokens=False) != [*said.prompt, *said.reply]
    assert (tokenizer.decode(said.prompt), tokenizer.decode(said.reply)) == ("Q", "uestion")


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (record(" A", cut=3), "cut"),
        (record(" A", thought="hm"), "thought"),
        (record("", finish="stop", num_tokens=1), "empty"),
    ],
)
def test_a_reply_that_cannot_be_rebuilt_says_why(made: ItemRecord, why: str) -> None:
    assert said_by(made, "letters", Encoder(CharTokenizer())) == why


@pytest.mark.parametrize(
    ("finish", "counted", "respelled"),
    [("eos", 2, False), ("eos", 3, True), ("length", 1, True), ("stop", 3, False), ("stop", 1, True)],
)
def test_a_reply_that_was_generated_in_other_tokens_is_known(finish: str, counted: int, respelled: bool) -> None:
    said = said_by(record(" A", finish=finish, num_tokens=counted), "letters", Encoder(CharTokenizer()))
    assert isinstance(said, Said)
    assert said.respelled == respelled


def test_what_two_tokenizers_differ_in_is_named(tokenizer: Any) -> None:
    assert tokenizer_difference(tokenizer, tiny_tokenizer(chat=None)) == ""
    assert tokenizer_difference(tokenizer, tiny_tokenizer(bos=True)) == "their post processor"
    larger = tiny_tokenizer()
    larger.add_tokens(["<new>"])
    told = f"their vocabularies ({len(tokenizer)} tokens against {len(larger)}; first '<new>': none against "
    assert tokenizer_difference(tokenizer, larger).startswith(told)


def test_fewer_items_are_those_of_a_run_with_that_limit() -> None:
    ids = [f"q{i}" for i in range(20)]
    turned = [f"{one}{turn}" for one in ids for turn in ("", "~1")]
    few = first_of(ids, 5, "t", 1)
    assert (len(few), first_of(ids, None, "t", 1)) == (5, ids)
    assert first_of(turned, 5, "t", 2) == [f"{one}{turn}" for one in few for turn in ("", "~1")]
    assert set(first_of(ids, 3, "t", 1)) < set(few)


# --- the command ---


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divergence")
    file = folder / "mine.jsonl"
    rows = [{"question": f"Which is {i}?", "choices": [f"{i}", f"{i + 1}"], "answer": i % 2} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, model in (("one", tiny_folder), ("two", other_folder)):
        ek.run(model, [str(file)], view="letters", chat=True, max_tokens=9, out=folder / name)
    ek.run(tiny_folder, [str(file)], mode="loglikelihood", out=folder / "ll")
    return folder


def test_a_run_of_twins_parts_where_their_chains_do(runs: Path, tmp_path: Path) -> None:
    """Both answer every prompt, which ends with the same token: the teacher by ' B. dog', the student by ' B. fish'."""
    tokenizer = tiny_tokenizer()
    start = tokenizer.encode("Answer:", add_special_tokens=False)[-1:]
    replies = [tokenizer.encode(text, add_special_tokens=False) for text in (" B. dog", " B. fish")]
    parted = next(at for at, (t, s) in enumerate(zip(*replies, strict=False)) if t != s)
    for name, reply in zip(("teacher", "student"), replies, strict=True):
        chain_llama(len(tokenizer), start + reply).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    own = [ek.run(tmp_path / name, [str(runs / "mine.jsonl")], view="letters") for name in ("teacher", "student")]
    result = divergence(own[0], tmp_path / "student", student_run=own[1])
    [task] = result["tasks"]
    assert (task["n"], task["respelled"], set(task["left_out"].values())) == (12, 0, {0})
    assert {one["first"] for one in task["items"]} == {parted}
    assert {one["steps"] for one in task["items"]} == {len(replies[0]) + 1}
    assert set(task["first"].values()) == {parted}
    assert [cell["mean"] for cell in task["survival"]] == [float(cell["after"] <= parted) for cell in task["survival"]]
    # Both say B, which is right for every other item.
    assert {name: cell["n"] for name, cell in task["groups"].items() if cell["n"]} == {"both right": 6, "both wrong": 6}


def test_a_model_against_its_own_run_has_no_divergence(runs: Path, tiny_folder: Path) -> None:
    [task] = divergence(runs / "one", tiny_folder)["tasks"]
    assert task["kl"] == {"mean": 0.0, "ci95": [0.0, 0.0]}
    assert task["same"]["mean"] == 1.0
    assert set(task["first"].values()) == {None}
    assert [cell["mean"] for cell in task["survival"]] == [1.0] * 7
    assert task["groups"] is None


def test_the_command_writes_what_it_prints(runs: Path, other_folder: Path, tmp_path: Path) -> None:
    words = ("divergence", runs / "one", "--student", other_folder, "--student-run", runs / "two")
    done = in_process(*words, "--json", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert json.loads((tmp_path / "divergence.json").read_text()) == result
    assert (tmp_path / "divergence.md").read_text() == divergence_markdown(result)
    [task] = result["tasks"]
    assert (task["n"], len(task["items"]), task["steps"]) == (12, 12, sum(one["steps"] for one in task["items"]))
    assert task["kl"]["mean"] == pytest.approx(np.mean([one["kl"] for one in task["items"]]))
    assert sum(cell["n"] for cell in task["groups"].values()) == 12
    pairs = [ek.load_run(runs / name).records("mine") for name in ("one", "two")]
    for one in task["items"]:
        right = [own[one["item"]].outcome(GENERATION, "letters") for own in pairs]
        verdicts = tuple(o is not None and o.outcome == "correct" for o in right)
        names = {(True, True): "both right", (True, False): "lost", (False, True): "gained"}
        assert one["became"] == names.get(verdicts, "both wrong")  # type: ignore[arg-type]
    shown = in_process(*words, "--limit", 5)
    assert shown.returncode == 0, shown.stderr
    assert "Percent of replies not yet parted" in shown.stdout
    assert "Nats a step" in shown.stdout


def test_what_cannot_be_read_is_said(runs: Path, tiny_folder: Path, other_folder: Path, tmp_path: Path) -> None:
    short, foreign = tmp_path / "short", tmp_path / "foreign"
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer), window=32).save_pretrained(short)
    tokenizer.save_pretrained(short)
    tokenizer.add_tokens(["<new>"])
    tiny_llama(len(tokenizer)).save_pretrained(foreign)
    tokenizer.save_pretrained(foreign)
    thought = ek.load_run(runs / "one")
    settings = thought.manifest.settings.model_copy(update={"thinking": "on"})
    with pytest.raises(ValueError, match="score with thinking off"):
        divergence(Run(thought.manifest.model_copy(update={"settings": settings}), []), other_folder)
    for words, told in (
        ((runs / "ll", "--student", other_folder), "has no replies; score it with --mode both"),
        ((runs / "one", "--student", other_folder, "--task", "theirs"), "task 'theirs' is not in the run of"),
        ((runs / "one", "--student", other_folder, "--teacher", other_folder), "is not the model that was scored"),
        ((runs / "one", "--student", tiny_folder, "--student-run", runs / "two"), "is not the model that was scored"),
        ((runs / "one", "--student", other_folder, "--student-run", runs / "ll"), "their settings differ in modes"),
        ((runs / "one", "--student", foreign), "different tokenizers: their vocabularies (400 tokens against 401"),
        ((runs / "one", "--student", short), "and the student's window holds 32; score the run with fewer --shots"),
    ):
        done = in_process("divergence", *words, "--out", tmp_path / "out")
        assert done.returncode == 2, words
        assert told in " ".join(done.stderr.split()), done.stderr
        assert not (tmp_path / "out").exists()
