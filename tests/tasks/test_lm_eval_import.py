"""`evalkit import` against what lm-eval itself wrote and reported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evalkit
from evalkit.records import GENERATION, LOGLIKELIHOOD
from evalkit.store import read_run
from tests.tasks.lm_eval_cases import CASES, serve, yaml_of

pytestmark = [
    pytest.mark.usefixtures("lm_eval"),
    pytest.mark.filterwarnings("ignore:::lm_eval", "ignore:::datasets", "ignore:::multiprocess"),  # theirs, not ours
]
NAMES = ("arc_easy", "winogrande", "mmlu_anatomy", "agieval_aqua_rat", "triviaqa")


def lm_eval_run(model: Path, out: Path, names: tuple[str, ...] = NAMES, **options: Any) -> dict[str, Any]:
    """`lm_eval run --model hf --log_samples --output_path OUT`, a task at a time as the data are patched in."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    results: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        data = serve(patch)
        for name in names:
            data.clear()
            data[name] = CASES[name]
            tracker = EvaluationTracker(output_path=str(out))
            made = simple_evaluate(
                model="hf",
                model_args={"pretrained": str(model)},
                tasks=[yaml_of(CASES[name])],
                num_fewshot=1 if CASES[name].shots else None,
                gen_kwargs={"max_gen_toks": 8} if name == "triviaqa" else None,
                task_manager=TaskManager(include_defaults=False),
                batch_size=8,
                device="cpu",
                log_samples=True,
                bootstrap_iters=0,
                evaluation_tracker=tracker,
                **options,
            )
            samples = made.pop("samples")
            tracker.save_results_aggregated(results=made, samples=samples)
            for task, rows in samples.items():
                tracker.save_results_samples(task_name=task, samples=rows)
                results[task] = made["results"][task]
    return results


