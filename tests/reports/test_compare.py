"""The comparison against figures worked out by hand, and its reports against the comparison."""

import itertools
import json
import random
from pathlib import Path

import pytest

from evalkit.records import GENERATION, LOGLIKELIHOOD, VERDICTS, ItemRecord, Outcome, TaskEntry, Verdict
from evalkit.settings import Settings
from evalkit.stats.intervals import tango, wilson
from evalkit.store import Manifest, Model, Run
from reports.compare import Comparison
from reports.markdown import compare_markdown
from reports.table import terminal_table


def make_run(
    rows: list[dict[str, Verdict]],
    *,
    name: str = "m",
    views: tuple[str, str] = ("cloze", "cloze"),
    task: str = "t",
    clusters: list[str] | None = None,
    **settings: object,
) -> Run:
    """A run of one task; each row gives the outcome of every scored view: {"cloze": ..., "GEN": ...}."""
    records = []
    for i, row in enumerate(rows):
        outcomes = [
            Outcome(
                mode=LOGLIKELIHOOD,
                view=view,
                outcome=verdict,
                choice=0 if verdict == "correct" else 1,
                logprobs=(-1.0, -2.0) if verdict == "correct" else (-2.0, -1.0),
                tokens=(1, 1),
                characters=(1, 1),
                bytes=(1, 1),
                blind=(-1.0, -2.0) if i % 2 else (-2.0, -1.0),
            )
            for view, verdict in row.items()
            if view != "GEN"
        ]
        if "GEN" in row:
            outcomes.append(Outcome(mode=GENERATION, view=views[1], outcome=row["GEN"], reply="<b>x|y</b>", answer="x"))
        records.append(
            ItemRecord(
                task=task,
                version="1",
                item=f"{i:04d}",
                prompt_sha256="h",
                gold=i % 2,
                choices=("a", "b"),
                cluster=clusters[i] if clusters else f"{i:04d}",
                outcomes=tuple(outcomes),
            )
        )
    entry = TaskEntry(
        name=task,
        version="1",
        loglikelihood=views[0],
        generation=views[1],
        normalisation="raw",
        shots=0,
        n=len(rows),
        listed=True,
    )
    modes = tuple(m for m in (LOGLIKELIHOOD, GENERATION) if m == LOGLIKELIHOOD or "GEN" in rows[0])
    manifest = Manifest(
        model=Model(name=name, fingerprint="f"),
        settings=Settings(modes=modes, **settings),  # type: ignore[arg-type]
        tasks=(entry,),
        complete=True,
    )
    return Run(manifest, records)


def repeated(*counts: tuple[int, dict[str, Verdict]]) -> list[dict[str, Verdict]]:
    return list(itertools.chain.from_iterable([row] * n for n, row in counts))


RIGHT: dict[str, Verdict] = {"cloze": "correct", "GEN": "correct"}


def test_hidden_gap_is_generation_gap_minus_loglikelihood_gap() -> None:
    teacher = make_run(repeated((90, RIGHT), (10, {"cloze": "wrong", "GEN": "wrong"})), name="teacher")
    student = make_run(
        repeated((60, RIGHT), (25, {"cloze": "correct", "GEN": "unparsed"}), (15, {"cloze": "wrong", "GEN": "empty"})),
        name="student",
    )
    made = Comparison(teacher, student)
    assert made.gap("t", LOGLIKELIHOOD).mean == pytest.approx(0.90 - 0.85)
    assert made.gap("t", GENERATION).mean == pytest.approx(0.90 - 0.60)
    assert made.hidden_gap("t").mean == pytest.approx(0.25)
    [task] = made.result["tasks"]
    assert task["hidden_gap"]["mean"] == pytest.approx(0.25) and task["protocol_gap"] is None
    assert task["signal"] == {"loglikelihood": True, "generation": True}
    cell = task["modes"]["generation"]
    assert cell["student"]["outcomes"] == {**dict.fromkeys(VERDICTS, 0), "correct": 60, "unparsed": 25, "empty": 15}
    assert cell["student"]["parsed"]["accuracy"] == 1.0
    expected = tango(30, 0, 100)
    assert cell["gap"]["ci95"] == [expected.low, expected.high]
    assert cell["teacher"]["ci95"] == [wilson(90, 100).low, wilson(90, 100).high]
    assert made.result["overall"]["hidden_gap"]["mean"] == pytest.approx(0.25)


