"""Delta checkpoints: a student as the difference from its teacher, so that a student of a known teacher is small.

A folder with config.json, the tokenizer's files where they differ from the teacher's, evalkit.json (the note),
delta.json (the teacher's name and fingerprint; how each tensor is stored, and what that lost; hashes of the files)
and delta.safetensors, which holds only tensors that differ from the teacher's. `models.load.load` reads such a folder
like any model; the teacher may be a delta itself.
"""

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig

from models.builtin import BUILTIN, place_of
from models.folders import would_destroy, written_whole
from models.load import (
    DELTA_FILE,
    DTYPES,
    NOTE_FILE,
    TOKENIZER_FILES,
    Loaded,
    check_whole,
    describe,
    is_delta,
    load,
    pick_device,
    read_note,
)
from models.mapping import teacher_tensor
from models.packing import Entry, check_encoding, pack, pack_factors, unpack

SCHEMA = "evalkit.delta/1"
HEADER = 128
"""Bytes that a safetensors file spends on itself, and on each tensor beside its name and data; at most."""
Factors = Mapping[str, tuple[Tensor, Tensor]]


def save_delta(
    student: Any,
    teacher: Loaded,
    folder: Path,
    *,
    tokenizer: Any = None,
    encoding: Mapping[str, str] | None = None,
    factors: Factors | None = None,
    note: Mapping[str, Any] | None = None,
    file_bytes: int = 2**40,
) -> dict[str, Any]:
    """Write ``student`` as its difference from ``teacher``; whole or not at all. Returns delta.json.

    student: a Hybrid-KDA model converted from ``teacher``, or a model of the teacher's own architecture.
    tokenizer: the teacher's by default.
    encoding: pattern of tensor names -> "full", "int8" or "lowrank:RANK"; the first that fits counts, "full" where
    none does. Vectors, short rows, and matrices that the rank would not make smaller are stored full.
    factors: name -> (A, B) with tensor = teacher's + A @ B, as LoRA trains them; stored as they are.
    note: evalkit.json; what a reader must know, beside the delta's own summary. file_bytes: largest delta file.
    ValueError: a pattern or a factor of no tensor, an unknown encoding, factors that don't give the tensor, a folder
    that holds something else (an earlier student, with its evalkit.json, is replaced).
    """
    _check_target(folder, teacher.name)
    encoding, factors = encoding or {}, factors or {}
    tensors = own_tensors(student)
    _check_request(encoding, factors, tensors)
    known = {"teacher": _recorded_name(teacher.name, folder), "teacher_weights": teacher.parts["weights"]}
    told: dict[str, Any] = {
        "schema": SCHEMA,
        **known,
        "teacher_dtype": teacher.dtype,
        "dtype": _dtype(student),
        "tensors": {},
    }
    base_of = teacher_tensor(teacher.model.state_dict())
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        base = base_of(name)
        if base is not None and torch.equal(base.to(tensor.dtype), tensor):
            continue
        if base is not None and base.shape != tensor.shape:
            base = None  # grown embeddings, say: nothing to take a difference from
        if name in factors:
            entry, parts = pack_factors(name, tensor, base, *(part.detach().cpu() for part in factors[name]))
        else:
            entry, parts = pack(name, tensor, base, _encoding(name, encoding))
        told["tensors"][name] = entry
        stored |= {_key(name, part): value for part, value in parts.items()}
    with written_whole(folder) as new:
        told["files"] = _write(new, stored, file_bytes)
        student.config.save_pretrained(new)
        student.generation_config.save_pretrained(new)
        _save_tokenizer(tokenizer, teacher.tokenizer, new)
        (new / DELTA_FILE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        size = sum(file.stat().st_size for file in new.iterdir())
        summary = {"delta": {**known, "tensors": len(told["tensors"]), "bytes": size}}
        (new / NOTE_FILE).write_text(json.dumps({**(note or {}), **summary}, indent=2) + "\n", encoding="utf-8")
    return told


def load_delta(
    folder: str | os.PathLike[str],
    *,
    teacher: str | None = None,
    name: str = "",
    dtype: str = "auto",
    device: str = "auto",
    **options: Any,
) -> Loaded:
    """The student that ``save_delta`` wrote; ``teacher`` says where its teacher is now, if not where it was.

    options: of the teacher's own loading (revision, trust_remote_code). ValueError names what is missing, damaged or
    of the wrong shape, and both fingerprints where the teacher is another one.
    """
    folder = Path(folder)
    told = read_delta(folder)
    stored = _read(folder, told["files"])
    base = _load_teacher(folder, told, teacher, options)
    label = name or str(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            expected = {key: value.shape for key, value in own_tensors(kind(config)).items()}
        saved = DTYPES[told["dtype"]]
        state = dict(_unpacked(told["tensors"], stored, teacher_tensor(base.model.state_dict()), expected, saved))
        wanted = DTYPES[told["dtype"] if dtype == "auto" else dtype]
        model, info = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=wanted, output_loading_info=True
        )
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        own = any((folder / file).is_file() for file in TOKENIZER_FILES)
        tokenizer = AutoTokenizer.from_pretrained(folder) if own else base.tokenizer
    except Exception as error:  # as in `load`: each library raises types of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"the delta {folder} can't be read: {reason}; download or save it again") from error
    check_whole(label, model, info)
    return describe(model.to(pick_device(device)).eval(), tokenizer, label, read_note(str(folder)))


def read_delta(folder: Path) -> dict[str, Any]:
    """delta.json; ValueError where it is no such thing."""
    file = folder / DELTA_FILE
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read: {error}") from error
    schema = told.get("schema") if isinstance(told, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{file} has the schema {schema!r}: expected {SCHEMA!r}, which this version reads")
    missing = {"teacher", "teacher_weights", "teacher_dtype", "dtype", "tensors", "files"} - set(told)
    if missing:
        raise ValueError(f"{file} lacks {', '.join(sorted(missing))}; download or save the delta again")
    assert isinstance(told, dict)
    for name, kind in (("teacher", str), ("tensors", dict), ("files", dict)):
        if not isinstance(told[name], kind):
            raise ValueError(f"{file}: {name} is a {type(told[name]).__name__}, expected a {kind.__name__}")
    return told


def own_tensors(model: Any) -> dict[str, Tensor]:
    """Name -> tensor (on the CPU) of everything a checkpoint of ``model`` holds; a tied one under its first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value.detach() if value.is_meta else value.detach().cpu()
    return found


# --- saving ------------------------------------------------------------------------------------------------------


def _check_target(folder: Path, teacher: str) -> None:
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / NOTE_FILE).is_file()):
        raise ValueError(f"{folder} exists and holds no earlier student (it has no {NOTE_FILE}): give another folder")
    if would_destroy(folder, str(place_of(teacher))):
        raise ValueError(f"{folder} is the teacher's own folder, or holds it: give another one")


def _check_request(encoding: Mapping[str, str], factors: Factors, names: Mapping[str, Tensor]) -> None:
    for pattern, how in encoding.items():
        check_encoding(repr(pattern), how)
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"the encoding pattern {pattern!r} fits no tensor of the student; one is {next(iter(names))}"
            )
    for name in factors:
        if name not in names:
            raise ValueError(f"factors were given for {name}, which is no tensor of the student")


def _encoding(name: str, encoding: Mapping[str, str]) -> str:
    return next((how for pattern, how in encoding.items() if fnmatch.fnmatchcase(name, pattern)), "full")


def _recorded_name(name: str, folder: Path) -> str:
    """How the delta names its teacher: a folder beside it relatively, so that both can move; any other absolutely."""
    path = Path(name).expanduser()
    if name in BUILTIN or not path.is_dir():
        return name
    place, home = path.resolve(), folder.absolute().parent.resolve()
    return os.path.relpath(place, home / folder.name) if place.is_relative_to(home) else str(place)


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _key(name: str, part: str) -> str:
    return f"{name}:{part}" if part else name


def _write(folder: Path, stored: Mapping[str, Tensor], file_bytes: int) -> dict[str, str]:
    """File name -> sha256. One file, or as many as ``file_bytes`` asks for; a tensor is never split."""
    files: list[dict[str, Tensor]] = [{}]
    size = HEADER
    for key, tensor in stored.items():
        more = tensor.nbytes + len(key.encode()) + HEADER
        if files[-1] and size + more > file_bytes:
            files.append({})
            size = HEADER
        files[-1][key] = tensor
        size += more
    hashes = {}
    for at, tensors in enumerate(files, 1):
        name = "delta.safetensors" if len(files) == 1 else f"delta-{at:05}-of-{len(files):05}.safetensors"
        safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})
        hashes[name] = _sha256(folder / name)
    return hashes


def _save_tokenizer(tokenizer: Any, teachers: Any, folder: Path) -> None:
    """Nothing where it is the teacher's, byte for byte: SmolLM2's own is 3.5 MB."""
    with TemporaryDirectory() as scratch:
        places = [Path(scratch) / who for who in ("student", "teacher")]
        for one, place in zip((tokenizer or teachers, teachers), places, strict=True):
            one.save_pretrained(place)
        mine, other = ({file.name: file.read_bytes() for file in place.iterdir()} for place in places)
    if mine != other:
        (tokenizer or teachers).save_pretrained(folder)


# --- loading -----------------------------------------------------------------------------------------------------


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _read(folder: Path, files: Mapping[str, str]) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for name, sha256 in files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"the delta {folder} lacks its file {name}; download or save it again")
        if _sha256(file) != sha256:
            raise ValueError(f"{file} is damaged (its sha256 is not the one in {DELTA_FILE}); download it again")
        try:
            stored |= safetensors.torch.load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from error
    return stored


def _unpacked(
    entries: Mapping[str, Entry],
    stored: Mapping[str, Tensor],
    base_of: Any,
    expected: Mapping[str, Sequence[int]],
    saved: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    for name in entries:
        if name not in expected:
            raise ValueError(f"it holds {name}, which is no tensor of the model in its config.json")
    for name, shape in expected.items():
        base = base_of(name)
        if name in entries:
            parts = {
                part: stored[_key(name, part)] for part in ("", "rows", "scale", "A", "B") if _key(name, part) in stored
            }
            value = unpack(name, entries[name], parts, base)
        elif base is None:
            raise ValueError(f"{name} is missing, and the teacher has none")
        else:
            value = base.to(saved)  # equal to the teacher's in the student's dtype, which may round
        if value.shape != shape:
            raise ValueError(f"{name} has shape {list(value.shape)}: expected {list(shape)} by config.json")
        yield name, value


def _load_teacher(folder: Path, told: Mapping[str, Any], teacher: str | None, options: Mapping[str, Any]) -> Loaded:
    name = teacher or _teacher_place(folder, told["teacher"])
    _check_chain(folder, name)
    try:
        loaded = load(name, dtype=told["teacher_dtype"], device="cpu", **options)
    except ValueError as error:
        raise ValueError(
            f"the teacher {told['teacher']!r} of the delta {folder} could not be loaded: {error}; "
            f"if it is elsewhere now: load({str(folder)!r}, teacher=...)"
        ) from error
    if loaded.parts["weights"] != told["teacher_weights"]:
        raise ValueError(
            f"the delta {folder} is of a teacher with the weights {told['teacher_weights']} ({told['teacher']}), "
            f"but those of {name} are {loaded.parts['weights']}: name its own: load({str(folder)!r}, teacher=...)"
        )
    return loaded


def _teacher_place(folder: Path, recorded: str) -> str:
    beside = folder / recorded
    return str(beside) if recorded not in BUILTIN and beside.is_dir() else recorded


def _check_chain(folder: Path, teacher: str) -> None:
    """ValueError where a delta's teacher is, through other deltas or directly, the delta itself."""
    seen = {folder.resolve()}
    while is_delta(place_of(teacher)):
        place = place_of(teacher).resolve()
        if place in seen:
            raise ValueError(
                f"the delta {folder} has itself as its teacher ({teacher}): name the real one, teacher=..."
            )
        seen.add(place)
        teacher = _teacher_place(place, str(read_delta(place)["teacher"]))
