"""`evalkit convert`: a teacher's name -> a student in a folder: calibrated, probed, with a note of how it was made."""

import json
from pathlib import Path
from typing import Any

from models.convert import Report, calibrate, convert
from models.delta import save_delta
from models.folders import would_destroy, written_whole
from models.hybrid_config import check_family
from models.kept import keep_layers
from models.load import NOTE_FILE, Loaded, load, read_note
from models.probe import probe
from models.quantised import UNPACKED
from models.text import batches


def make_student(
    name: str,
    folder: Path,
    *,
    keep: str = "uniform",
    delta: bool = False,
    text: Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    report: Report | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Convert the teacher ``name``, calibrate, probe, and write the student as ``folder``; returns its evalkit.json.

    delta: store only what differs from the teacher. text: for calibration and probe, by default our own. options:
    those of `models.convert.convert`. ValueError: ``folder`` holds something else than an earlier conversion.
    """
    if not name.strip():
        raise ValueError("teacher is an empty name: expected a hub id, a model folder or a built-in name")
    check_target(folder, name)
    teacher = load(name, dtype=dtype, device=device)
    if teacher.quantisation and teacher.quantisation.kernel != UNPACKED:
        raise ValueError(f"teacher {name!r} is quantised ({teacher.quantisation.title}): convert what it was made from")
    config = teacher.model.config
    check_family(config)
    kept = keep_layers(keep, config.num_hidden_layers)
    data = batches(teacher.tokenizer, text, window=getattr(config, "max_position_embeddings", 2**31))
    student = convert(teacher.model, kept, **options)
    calibrate(student, teacher.model, data.calibration, report)
    measured = {"text": data.source, **probe(student, teacher.model, data.probe, report)}
    note = _note(teacher, student.config, kept, measured)
    if delta:
        save_delta(student, teacher, folder, note=note)
        return read_note(str(folder)) or {}
    with written_whole(folder) as new:
        student.save_pretrained(new)
        teacher.tokenizer.save_pretrained(new)
        (new / NOTE_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return note


def check_target(folder: Path, teacher: str) -> None:
    """ValueError where writing ``folder`` would destroy something that is no earlier conversion, or the teacher."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give another --out, which becomes the student's folder")
    if would_destroy(folder, teacher):
        raise ValueError(f"{folder} is the teacher's own folder, or holds it: give another --out")
    note = read_note(str(folder)) or {}
    if not {"teacher_fingerprint", "keep", "probe"} <= set(note):
        raise ValueError(f"{folder} exists and holds no earlier conversion: give another --out, or remove it")


def _note(teacher: Loaded, config: Any, kept: tuple[int, ...], measured: dict[str, Any]) -> dict[str, Any]:
    layers = config.num_hidden_layers
    listed = ", ".join(map(str, kept)) or "none"
    return {
        "note": f"{teacher.name} with attention kept in {len(kept)} of {layers} layers ({listed}), KDA in the "
        f"others; converted and calibrated, not trained",
        "teacher": teacher.name,
        "teacher_fingerprint": teacher.identity,
        "axes": {"architecture": f"Hybrid-KDA, attention in {listed} of {layers}"},
        "keep": list(kept),
        "kda": {name: getattr(config, f"kda_{name}") for name in ("gate", "conv_size", "output_gate", "rope")},
        "probe": measured,
    }