def test_modes_in_two_views_give_a_protocol_gap_that_is_the_sum_of_its_parts() -> None:
    rng = random.Random(0)
    kinds: tuple[Verdict, ...] = ("correct", "wrong")

    def rows() -> list[dict[str, Verdict]]:
        return [{key: rng.choice(kinds) for key in ("cloze", "letters", "GEN")} for _ in range(200)]

    made = Comparison(make_run(rows(), views=("cloze", "letters")), make_run(rows(), views=("cloze", "letters")))
    [task] = made.result["tasks"]
    protocol = task["protocol_gap"]
    assert task["hidden_gap"] is None
    assert protocol["mean"] == pytest.approx(protocol["parts"]["mode"]["mean"] + protocol["parts"]["view"]["mean"])
    gaps = [task["modes"][mode]["gap"]["mean"] for mode in (GENERATION, LOGLIKELIHOOD)]
    assert protocol["mean"] == pytest.approx(gaps[0] - gaps[1])
    assert made.hidden_gap("t").mean == protocol["parts"]["mode"]["mean"], "the same view's part"


def test_outcomes_sum_to_n_whatever_they_are() -> None:
    rng = random.Random(1)
    rows = [{"cloze": rng.choice(VERDICTS), "GEN": rng.choice(VERDICTS)} for _ in range(300)]
    made = Comparison(make_run(rows), make_run(rows[::-1]))
    for cell in made.result["tasks"][0]["modes"].values():
        for who in ("teacher", "student"):
            assert sum(cell[who]["outcomes"].values()) == 300


def test_a_teacher_at_the_floor_carries_no_signal_and_is_left_out() -> None:
    half = repeated((52, RIGHT), (48, {"cloze": "wrong", "GEN": "wrong"}))
    made = Comparison(make_run(half), make_run(half))
    assert made.result["tasks"][0]["signal"] == {"loglikelihood": False, "generation": False}
    assert made.result["overall"]["tasks"] == [] and made.result["overall"]["left_out"] == ["t"]
    assert "No task carries signal" in made.to_markdown() and "∅" in made.to_markdown()