@pytest.fixture(scope="module")
def written(tiny_folder: Path, other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(lm-eval's folder of a teacher, of a student, the teacher's results)."""
    root = tmp_path_factory.mktemp("lm-eval")
    results = lm_eval_run(tiny_folder, root / "teacher")
    lm_eval_run(other_folder, root / "student")
    return root / "teacher", root / "student", results


@pytest.fixture
def copy(written: Any, tmp_path: Path) -> Path:
    """The teacher's folder, to be damaged."""
    return Path(shutil.copytree(written[0], tmp_path / "copy"))


def test_an_imported_run_has_lm_evals_accuracies_and_says_where_it_came_from(
    written: Any, tmp_path: Path, tiny_folder: Path
) -> None:
    teacher, _, results = written
    evalkit.import_run(teacher, out=tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert set(run.tasks) == {f"lm_eval:{name}" for name in NAMES}
    for name in NAMES:
        records = list(run.records(f"lm_eval:{name}").values())
        mode = GENERATION if name == "triviaqa" else LOGLIKELIHOOD
        found = [record.outcome(mode, "native") for record in records]
        right = sum(one is not None and one.outcome == "correct" for one in found) / len(found)
        entry = run.manifest.entry(f"lm_eval:{name}")
        metric = "exact_match,remove_whitespace" if mode == GENERATION else "acc,none"
        assert right == results[name]["acc_norm,none" if entry.normalisation == "character" else metric]
        assert entry.shots == int(CASES[name].shots)
    case = CASES["arc_easy"]
    first = next(iter(run.records("lm_eval:arc_easy").values()))
    assert first.choices == case.choices and first.gold == case.gold and first.prompts["native"].endswith(case.native)
    outcome = first.outcome(LOGLIKELIHOOD, "native")
    assert outcome is not None and outcome.characters == (4, 4, 5, 4)
    assert next(iter(run.records("lm_eval:agieval_aqua_rat").values())).also == (3,)
    manifest = run.manifest
    assert manifest.model.name == str(tiny_folder) and manifest.model.fingerprint.startswith("lm-eval ")
    assert "imported from lm-eval 0.4" in manifest.model.note and manifest.sessions[0]["imported_from"] == str(teacher)


def test_its_log_likelihoods_are_those_of_a_run_of_evalkits_own(written: Any, tiny_folder: Path) -> None:
    imported = evalkit.import_run(written[0], tasks=["arc_easy"])
    with pytest.MonkeyPatch.context() as patch:
        serve(patch)["arc_easy"] = CASES["arc_easy"]
        own = evalkit.run(
            str(tiny_folder), f"lm_eval:{yaml_of(CASES['arc_easy'])}", shots=1, mode="loglikelihood", device="cpu"
        )
    for item, record in own.records("lm_eval:arc_easy").items():
        one, two = (r.outcome(LOGLIKELIHOOD, "native") for r in (record, imported.records("lm_eval:arc_easy")[item]))
        assert one is not None and two is not None
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4) and one.characters == two.characters


def test_imported_runs_are_compared_and_shown(written: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from evalkit.commands import app

    def invoke(*arguments: object) -> str:
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        return done.output

    for folder in written[:2]:
        assert "which stored its name" in " ".join(invoke("import", folder, "--out", tmp_path / folder.name).split())
    both = evalkit.compare(tmp_path / "teacher", tmp_path / "student", out=tmp_path / "compare")
    assert set(both.tasks) == {f"lm_eval:{name}" for name in NAMES}
    assert both.gap("lm_eval:arc_easy", LOGLIKELIHOOD).n == 2
    with pytest.raises(ValueError, match="'generation' was not scored"):
        both.gap("lm_eval:arc_easy", GENERATION)
    invoke("compare", tmp_path / "teacher", tmp_path / "student", "--out", tmp_path / "c")
    assert all(f"lm_eval:{name}" in (tmp_path / "c" / "compare.md").read_text() for name in NAMES)
    assert "Which part of a plant" in invoke("show", tmp_path / "c", "--all", "--task", "lm_eval:arc_easy")
    told = json.loads(invoke("import", written[0], "--out", tmp_path / "one", "--tasks", "triviaqa", "--json"))
    assert [list(task["modes"]) for task in told["tasks"]] == [[GENERATION]]


def _newest(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[-1]


def no_samples(folder: Path) -> None:
    _newest(folder, "samples_arc_easy_*").unlink()


def cut_line(folder: Path) -> None:
    file = _newest(folder, "samples_arc_easy_*")
    file.write_text(file.read_text()[:-30])


def cut_results(folder: Path) -> None:
    file = _newest(folder, "results_*")
    file.write_text(file.read_text()[:-30])


def no_version(folder: Path) -> None:
    change(folder, lm_eval_version=None)


def other_version(folder: Path) -> None:
    change(folder, lm_eval_version="0.3.0")


def other_model(folder: Path) -> None:
    change(folder, model_name="someone-else/model")


def change(folder: Path, **fields: Any) -> None:
    file = _newest(folder, "results_*")
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def another_gold(folder: Path) -> None:
    file = _newest(folder, "samples_arc_easy_*")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "target": "E"}) + "\n" for row in rows))


def own_accuracy(folder: Path) -> None:
    file = _newest(folder, "samples_arc_easy_*")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "acc": 0.25}) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_samples, "run lm-eval again with --log_samples"),
        (cut_line, r"samples_arc_easy_.*line 2: damaged"),
        (cut_results, r"results_.*is damaged"),
        (no_version, "unknown version; 0.4 can be imported"),
        (other_version, "lm-eval 0.3.0; 0.4 can be imported"),
        (other_model, "two models: model_name is .* and 'someone-else/model'"),
        (nothing, r"no results_\*.json of lm-eval"),
        (another_gold, "document . of 'arc_easy': its target 'E' is none of the . choices"),
        (own_accuracy, "acc is 0.25, which is not that of the likeliest choice; leave the task out with --tasks"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=message) as caught:
        evalkit.import_run(copy)
    assert "\n" not in str(caught.value)


def test_of_a_task_scored_twice_the_newest_counts_and_unknown_names_are_told(copy: Path) -> None:
    old = _newest(copy, "samples_arc_easy_*")
    date = old.stem.removeprefix("samples_arc_easy_")
    for file, name in ((old, "samples_arc_easy_"), (old.with_name(f"results_{date}.json"), "results_")):
        shutil.copy(file, file.with_name(f"{name}1999-01-01T00-00-00{file.suffix}"))
    old.with_name("samples_arc_easy_1999-01-01T00-00-00.jsonl").write_text("{}\n")
    assert evalkit.import_run(copy, tasks=["arc_easy"]).tasks == ("lm_eval:arc_easy",)
    with pytest.raises(ValueError, match="has none of the tasks nosuch; it has agieval_aqua_rat, arc_easy"):
        evalkit.import_run(copy, tasks=["nosuch"])
    with pytest.raises(ValueError, match="does not exist"):
        evalkit.import_run(copy / "nowhere")


