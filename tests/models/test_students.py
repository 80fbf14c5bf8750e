"""`evalkit convert`: text, the student's folder, its note, and the probe on its way into the reports."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import evalkit
from evalkit.cli import app
from models import students
from models.load import load
from models.students import make_student
from models.text import OWN_TEXT, batches, read_texts
from tests.tiny import tiny_tokenizer


def test_our_own_text_is_short_and_its_halves_share_nothing() -> None:
    assert OWN_TEXT.stat().st_size <= 20_000
    tokenizer = tiny_tokenizer()
    data = batches(tokenizer)
    assert data.source == "evalkit's own text"
    ids = tokenizer(OWN_TEXT.read_text(encoding="utf-8")).input_ids
    found = [row.tolist() for half in (data.calibration, data.probe) for row in half]
    assert data.calibration.shape == data.probe.shape and data.probe.shape[1] <= 512
    flat = [token for row in found[: len(data.calibration)] for token in row]
    assert flat == ids[: len(flat)], "rows follow each other"
    half = (len(ids) + 1) // 2
    assert found[len(data.calibration)] == ids[half : half + data.probe.shape[1]], (
        "the probe begins after the first half"
    )


def test_rows_fit_the_window_and_begin_as_the_tokenizer_begins() -> None:
    data = batches(tiny_tokenizer(bos=True), window=100)
    assert data.calibration.shape == (4, 100)
    assert set(data.calibration[:, 0].tolist()) == set(data.probe[:, 0].tolist()) == {0}


def test_a_users_text_is_read_from_txt_and_jsonl(tmp_path: Path) -> None:
    lines = json.dumps({"text": "one\ntwo"}) + "\n\n" + json.dumps({"text": "three", "more": 1}) + "\n"
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    assert read_texts(tmp_path / "a.jsonl") == read_texts(tmp_path / "a.jsonl.gz") == ["one\ntwo", "three"]
    assert read_texts(tmp_path / "a.txt") == ["one\n\ntwo"]
    tokenizer = tiny_tokenizer()
    (tmp_path / "long.jsonl").write_text((json.dumps({"text": "a dog barks " * 30}) + "\n") * 2, encoding="utf-8")
    data = batches(tokenizer, tmp_path / "long.jsonl")
    assert data.source == "long.jsonl" and int((data.calibration == tokenizer.eos_token_id).sum()) == 1


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"\xff\xfe\x00", "can't be read"),
        ("a.jsonl", b'{"text": 1}\n', 'a.jsonl, line 1 has no "text"'),
        ("a.jsonl", b'{"text": "x"}\n{"text\n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl.gz", b"no gzip", "can't be read"),
        ("a.txt", b"short", "has 5 tokens: expected at least 64"),
    ],
)
def test_text_that_does_not_serve_is_named(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told):
        batches(tiny_tokenizer(), tmp_path / name)
    with pytest.raises(ValueError, match="there is no text file"):
        batches(tiny_tokenizer(), tmp_path / "nothing.txt")


@pytest.mark.parametrize("delta", [False, True])
def test_a_student_is_made_and_loads_by_its_folder(delta: bool, tiny_folder: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    note = make_student(
        str(tiny_folder), tmp_path / "student", keep="0", delta=delta, report=lambda *step: steps.append(step)
    )
    assert steps == [("calibrate", 1, 1), ("probe", 1, 1)]
    teacher, student = load(str(tiny_folder)), load(str(tmp_path / "student"))
    assert student.checkpoint == note
    assert note["teacher_fingerprint"] == teacher.identity
    assert note["keep"] == [0] and note["probe"]["layers"][0]["layer"] == 1
    assert note["kda"] == {"gate": "bounded", "conv_size": 4, "output_gate": True, "rope": False}
    assert "attention kept in 1 of 2 layers (0)" in note["note"]
    assert student.model.config.layer_types == ["full_attention", "linear_attention"]
    assert {name: student.parts[name] for name in ("tokenizer", "end_tokens", "chat_template")} == {
        name: teacher.parts[name] for name in ("tokenizer", "end_tokens", "chat_template")
    }
    ids = torch.tensor([teacher.tokenizer("Which animal barks?").input_ids])
    assert student.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1).shape[1] <= ids.shape[1] + 4
    assert (tmp_path / "student" / "tokenizer.json").is_file() != delta, "a delta's tokenizer is its teacher's"


def test_the_delta_is_the_student_itself(tiny_folder: Path, tmp_path: Path) -> None:
    for delta in (False, True):
        make_student(str(tiny_folder), tmp_path / f"student{delta:d}", keep="none", delta=delta)
    whole, small = load(str(tmp_path / "student0")), load(str(tmp_path / "student1"))
    assert whole.identity == small.identity
    sizes = [sum(f.stat().st_size for f in (tmp_path / f"student{n}").glob("*.safetensors")) for n in (0, 1)]
    assert sizes[1] < sizes[0] / 2
    assert small.checkpoint and small.checkpoint["delta"]["teacher_weights"] == load(str(tiny_folder)).parts["weights"]


def test_only_an_earlier_conversion_is_overwritten(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "student"
    make_student(str(tiny_folder), out, keep="0")
    (out / "left over").write_text("")
    make_student(str(tiny_folder), out, keep="1")
    assert load(str(out)).checkpoint["keep"] == [1]  # type: ignore[index]
    assert not (out / "left over").exists()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(students.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        make_student(str(tiny_folder), out, keep="0")
    monkeypatch.undo()
    assert load(str(out)).checkpoint["keep"] == [1], "the earlier one is intact"  # type: ignore[index]
    assert [file.name for file in tmp_path.iterdir()] == ["student"], "nothing half-written is left"


def test_folders_that_hold_something_else_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no earlier conversion: give another --out"):
        make_student(str(tiny_folder), tmp_path)
    with pytest.raises(ValueError, match="is a file: give another --out"):
        make_student(str(tiny_folder), tmp_path / "thesis.txt")
    with pytest.raises(ValueError, match="is the teacher's own folder"):
        make_student(str(tiny_folder), tiny_folder)
    with pytest.raises(ValueError, match="teacher is an empty name"):
        make_student(" ", tmp_path / "student")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_command_shows_the_probe_and_the_comparison_repeats_it(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    done = CliRunner().invoke(app, ["convert", str(tiny_folder), "--keep", "0", "--out", str(out)])
    assert done.exit_code == 0, done.output
    note = json.loads((out / "evalkit.json").read_text())
    [layer] = note["probe"]["layers"]
    assert f"{layer['cosine']:.3f}" in done.stdout and "KL from the teacher" in done.stdout
    made = evalkit.compare(str(tiny_folder), str(out), ["quick"], limit=3, max_tokens=4)
    assert made.result["student"]["probe"] == note["probe"]
    assert "probe" not in made.result["teacher"]
    report = made.to_markdown()
    assert "## Layer probe" in report
    assert f"| 1 | {layer['cosine']:.3f} | {layer['relative_error']:.3f} |" in report
    assert f"{note['probe']['kl_nats']:.3f} nats a token" in report


def test_the_command_prints_json_and_takes_every_option(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("The capital of France is Paris. " * 40)
    words = ["--keep", "none", "--gate", "softplus", "--conv-size", "3", "--no-output-gate", "--rope", "--delta"]
    more = ["--text", str(tmp_path / "own.txt"), "--dtype", "bfloat16", "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, ["convert", str(tiny_folder), "--out", str(tmp_path / "s"), *words, *more])
    assert done.exit_code == 0, done.output
    note = json.loads(done.stdout)
    assert note["kda"] == {"gate": "softplus", "conv_size": 3, "output_gate": False, "rope": True}
    assert note["probe"]["text"] == "own.txt" and len(note["probe"]["layers"]) == 2
    loaded = load(str(tmp_path / "s"))
    assert loaded.dtype == "bfloat16" and loaded.model.config.kda_rope


def test_a_student_with_all_layers_kept_has_an_empty_probe_in_the_report(tiny_folder: Path, tmp_path: Path) -> None:
    make_student(str(tiny_folder), tmp_path / "twin", keep="all")
    made = evalkit.compare(str(tiny_folder), str(tmp_path / "twin"), ["quick"], limit=3, max_tokens=4)
    assert "Every layer keeps its attention. All together: KL from the teacher 0.000" in made.to_markdown()
