"""Ranks of checkpoints against figures worked out by hand, and everything that can't be ranked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from evalkit.records import GENERATION, LOGLIKELIHOOD
from evalkit.stats.floors import deciding_clusters
from evalkit.store import Run
from reports.rank import Ranks
from reports.rank_markdown import rank_markdown, rank_table, sentence
from tests.reports.runs import run_of

N = 300


def right(share: float, n: int = N) -> list[bool]:
    """The first items are right: checkpoints are nested, so every pair differs in one direction."""
    return [i < share * n for i in range(n)]


def run(by_ll: float, by_gen: float, *, tasks: tuple[str, ...] = ("t",), n: int = N, **more: Any) -> Run:
    return run_of({task: (right(by_ll, n), right(by_gen, n)) for task in tasks}, **more)


def point(tokens: int, recipe: str = "r", seed: int = 0) -> dict[str, Any]:
    return {"recipe_sha256": recipe, "stage": "match", "tokens": tokens, "seed": seed}


def test_tau_is_scipys_and_a_reversal_is_named_with_both_tests() -> None:
    shares = [(0.4, 0.5), (0.55, 0.6), (0.7, 0.9), (0.9, 0.7)]
    made = Ranks([run(a, b, name=f"m{i}", fingerprint=str(i)) for i, (a, b) in enumerate(shares)])
    [task] = made.result["tasks"]
    found = task["rankings"]["raw"]
    assert found["tau"] == pytest.approx(stats.kendalltau(*zip(*shares, strict=True)).statistic)
    assert found["p"] is None, "four checkpoints"
    assert (task["pairs"]["all"], task["pairs"]["resolved"], task["pairs"]["agree"]) == (6, 6, 5)
    [reversal] = task["pairs"]["reversals"]
    assert (reversal["first"], reversal["second"], reversal["by_loglikelihood"]) == ("m2", "m3", "m3")
    assert reversal[LOGLIKELIHOOD]["difference"] == pytest.approx(-0.2)
    assert reversal[GENERATION]["difference"] == pytest.approx(0.2) and reversal[GENERATION]["holm_p"] < 1e-6
    text = made.to_markdown()
    assert "## Reversals" in text and "order 5 of them alike" in text


def test_six_independent_checkpoints_have_a_p_and_six_of_one_training_run_do_not() -> None:
    shares = np.linspace(0.4, 0.9, 6)
    apart = [run(s, s, fingerprint=str(i), checkpoint=point(100, seed=i)) for i, s in enumerate(shares)]
    along = [run(s, s, fingerprint=str(i), checkpoint=point(100 * i)) for i, s in enumerate(shares)]
    one, other = Ranks(apart).result, Ranks(along).result
    assert one["independent"] and one["overall"]["rankings"]["raw"]["p"] == pytest.approx(2 / 720)
    assert not other["independent"] and other["overall"]["rankings"]["raw"]["p"] is None
    assert one["overall"]["rankings"]["raw"]["within_budget"] == {"tau": pytest.approx(1.0), "pairs": 15}
    assert other["overall"]["rankings"]["raw"]["within_budget"] == {"tau": None, "pairs": 0}


def test_tau_is_told_on_the_items_that_did_not_decide_on_signal() -> None:
    """The modes agree on the items that decide and disagree on the others."""
    decides = np.array(deciding_clusters("t", [f"{i:05d}" for i in range(N)]))
    base = np.random.default_rng(0).random(N)
    runs = []
    for k, share in enumerate((0.5, 0.65, 0.8, 0.95)):
        by_gen = np.where(decides, base < share, base < 1.45 - share)
        runs.append(run_of({"t": ((base < share).tolist(), by_gen.tolist())}, name=f"m{k}", fingerprint=str(k)))
    result = Ranks(runs).result
    assert result["held_out"] == {"items": int((~decides).sum()), "tau": -1.0, "spearman": pytest.approx(-1.0)}
    assert "that did not decide which tasks carry signal, tau is -1.00" in sentence(result)
    few = Ranks([run(0.5, 0.6, n=30), run(0.8, 0.9, n=30, name="b", fingerprint="b")]).result
    assert few["held_out"] is None, "with so few all items decide"


def test_accuracy_along_training_is_told_in_order_of_tokens() -> None:
    runs = [run(a, b, checkpoint=point(t), fingerprint=str(t)) for a, b, t in ((0.9, 0.5, 2000), (0.6, 0.4, 1000))]
    text = Ranks(runs).to_markdown()
    assert "## Along training" in text
    assert text.index("| 1,000 | 60.0") < text.index("| 2,000 | 90.0")


def test_recipes_with_several_seeds_get_intervals_over_items_and_seeds() -> None:
    rng = np.random.default_rng(0)
    runs = []
    for recipe, share in (("slow", 0.6), ("fast", 0.7)):
        for seed in range(3):
            answers = [(rng.random(N) < share + 0.03 * (seed - 1)).tolist() for _ in range(2)]
            runs.append(run_of({"t": (answers[0], answers[1])}, checkpoint=point(500, recipe, seed)))
    [task] = Ranks(runs).result["tasks"]
    assert [row["seeds"] for row in task["recipes"]] == [3, 3]
    for row, at in zip(task["recipes"], (0, 3), strict=True):
        assert row["of"] == "this recipe (items x seeds)" and row[GENERATION]["seed_df"] == 4
        alone = [task["accuracy"][at + seed][GENERATION]["mean"] for seed in range(3)]
        assert row[GENERATION]["mean"] == pytest.approx(np.mean(alone))
    assert "## Recipes" in rank_markdown(Ranks(runs).result)
    assert Ranks(runs[::3]).result["tasks"][0]["recipes"] == [], "one seed each"


def test_the_normalisation_is_chosen_on_half_of_the_items_and_reported_on_the_other() -> None:
    made = Ranks([run(0.4, 0.5, fingerprint="a"), run(0.6, 0.7, fingerprint="b"), run(0.8, 0.9, fingerprint="c")])
    chosen = made.result["overall"]["chosen"]
    assert chosen["tau_reported"] == pytest.approx(1.0) and 0 < chosen["items"] < N
    assert "On one half of the items" in sentence(made.result)


def test_overall_averages_tasks_with_signal_only() -> None:
    def both(a: float, b: float, **more: Any) -> Run:
        return run_of({"t": (right(a), right(a)), "u": (right(b), right(b)), "floor": (right(0.2), right(0.2))}, **more)

    made = Ranks([both(0.5, 0.9, fingerprint="a"), both(0.7, 0.8, fingerprint="b")])
    assert made.result["overall"]["tasks"] == ["t", "u"]
    assert made.result["overall"]["rankings"]["primary"]["loglikelihood"] == pytest.approx([0.7, 0.75])
    assert "floor: no checkpoint is above the floor in both modes" in " ".join(made.result["notes"])
    assert "∅" in made.to_markdown()


def test_copies_of_one_checkpoint_have_no_ranking() -> None:
    made = Ranks([run(0.6, 0.5), run(0.6, 0.5)])
    assert made.result["overall"]["rankings"]["raw"]["tau"] is None
    assert "there is no ranking" in sentence(made.result)
    assert [found["label"] for found in made.result["checkpoints"]] == ["m (1)", "m (2)"]


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        (lambda: [run(0.5, 0.5)], "rank needs at least 2 runs and got 1 (m)"),
        (lambda: [run(0.5, 0.5), run(0.5, 0.5, tasks=("u",))], "no task in common: t; u"),
        (lambda: [run(0.5, 0.5), run(0.5, 0.5, rules="strict")], "rules ('lenient' against 'strict')"),
        (lambda: [run(0.5, 0.5), run(0.5, 0.5, modes=("loglikelihood",))], "was not scored by generation"),
        (lambda: [run(0.5, 0.5), run(0.5, 0.5, checkpoint={"tokens": "many"})], "checkpoint's 'tokens' is 'many'"),
    ],
)
def test_what_cannot_be_ranked_is_said(runs: Any, told: str) -> None:
    with pytest.raises(ValueError) as error:
        Ranks(runs())
    assert told in str(error.value)


def test_runs_without_a_common_item_are_refused() -> None:
    one, other = run(0.5, 0.5, n=100), run(0.5, 0.5, n=200)
    late = Run(other.manifest, [r for key, r in other.records("t").items() if key >= "00100"])
    with pytest.raises(ValueError, match="no item in common"):
        Ranks([one, late])
    with pytest.raises(ValueError, match="task 'x' is not in all runs; these are: t"):
        Ranks([one, one], ["x"])


def test_json_and_markdown_are_written_whole(tmp_path: Path) -> None:
    made = Ranks([run(a, a - 0.1, fingerprint=str(a)) for a in (0.4, 0.6, 0.8)])
    made.save(tmp_path)
    assert json.loads((tmp_path / "rank.json").read_text()) == json.loads(json.dumps(made.result))
    text = (tmp_path / "rank.md").read_text()
    assert text == rank_markdown(made.result) and "Within budget" in text
    assert rank_table(made.result).row_count == 10  # five normalisations, of the task and overall


def test_ten_checkpoints_on_ten_tasks_of_a_thousand_items_are_ranked(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    ability = np.linspace(0.4, 0.8, 10)
    runs = []
    for at, share in enumerate(ability):
        answers = {
            f"t{task}": ((rng.random(1000) < share).tolist(), (rng.random(1000) < share - 0.1).tolist())
            for task in range(10)
        }
        runs.append(run_of(answers, name=f"m{at}", fingerprint=str(at)))
    overall = Ranks(runs).result["overall"]
    found = overall["rankings"]["primary"]
    assert len(overall["tasks"]) == 10 and found["tau"] > 0.9
    assert found["tau"] >= found["ceiling"]["low"] and found["p"] < 0.001
    assert overall["pairs"]["agree"] == overall["pairs"]["resolved"] > 30 and not overall["pairs"]["reversals"]