def test_an_old_runs_folder_is_not_written_over(written: Any, tmp_path: Path) -> None:
    evalkit.import_run(written[0], out=tmp_path / "run")
    with pytest.raises(ValueError, match="run is not empty; give the imported run another --out"):
        evalkit.import_run(written[0], out=tmp_path / "run")


def _written_by_hand(folder: Path, rows: list[dict[str, Any]], date: str = "2026", **results: Any) -> Path:
    """What lm-eval writes of one task of multiple choice, with ``rows``'s fields."""
    folder.mkdir(exist_ok=True)
    config = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    told = {"lm_eval_version": "0.4.9", "model_name": "m", "config": {}, "configs": {f"t{date}": config}, **results}
    (folder / f"results_{date}.json").write_text(json.dumps(told))
    lines = [{"doc_id": at, "resps": [], **row} for at, row in enumerate(rows)]
    (folder / f"samples_t{date}_{date}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _numbers(target: str, likeliest: int, joint: str = " ", **metrics: float) -> dict[str, Any]:
    """A document with the choices 1 to 4, and the likeliest of them."""
    sums = [-1.0 if at == likeliest else -2.0 for at in range(4)]
    asked = [["How many?", f"{joint}{number}"] for number in range(1, 5)]
    return {"target": target, "arguments": asked, "filtered_resps": [[s, False] for s in sums], **metrics}


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_a_gold_that_is_a_place_and_a_text_is_read_as_gives_the_logged_accuracies(tmp_path: Path, metric: str) -> None:
    for name, right in (("place", 1), ("text", 0)):
        rows = [_numbers("1", right, **{metric: 1.0}), _numbers("2", 3, **{metric: 0.0})]
        run = evalkit.import_run(_written_by_hand(tmp_path / name, rows))
        assert [record.gold for record in run.records("lm_eval:t2026").values()] == [right, right + 1]
    rows = [_numbers("1", 1, **{metric: 1.0}), _numbers("1", 0, **{metric: 1.0})]
    with pytest.raises(ValueError, match=f"document 1 of 't2026': lm-eval's {metric} is 1.0"):
        evalkit.import_run(_written_by_hand(tmp_path / "both", rows))


def test_documents_without_a_gold_are_left_out_and_a_chats_choices_begin_their_turn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [_numbers("1", 1, "", acc=1.0), _numbers("7", 1, "", acc=0.0)]
    run = evalkit.import_run(_written_by_hand(tmp_path / "a", rows, chat_template="{{x}}"))
    [record] = run.records("lm_eval:t2026").values()
    assert record.choices == ("1", "2", "3", "4") and "1 of 2 documents are left out" in caplog.text
    spaced = [_numbers("1", 1, " ", acc=1.0)]
    with pytest.raises(ValueError, match="asked in two ways: chat is True in samples_t2026.* and False in"):
        _written_by_hand(tmp_path / "a", spaced, "2027")
        evalkit.import_run(tmp_path / "a")


def test_what_needs_the_model_or_the_prompts_of_an_imported_run_is_refused_at_once(
    written: Any, tmp_path: Path
) -> None:
    from evalkit import api_reports
    from reports.audit import draw

    runs = [evalkit.import_run(folder, out=tmp_path / folder.name) for folder in written[:2]]
    one = evalkit.import_run(written[0], out=tmp_path / "one", tasks=["arc_easy"])
    refused = "was imported from lm-eval, so it can't be used"
    for use in (
        lambda: evalkit.compare(runs[0], "nothing"),
        lambda: evalkit.check("nothing", [tmp_path / "one"]),
        lambda: api_reports.score_again([tmp_path / "one"]),
        lambda: api_reports.rescore(runs[0], rules="strict"),
        lambda: api_reports.divergence(runs[0], "nothing"),
        lambda: api_reports.bridge(*runs),
    ):
        with pytest.raises(ValueError, match=refused):
            use()
    with pytest.raises(ValueError, match="has no generation outcomes, as its other tasks have"):
        evalkit.check(runs[1], [tmp_path / written[0].name])
    _, [verdict] = evalkit.check(one, [tmp_path / "one"])
    assert verdict.reasons == ("the primary generation was not scored",)
    sheet, key = draw(*runs, n=4)
    assert list(key["gaps"]) == ["lm_eval:triviaqa"] and sheet