def test_clusters_widen_the_interval() -> None:
    teacher = repeated((100, RIGHT))
    student = repeated((70, RIGHT), (30, {"cloze": "correct", "GEN": "wrong"}))
    clusters = [str(i // 10) for i in range(100)]
    alone = Comparison(make_run(teacher), make_run(student)).hidden_gap("t")
    together = Comparison(make_run(teacher, clusters=clusters), make_run(student, clusters=clusters)).hidden_gap("t")
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_flips_count_both_directions() -> None:
    teacher = repeated((3, RIGHT), (1, {"cloze": "wrong", "GEN": "wrong"}))
    student = repeated((1, RIGHT), (2, {"cloze": "correct", "GEN": "wrong"}), (1, {"cloze": "wrong", "GEN": "correct"}))
    rows = Comparison(make_run(teacher), make_run(student)).flips()
    [row] = [row for row in rows if row["mode"] == GENERATION]
    assert (row["lost"], row["gained"], row["volume"]) == (2, 1, 0.75)
    assert row["direction"] == pytest.approx(1 / 3)


def test_items_join_both_models_and_modes() -> None:
    made = Comparison(make_run(repeated((4, RIGHT))), make_run(repeated((4, {"cloze": "correct", "GEN": "wrong"}))))
    pandas = pytest.importorskip("pandas")
    frame = made.items.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 4
    assert set(frame["student_generation"]) == {"wrong"} and set(frame["teacher_loglikelihood"]) == {"correct"}


def test_only_what_was_asked_alike_is_compared() -> None:
    run = make_run(repeated((4, RIGHT)))
    with pytest.raises(ValueError, match=r"settings differ in chat \(False against True\)"):
        Comparison(run, make_run(repeated((4, RIGHT)), chat=True))
    with pytest.raises(ValueError, match="no task in common"):
        Comparison(run, make_run(repeated((4, RIGHT)), task="u"))
    with pytest.raises(ValueError, match="its loglikelihood is 'cloze'"):
        Comparison(run, make_run([{"open": "correct", "GEN": "correct"}] * 4, views=("open", "cloze")))


def test_items_of_one_run_only_are_left_out_and_said() -> None:
    made = Comparison(make_run(repeated((6, RIGHT))), make_run(repeated((4, RIGHT))))
    assert made.result["tasks"][0]["n"] == 4
    assert "2 items are in one run only" in made.to_markdown()


def test_one_mode_alone_has_no_gap_between_modes() -> None:
    rows: list[dict[str, Verdict]] = [{"cloze": "correct"}] * 30
    made = Comparison(make_run(rows), make_run(rows))
    assert list(made.result["tasks"][0]["modes"]) == [LOGLIKELIHOOD]
    assert made.result["tasks"][0]["hidden_gap"] is None
    assert "Student against teacher by log-likelihood" in made.to_markdown()
    with pytest.raises(ValueError, match="no hidden gap"):
        made.hidden_gap("t")


def test_the_report_says_what_the_json_says(tmp_path: Path) -> None:
    made = Comparison(
        make_run(repeated((80, RIGHT), (20, {"cloze": "wrong", "GEN": "wrong"})), name="a|b<script>"),
        make_run(repeated((50, RIGHT), (50, {"cloze": "correct", "GEN": "truncated"}))),
    )
    made.save(tmp_path)
    result = json.loads((tmp_path / "compare.json").read_text())
    assert result == json.loads(json.dumps(made.result))
    text = (tmp_path / "compare.md").read_text()
    assert text == compare_markdown(result)
    for value in ("+30.0", "-20.0", "+50.0", "80.0"):
        assert value in text
    assert "<script>" not in text and "a\\|b" in text
    assert all(line.count("|") >= 2 for line in text.splitlines() if line.startswith("|"))
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 100


@pytest.mark.parametrize("width", [80, 160])
def test_the_terminal_table_cuts_no_figure(width: int) -> None:
    from rich.console import Console

    made = Comparison(
        make_run(repeated((80, RIGHT), (20, {"cloze": "wrong", "GEN": "wrong"}))), make_run(repeated((100, RIGHT)))
    )
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(made.result, width))
    text = console.export_text()
    console.file.close()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    for figure in ("80.0", "100.0", "-20.0"):
        assert figure in text


def test_each_kind_of_gap_speaks_of_its_own_tasks() -> None:
    one = make_run(repeated((95, RIGHT), (5, {"cloze": "wrong", "GEN": "wrong"})), task="one")
    rows = repeated(
        (95, {"cloze": "correct", "letters": "correct", "GEN": "correct"}),
        (5, {"cloze": "wrong", "letters": "wrong", "GEN": "wrong"}),
    )
    lost = repeated(
        (55, {"cloze": "correct", "letters": "correct", "GEN": "correct"}),
        (40, {"cloze": "correct", "letters": "correct", "GEN": "wrong"}),
        (5, {"cloze": "wrong", "letters": "wrong", "GEN": "wrong"}),
    )
    two, two_lost = (make_run(r, task="two", views=("cloze", "letters")) for r in (rows, lost))

    def both(a: Run, b: Run) -> Run:
        manifest = a.manifest.model_copy(update={"tasks": (*a.manifest.tasks, *b.manifest.tasks)})
        return Run(manifest, [*a.records("one").values(), *b.records("two").values()])

    made = Comparison(both(one, two), both(one, two_lost))
    overall = made.result["overall"]
    assert overall["hidden_gap"]["tasks"] == ["one"] and overall["hidden_gap"]["mean"] == 0
    assert overall["protocol_gap"]["tasks"] == ["two"] and overall["protocol_gap"]["mean"] == pytest.approx(0.4)
    text = made.to_markdown()
    assert "over 1 task (one), so a hidden gap of +0.0" in text
    assert "over 1 task (two), so a protocol gap of +40.0" in text


def test_one_task_overall_says_what_its_row_says() -> None:
    made = Comparison(
        make_run(repeated((100, RIGHT))), make_run(repeated((97, RIGHT), (3, {"cloze": "correct", "GEN": "wrong"})))
    )
    [task], overall = made.result["tasks"], made.result["overall"]
    for mode in (LOGLIKELIHOOD, GENERATION):
        assert overall["modes"][mode]["gap"] == task["modes"][mode]["gap"]
        assert overall["modes"][mode]["teacher"]["ci95"] == task["modes"][mode]["teacher"]["ci95"]
    assert overall["hidden_gap"]["ci95"] == task["hidden_gap"]["ci95"]


def test_every_normalisation_is_reported_from_one_pass() -> None:
    made = Comparison(make_run(repeated((20, RIGHT))), make_run(repeated((20, RIGHT))))
    cell = made.result["tasks"][0]["modes"][LOGLIKELIHOOD]
    assert set(cell["normalisations"]) == {"raw", "token", "character", "byte", "pmi"}
    # By hand: scores (-1, -2), gold alternates, so raw is right on every other item.
    assert cell["normalisations"]["raw"] == {"teacher": 0.5, "student": 0.5}
