"""Built-in deltas: a name is a folder of ours, its teacher another built-in, and what is missing is said."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import models.builtin
from models.builtin import BUILTIN
from models.convert import convert
from models.delta import save_delta
from models.load import Loaded, load, resolve
from tests.models.hybrids import tiny_teacher
from tests.models.test_delta import same_weights, saved

SFT, KDA = "smollm2-135m-sft", "smollm2-135m-kda"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """A tiny model in the place of smollm2-135m; our checkpoints' folder is an empty one."""
    saved(tiny_teacher("llama", vocab_size=400), tmp_path / "base")
    monkeypatch.setitem(BUILTIN, "smollm2-135m", lambda: tmp_path / "base")
    monkeypatch.setattr(models.builtin, "CHECKPOINTS", tmp_path / "checkpoints")
    return load("smollm2-135m")


@pytest.fixture
def sft(base: Loaded, tmp_path: Path) -> Any:
    model = tiny_teacher("llama", vocab_size=400)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 0.1
    save_delta(model, base, tmp_path / "checkpoints" / SFT, note={"note": "fine-tuned"})
    return model


@pytest.fixture
def kda(sft: Any, tmp_path: Path) -> Any:
    teacher = load(SFT)
    student = convert(teacher.model, [1])
    save_delta(student, teacher, tmp_path / "checkpoints" / KDA, encoding={"*.kda.*": "int8"})
    return student


def test_a_chain_of_built_in_deltas_loads_by_name(base: Loaded, sft: Any, kda: Any, tmp_path: Path) -> None:
    assert same_weights(load(SFT).model, sft)
    found = load(KDA)
    assert found.name == KDA and found.model.config.kda_layers == [0, 2]
    assert torch.equal(found.model.model.layers[1].mlp.up_proj.weight, sft.model.layers[1].mlp.up_proj.weight)
    assert (load(SFT).checkpoint or {})["note"] == "fine-tuned"
    for name, teacher in ((SFT, "smollm2-135m"), (KDA, SFT)):
        assert resolve(name) == str(tmp_path / "checkpoints" / name)
        told = json.loads((tmp_path / "checkpoints" / name / "delta.json").read_text())
        assert told["teacher"] == teacher and told["teacher_weights"] == load(teacher).parts["weights"]
        assert load(name).identity == load(str(tmp_path / "checkpoints" / name)).identity
    assert load(KDA, dtype="bfloat16").dtype == "bfloat16"


def test_a_built_in_teacher_with_other_weights_is_refused(kda: Any, base: Loaded, tmp_path: Path) -> None:
    other = tiny_teacher("llama", vocab_size=400)
    save_delta(other, base, tmp_path / "checkpoints" / SFT)
    with pytest.raises(ValueError, match=f"is of a teacher with the weights .* but those of {SFT} are"):
        load(KDA)


def test_a_delta_of_a_built_in_delta_does_not_replace_it(sft: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is the teacher's own folder"):
        save_delta(sft, load(SFT), tmp_path / "checkpoints" / SFT)


def test_a_built_in_delta_that_names_itself_is_refused(sft: Any, tmp_path: Path) -> None:
    file = tmp_path / "checkpoints" / SFT / "delta.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "teacher": SFT}))
    with pytest.raises(ValueError, match="has itself as its teacher"):
        load(SFT)


@pytest.mark.parametrize("name", [SFT, KDA])
def test_an_absent_checkpoint_is_told_with_its_place(name: str, base: Loaded, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"'{name}' .* lacks: there is no .*{name}/delta.json; reinstall evalkit, or"):
        load(name)


def test_a_student_whose_built_in_teacher_is_absent_says_so(kda: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / SFT).rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=f"the teacher '{SFT}' of the delta .* could not be loaded: the built-in model"
    ):
        load(KDA)
    assert load(KDA, teacher=str(tmp_path / "elsewhere")).model.config.kda_layers == [0, 2]


@pytest.mark.parametrize(
    ("name", "near"), [("smollm2-135m-stf", SFT), ("smollm2_135m_kda", KDA), ("smollm2-135", "smollm2-135m")]
)
def test_a_wrong_name_is_told_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean the built-in '{near}'"):
        resolve(name)


def test_the_checkpoints_lie_beside_the_distiller_which_is_not_imported() -> None:
    code = (
        "import sys, models.builtin, importlib.util as u\n"
        "assert not any(name.partition('.')[0] == 'distill' for name in sys.modules)\n"
        "print(models.builtin.CHECKPOINTS.parent, u.find_spec('distill').submodule_search_locations[0], sep='\\n')"
    )
    ours, theirs = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    ).stdout.splitlines()
    assert Path(ours) == Path(theirs)
