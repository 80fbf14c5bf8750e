"""`evalkit bench engine` on a tiny model: both sides are asked the same, and agree."""

import dataclasses
from typing import Any

import pytest
import torch

import tasks  # noqa: F401  (registers them)
from evalkit import bench_engine
from evalkit.bench_engine import Settings, bench, cells_of, failed, tables
from evalkit.records import LOGLIKELIHOOD
from models.bench.provenance import environment
from models.bench.render import Grid
from tests.models.benches import check_markdown
from tests.tiny import tiny_llama, tiny_tokenizer

SETTINGS = Settings(model="tiny", dtype="float32", repeats=2, max_tokens=4, batch_sizes=(1, 4))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer(chat=None)


def test_cells_are_the_tasks_own_prompts_and_answers(tokenizer: Any) -> None:
    scored, said, both = cells_of(["quick"], 0.05, None, tokenizer)
    assert [cell.kind for cell in (scored, said, both)] == ["loglikelihood", "generation", "both"]
    assert len(scored.texts) == len(said.texts) == 5
    assert all(answer.startswith(" ") for text in scored.texts for answer in text.answers)
    assert not any(text.answers for text in said.texts) and all(text.answers for text in both.texts)
    assert [text.prompt for text in said.texts] == [text.prompt for text in both.texts]
    with pytest.raises(ValueError, match="unknown mode 'LL' of quick: expected loglikelihood, generation, both"):
        cells_of(["quick:LL"], 1.0, None, tokenizer)


@pytest.mark.usefixtures("lm_eval")
@pytest.mark.filterwarnings("ignore:::lm_eval", "ignore:::datasets")
def test_both_sides_agree_and_every_pair_is_reported(tokenizer: Any) -> None:
    cells = cells_of(["quick"], 0.05, None, tokenizer)
    kept = []
    result = bench(
        SETTINGS, tiny_llama(len(tokenizer)), tokenizer, cells, environment(torch.device("cpu")),
        save=lambda one: kept.append(len(one["rows"])),
    )  # fmt: skip
    scored, said, both = result["rows"]
    assert kept == [1, 2, 3, 3] and result["complete"] and not failed(result)
    assert scored["largest_difference"] < 1e-4 and len(scored["speedups"]) == 2
    assert said["same_replies"] == 5 and len(said["lm_eval"]) == len(said["ours"]) == 2
    assert len(both["over_generation"]) == 2 and both["lm_eval"] == [] and len(both["generation"]) == 2
    assert scored["batch_size"] in (1, 4) and set(scored["batch_sizes"]) == {1, 4}
    for side in ("ours", "lm_eval"):
        assert all(one["seconds"] > 0 and one["items_per_s"] > 0 for one in scored[side])
    phases = said["ours"][0]["phases"]
    assert set(phases) == {"tokenise", "prefill", "choices", "decode", "other"}
    assert sum(phases.values()) == pytest.approx(said["ours"][0]["seconds"])
    check_markdown(result, bench_engine.TITLE, [Grid(*table) for table in tables(result)])
    scored["largest_difference"] = 0.1
    assert failed(result)


def test_an_unfinished_measurement_has_tables(tokenizer: Any) -> None:
    cells = [
        dataclasses.replace(cell, texts=cell.texts[:2]) for cell in cells_of(["quick:both"], 0.05, None, tokenizer)
    ]
    result = bench(SETTINGS, tiny_llama(len(tokenizer)), tokenizer, cells, {})
    against, both, phases = tables(result)
    assert against[2] == () and len(both[2]) == len(phases[2]) == 1
    assert LOGLIKELIHOOD not in str(both)
