"""Recipes: what is shipped is valid, what is wrong is named with its place and the nearest key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.recipe import changed, differences, parse, read_recipe, recipes, sha256
from distill.stage import Recipe


def content(**other: Any) -> dict[str, Any]:
    stage = {"name": "one", "loss": "ce", "train": ["all"], "data": "d", "tokens": "2k", "seq_len": 16, "batch": 2}
    return {"name": "r", "teacher": "t", "data": {"d": [{"text": ["own"]}]}, "stages": [{**stage, "lr": 1e-3}], **other}


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_shipped_recipe_is_valid(name: str) -> None:
    assert read_recipe(name).name == name


def test_the_paper_s_recipe_has_its_stages_and_tokens() -> None:
    stages = read_recipe("qwen3-0.6b-paper").stages
    assert [(one.name, one.tokens) for one in stages] == [
        ("align-qk", 30_000_000),
        ("align-block", 30_000_000),
        ("distill", 500_000_000),
        ("instruct", 250_000_000),
    ]
    assert stages[3].mask == "completion-eos" and stages[2].final_lr == 0.02


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stage": []}, "unknown key stage: did you mean 'stages'"),
        ({"stages": []}, "stages is empty"),
        ({"student": {"kep": "all"}}, "unknown key student.kep: did you mean 'keep'"),
        ({"student": {"lora": {"rnk": 1}}}, "unknown key student.lora.rnk: did you mean 'rank'"),
        ({"data": {"d": []}}, "the mixture 'd' is empty"),
        ({"data": {"e": [{"text": ["own"]}]}}, "stage 'one' takes the mixture 'd': expected one of e"),
        ({"data": {"d": [{"text": ["own"], "chat": ["own"]}]}}, "has text and chat of text, chat, hub, task"),
        ({"data": {"d": [{"task": "gsm8k"}]}}, "names no views"),
        ({"teacher": 3}, "teacher is 3"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse({**content(), **change})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lrate": 1}, "unknown key stages.one.lrate: did you mean 'lr'"),
        ({"lr": 0}, "stages.one.lr is 0"),
        ({"loss": "forwrd-kl"}, "stages.one.loss is 'forwrd-kl'"),
        ({"loss": "align-block", "train": ["mlp"]}, "align-block reaches the mixers alone, but mlp"),
        ({"loss": "align-qk", "train": ["q", "v"]}, "align-qk gives a gradient to q, k and conv alone"),
        ({"train": ["lora"]}, "trains lora, but the student has none"),
    ],
)
def test_what_is_wrong_in_a_stage_is_named(change: dict[str, Any], says: str) -> None:
    made = content()
    made["stages"][0].update(change)
    with pytest.raises(ValueError, match=says):
        parse(made)


def test_a_missing_key_is_named() -> None:
    made = content()
    del made["stages"][0]["lr"]
    with pytest.raises(ValueError, match=r"stages\.one\.lr is missing"):
        parse(made)


def test_tokens_are_read_as_people_write_them_and_steps_reach_them() -> None:
    [stage] = parse(content()).stages
    assert (stage.tokens, stage.steps) == (2000, 63)  # 63 x 32 = 2016
    made = changed(content(), ["stages.one.tokens=1.5M"])
    assert parse(made).stages[0].tokens == 1_500_000


def test_changes_are_made_by_path_and_a_stage_s_name() -> None:
    made = changed(content(), ["seed=3", "stages.one.lr=2e-3", "student.keep=uniform:8", "stages.0.mask=completion"])
    recipe = parse(made)
    assert (recipe.seed, recipe.stages[0].mask, recipe.student.keep) == (3, "completion", "uniform:8")
    assert recipe.stages[0].lr == 2e-3
    assert changed(content(), ["stages.one={name: two}"])["stages"] == [{"name": "two"}]


@pytest.mark.parametrize("change", ["seed", "=3", "stages.two.lr=1", "name.x=1"])
def test_a_change_that_fits_nothing_is_refused(change: str) -> None:
    with pytest.raises(ValueError, match="--set"):
        changed(content(), [change])


def test_a_recipe_s_key_named_on_is_no_boolean(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content()) + "student: {mixer: same, lora: {on: [mlp]}}\n", encoding="utf-8")
    recipe = read_recipe(str(file))
    assert recipe.student.lora is not None and recipe.student.lora.on == ("mlp",)


def test_an_unknown_recipe_and_a_file_that_is_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no recipe 'smoked': did you mean 'smoke'"):
        read_recipe("smoked")
    for text, says in (("a: [", "is not YAML"), ("- a", "holds list"), ("\x00", "is not YAML")):
        file = tmp_path / "bad.yaml"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=says):
            read_recipe(str(file))


def test_the_hash_is_of_all_but_the_seed() -> None:
    first: Recipe = parse(content())
    assert sha256(first) == sha256(parse(content(seed=7)))
    assert sha256(first) != sha256(parse(content(dtype="float32")))


def test_differences_name_keys_old_and_new() -> None:
    before, after = (parse(changed(content(), one)).model_dump(mode="json") for one in ([], ["stages.one.lr=0.5"]))
    assert differences(before, after) == ["stages.one.lr (0.001, now 0.5)"]
    assert differences(before, before) == []
