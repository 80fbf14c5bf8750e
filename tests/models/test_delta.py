"""Delta checkpoints: full is bit for bit, the lossy forms lose what they say, and nothing wrong loads."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from models.convert import calibrate, convert
from models.delta import load_delta, own_tensors, read_delta, save_delta
from models.fingerprint import fingerprint
from models.load import Loaded, describe, load, resolve
from models.packing import pack, pack_factors, unpack
from tests.models.hybrids import FAMILIES, tiny_teacher, tokens
from tests.tiny import CHATML, tiny_llama, tiny_tokenizer

GENERATOR = torch.Generator()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR.manual_seed(seed))


def saved(model: Any, folder: Path) -> Loaded:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load(str(folder))


@pytest.fixture
def teacher(tmp_path: Path) -> Loaded:
    return saved(tiny_teacher("qwen3", vocab_size=400), tmp_path / "teacher")


@pytest.fixture
def student(teacher: Loaded) -> Any:
    """Calibrated, and then trained a little in two places."""
    made = convert(teacher.model, [1])
    calibrate(made, teacher.model, torch.cat(tokens(70, 70)))
    with torch.no_grad():
        made.model.layers[0].kda.q_proj.weight += 0.01 * random(32, 32)
        made.model.layers[2].mlp.up_proj.weight += 0.05 * random(48, 2) @ random(2, 32)
    return made


def same_weights(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def load_whole(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_comes_back_bit_for_bit(family: str, dtype: str, tmp_path: Path) -> None:
    model = tiny_teacher(family, vocab_size=400).to(getattr(torch, dtype))
    base = saved(model, tmp_path / "teacher")
    made = convert(base.model, [1])
    calibrate(made, base.model, torch.cat(tokens(70, 70)))
    save_delta(made, base, tmp_path / "delta", note={"note": "a student"})
    found = load(str(tmp_path / "delta"))
    assert same_weights(found.model, made)
    assert found.dtype == dtype and not found.model.training
    assert found.parts["weights"] == fingerprint(made, base.tokenizer)[0]["weights"]
    assert found.checkpoint and found.checkpoint["note"] == "a student"
    half = load(str(tmp_path / "delta"), dtype="bfloat16").model
    assert half.dtype == torch.bfloat16 and half.model.layers[0].kda.A_log.dtype == torch.float32


def test_a_students_rounding_of_its_teacher_survives_another_dtype(
    teacher: Loaded, student: Any, tmp_path: Path
) -> None:
    """What equals the teacher's only as bfloat16 is not stored, and must not come back unrounded."""
    assert teacher.dtype == "float32"
    student.save_pretrained(tmp_path / "float32")
    rounded = load_whole(tmp_path / "float32", torch.bfloat16)
    rounded.save_pretrained(tmp_path / "whole")
    save_delta(rounded, teacher, tmp_path / "delta")
    found = load(str(tmp_path / "delta"), dtype="float32")
    assert same_weights(found.model, load_whole(tmp_path / "whole", torch.float32))


def test_only_what_differs_is_stored(teacher: Loaded, student: Any, tmp_path: Path) -> None:
    told = save_delta(student, teacher, tmp_path / "delta")
    names = {name.removeprefix("model.layers.") for name in told["tensors"]}
    new = {"A_log", "dt_bias", "o_norm", "q_conv", "k_conv", "v_conv"}
    new |= {f"{part}_proj.weight" for part in ("f_a", "f_b", "b", "g_a", "g_b")} | {"g_b_proj.bias"}
    wanted = {f"{layer}.kda.{part}" for layer in (0, 2) for part in new}
    assert names == wanted | {"0.kda.q_proj.weight", "2.mlp.up_proj.weight"}, "copies, folded or not, are the teacher's"
    assert set(told["files"]) == {"delta.safetensors"}
    assert told["teacher_weights"] == teacher.parts["weights"]


def test_the_lossy_forms_lose_what_they_say(teacher: Loaded, student: Any, tmp_path: Path) -> None:
    told = save_delta(student, teacher, tmp_path / "delta", encoding={"*.kda.*": "int8", "*.mlp.*": "lowrank:2"})
    found = load(str(tmp_path / "delta")).model
    assert same_weights(found, load(str(tmp_path / "delta")).model)
    mine, other = student.state_dict(), found.state_dict()
    kinds = {}
    for name, entry in told["tensors"].items():
        kinds.setdefault(entry["encoding"], set()).add(name.removeprefix("model.layers."))
        lost = float((mine[name] - other[name]).norm() / mine[name].norm().clamp_min(1e-30))
        assert lost == pytest.approx(entry.get("error", 0.0), rel=1e-3, abs=1e-7), name
    assert "0.kda.q_proj.weight" in kinds["int8"] and "2.kda.f_a_proj.weight" in kinds["int8"]
    assert {"0.kda.A_log", "0.kda.dt_bias", "0.kda.q_conv"} <= kinds["full"], "vectors and short rows stay full"
    assert kinds["lowrank"] == {"2.mlp.up_proj.weight"}
    entry = told["tensors"]["model.layers.2.mlp.up_proj.weight"]
    assert entry["error_of_change"] < 1e-5, "a change of rank 2 is held by rank 2"
    entry = told["tensors"]["model.layers.0.kda.q_proj.weight"]
    assert entry["of"] == "difference" and entry["error_of_change"] < 0.01, "small changes get small steps"
    same = set(mine) - set(told["tensors"])
    assert all(torch.equal(mine[name], other[name]) for name in same)


def test_a_finetuned_teacher_is_stored_as_its_exact_factors(tmp_path: Path) -> None:
    """LoRA merged in bfloat16: the delta holds A and B, and gives the merged weights bit for bit."""
    base = saved(tiny_llama(400).to(torch.bfloat16), tmp_path / "teacher")
    tuned = tiny_llama(400).to(torch.bfloat16)
    factors = {}
    for seed, (name, parameter) in enumerate(tuned.named_parameters()):
        if "proj" in name:
            rows, columns = parameter.shape
            A, B = (0.1 * random(rows, 3, seed=seed)).bfloat16(), random(3, columns, seed=seed + 99).bfloat16()
            factors[name] = (A, B)
            parameter.data = (parameter.double() + A.double() @ B.double()).bfloat16()
    told = save_delta(tuned, base, tmp_path / "sft", factors=factors)
    assert {(entry["encoding"], entry["rank"], entry["error"]) for entry in told["tensors"].values()} == {
        ("lowrank", 3, 0.0)
    }
    found = load(str(tmp_path / "sft"))
    assert same_weights(found.model, tuned)


def test_deltas_chain_and_move_together(tmp_path: Path) -> None:
    """base <- its fine-tuned delta <- the delta of that one's student."""
    (tmp_path / "here").mkdir()
    base = saved(tiny_llama(400), tmp_path / "here" / "base")
    tuned = tiny_llama(400)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight += 0.1 * random(96, 64)
    save_delta(tuned, base, tmp_path / "here" / "sft", encoding={"*": "int8"})
    sft = load(str(tmp_path / "here" / "sft"))
    made = convert(sft.model, [0])
    save_delta(made, sft, tmp_path / "here" / "student")
    assert read_delta(tmp_path / "here" / "student")["teacher"] == "../sft"
    (tmp_path / "here").rename(tmp_path / "there")
    found = load(str(tmp_path / "there" / "student"))
    assert same_weights(found.model, made)
    assert found.parts["tokenizer"] == base.parts["tokenizer"]


def test_a_teacher_that_moved_alone_is_named_by_the_caller(teacher: Loaded, student: Any, tmp_path: Path) -> None:
    save_delta(student, teacher, tmp_path / "delta")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "teacher").rename(tmp_path / "elsewhere" / "teacher")
    with pytest.raises(ValueError, match=r"the teacher '../teacher' of the delta .* could not be loaded.*teacher="):
        load(str(tmp_path / "delta"))
    found = load(str(tmp_path / "delta"), teacher=str(tmp_path / "elsewhere" / "teacher"))
    assert same_weights(found.model, student)
    with pytest.raises(ValueError, match="is no delta checkpoint"):
        load(str(tmp_path / "elsewhere" / "teacher"), teacher="x")


def test_a_teacher_elsewhere_is_recorded_absolutely(tiny_folder: Path, tmp_path: Path) -> None:
    base = load(str(tiny_folder))
    save_delta(convert(base.model, [0]), base, tmp_path / "a" / "delta")
    assert read_delta(tmp_path / "a" / "delta")["teacher"] == str(tiny_folder.resolve())
    assert load(str(tmp_path / "a" / "delta")).model.config.model_type == "hybrid_kda"


def test_a_delta_of_another_teacher_is_refused_with_both_fingerprints(
    teacher: Loaded, student: Any, tmp_path: Path
) -> None:
    save_delta(student, teacher, tmp_path / "delta")
    with torch.no_grad():
        teacher.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    other = saved(teacher.model, tmp_path / "teacher")
    with pytest.raises(ValueError, match=f"{teacher.parts['weights']}.*{other.parts['weights']}"):
        load(str(tmp_path / "delta"))


def test_a_delta_of_itself_is_told(teacher: Loaded, student: Any, tmp_path: Path) -> None:
    save_delta(student, teacher, tmp_path / "delta")
    for name in (str(tmp_path / "delta"), str(tmp_path / "other")):
        save_delta(student, teacher, tmp_path / "other")
        with pytest.raises(ValueError, match="has itself as its teacher"):
            edit(tmp_path / "other", lambda told: told.update(teacher="../delta"))
            load_delta(tmp_path / "delta", teacher=name)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    told = read_delta(folder)
    change(told)
    (folder / "delta.json").write_text(json.dumps(told))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Another delta.safetensors with the right hash."""
    import hashlib

    file = folder / "delta.safetensors"
    stored = safetensors.torch.load(file.read_bytes())
    change(stored)
    safetensors.torch.save_file(stored, file)
    edit(folder, lambda told: told["files"].update({file.name: hashlib.sha256(file.read_bytes()).hexdigest()}))


A_LOG = "model.layers.0.kda.A_log"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "delta.safetensors").write_bytes((f / "delta.safetensors").read_bytes()[:-9]), "is damaged"),
        (lambda f: (f / "delta.safetensors").unlink(), "lacks its file delta.safetensors"),
        (lambda f: (f / "delta.json").write_text('{"schema": 1'), "delta.json can't be read"),
        (lambda f: (f / "delta.json").write_text("{}"), "has the schema None: expected 'evalkit.delta/1'"),
        (lambda f: edit(f, lambda told: told.pop("files")), "lacks files"),
        (lambda f: edit(f, lambda told: told.update(files=["a"])), "files is a list, expected a dict"),
        (lambda f: (f / "config.json").write_text("{"), "the delta .* can't be read: .*config.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "the delta .* can't be read"),
        (lambda f: rewrite(f, lambda stored: stored.pop(A_LOG)), f"{A_LOG} is missing"),
        (lambda f: edit(f, lambda told: told["tensors"].pop(A_LOG)), f"{A_LOG} is missing, and the teacher has none"),
        (
            lambda f: rewrite(f, lambda stored: stored.update({A_LOG: torch.zeros(7)})),
            rf"{A_LOG} has shape \[7\]: expected \[4\]",
        ),
        (
            lambda f: (
                rewrite(f, lambda stored: stored.update({A_LOG: torch.zeros(7)})),
                edit(f, lambda told: told["tensors"][A_LOG].update(shape=[7])),
            ),
            rf"{A_LOG} has shape \[7\]: expected \[4\] by config.json",
        ),
        (
            lambda f: edit(f, lambda told: told["tensors"].update(nonsense=told["tensors"][A_LOG])),
            "it holds nonsense, which is no tensor of the model",
        ),
        (lambda f: edit(f, lambda told: told["tensors"][A_LOG].update(encoding="zip")), "is stored as 'zip'"),
        (
            lambda f: rewrite(f, lambda stored: stored.pop("model.layers.0.kda.q_proj.weight:scale")),
            r"q_proj.weight \(scale\) is missing",
        ),
    ],
)
def test_a_damaged_delta_is_told(
    damage: Callable[[Path], Any], told: str, teacher: Loaded, student: Any, tmp_path: Path
) -> None:
    save_delta(student, teacher, tmp_path / "delta", encoding={"*.q_proj.*": "int8"})
    damage(tmp_path / "delta")
    with pytest.raises(ValueError, match=told):
        load(str(tmp_path / "delta"))


def test_what_cannot_be_saved_is_told(teacher: Loaded, student: Any, tmp_path: Path) -> None:
    name = "model.layers.0.kda.q_proj.weight"
    for options, told in (
        ({"encoding": {"*": "int4"}}, r"the encoding of '\*' is 'int4': expected full, int8 or lowrank:RANK"),
        ({"encoding": {"*": "lowrank:0"}}, "expected full, int8 or lowrank:RANK"),
        ({"encoding": {"*.kda.qproj.*": "int8"}}, r"the encoding pattern '\*.kda.qproj.\*' fits no tensor"),
        ({"factors": {"q": (torch.ones(1), torch.ones(1))}}, "factors were given for q, which is no tensor"),
        ({"factors": {name: (torch.ones(32, 2), torch.ones(3, 32))}}, r"expected \[rows, rank\] and \[rank, columns\]"),
        ({"factors": {name: (torch.ones(32, 1), torch.ones(1, 32))}}, "give another tensor than the student's"),
    ):
        with pytest.raises(ValueError, match=told):
            save_delta(student, teacher, tmp_path / "delta", **options)  # type: ignore[arg-type]
    with torch.no_grad():
        student.model.layers[0].kda.f_a_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="f_a_proj.weight holds NaN or infinity"):
        save_delta(student, teacher, tmp_path / "delta", encoding={"*": "int8"})
    assert not (tmp_path / "delta").exists()


def test_a_folder_that_holds_something_else_is_not_replaced(teacher: Loaded, student: Any, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="exists and holds no earlier student"):
        save_delta(student, teacher, tmp_path / "work")
    (tmp_path / "teacher" / "evalkit.json").write_text("{}")
    with pytest.raises(ValueError, match="is the teacher's own folder"):
        save_delta(student, teacher, tmp_path / "teacher")
    inner = tmp_path / "outer" / "teacher"
    shutil.copytree(tmp_path / "teacher", inner)
    (tmp_path / "outer" / "evalkit.json").write_text("{}")
    with pytest.raises(ValueError, match="or holds it"):
        save_delta(student, load(str(inner)), tmp_path / "outer")
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"
    for _ in range(2):
        save_delta(student, teacher, tmp_path / "delta")


def test_files_are_split_at_the_size_asked_for(teacher: Loaded, student: Any, tmp_path: Path) -> None:
    told = save_delta(student, teacher, tmp_path / "delta", file_bytes=5000)
    files = sorted((tmp_path / "delta").glob("*.safetensors"))
    assert len(files) > 2 and [file.name for file in files] == sorted(told["files"])
    assert max(value.nbytes for value in own_tensors(student).values() if value.shape != (400, 32)) > 5000
    assert all(f.stat().st_size <= 5000 or len(safetensors.torch.load_file(f)) == 1 for f in files), "never split"
    assert same_weights(load(str(tmp_path / "delta")).model, student)


def test_another_tokenizer_is_kept_in_the_delta(teacher: Loaded, student: Any, tmp_path: Path) -> None:
    save_delta(student, teacher, tmp_path / "delta", tokenizer=tiny_tokenizer(chat=CHATML + "!"))
    assert (tmp_path / "delta" / "tokenizer.json").is_file()
    assert load(str(tmp_path / "delta")).tokenizer.chat_template.endswith("!")


def test_tied_and_changed_embeddings_are_stored_once(teacher: Loaded, student: Any, tmp_path: Path) -> None:
    assert student.config.tie_word_embeddings
    with torch.no_grad():
        student.model.embed_tokens.weight[3] += 1
    told = save_delta(student, teacher, tmp_path / "delta")
    assert "model.embed_tokens.weight" in told["tensors"] and "lm_head.weight" not in told["tensors"]
    assert same_weights(load(str(tmp_path / "delta")).model, student)


def test_the_end_tokens_survive(teacher: Loaded, student: Any, tmp_path: Path) -> None:
    student.generation_config.eos_token_id = [1, 3]
    save_delta(student, teacher, tmp_path / "delta")
    assert load(str(tmp_path / "delta")).model.generation_config.eos_token_id == [1, 3]


def test_a_delta_folder_is_a_model_by_name(teacher: Loaded, student: Any, tmp_path: Path) -> None:
    save_delta(student, teacher, tmp_path / "delta")
    assert resolve(str(tmp_path / "delta")) == str(tmp_path / "delta")
    shutil.copytree(tmp_path / "delta", tmp_path / "empty")
    (tmp_path / "empty" / "delta.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        resolve(str(tmp_path / "empty"))


# --- one tensor --------------------------------------------------------------------------------------------------


def tensors() -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    for dtype in (torch.float32, torch.bfloat16):
        base = random(24, 40).to(dtype)
        yield f"{dtype} near", (base.float() + 0.01 * random(24, 40, seed=1)).to(dtype), base
        yield f"{dtype} far", (base.float() * 0.01 + random(24, 40, seed=1)).to(dtype), base
        yield f"{dtype} alone", random(24, 40).to(dtype), None
        yield f"{dtype} 3-d", random(4, 6, 40).to(dtype), None


@pytest.mark.parametrize(("tensor", "base"), [t[1:] for t in tensors()], ids=[t[0] for t in tensors()])
def test_a_row_in_8_bits_is_off_by_half_a_step(tensor: torch.Tensor, base: torch.Tensor | None) -> None:
    entry, parts = pack("x", tensor, base, "int8")
    assert parts["rows"].dtype == torch.int8 and parts["scale"].shape == tensor.shape[:1]
    found = unpack("x", entry, parts, base)
    packed = tensor.float() - base.float() if base is not None and entry["of"] == "difference" else tensor.float()
    step = packed.flatten(1).abs().amax(1) / 127
    rounding = tensor.abs().max().float() * (2**-8 if tensor.dtype == torch.bfloat16 else 2**-23)
    assert bool(((found.float() - tensor.float()).flatten(1).abs().amax(1) <= step * 0.501 + rounding).all())
    assert found.dtype == tensor.dtype


def test_a_row_of_zeros_stays_zero() -> None:
    entry, parts = pack("x", torch.zeros(3, 20), None, "int8")
    assert torch.equal(unpack("x", entry, parts, None), torch.zeros(3, 20)) and entry["error"] == 0


def test_low_rank_is_the_best_of_its_rank() -> None:
    tensor, base = random(24, 40, seed=1), random(24, 40)
    entry, parts = pack("x", tensor, base, "lowrank:5")
    lost = torch.linalg.svdvals(tensor - base)[5:].norm()
    assert float((unpack("x", entry, parts, base) - tensor).norm()) == pytest.approx(float(lost), rel=1e-4)
    assert entry["error_of_change"] == pytest.approx(float(lost / (tensor - base).norm()), rel=1e-4)


def test_a_dtype_that_could_not_be_read_again_is_not_stored() -> None:
    with pytest.raises(ValueError, match="w is torch.uint8: expected one of float32"):
        pack("w", torch.zeros(3, 3, dtype=torch.uint8), None, "full")


@pytest.mark.parametrize("encoding", ["full", "int8", "lowrank:2"])
def test_grown_embeddings_are_stored_whole(encoding: str, teacher: Loaded, student: Any, tmp_path: Path) -> None:
    student.resize_token_embeddings(408)
    save_delta(student, teacher, tmp_path / "delta", encoding={"model.embed_tokens.weight": encoding})
    found = load(str(tmp_path / "delta")).model.model.embed_tokens.weight
    assert found.shape == student.model.embed_tokens.weight.shape
    assert read_delta(tmp_path / "delta")["tensors"]["model.embed_tokens.weight"]["of"] == "tensor"


def test_a_rank_that_saves_nothing_is_stored_full() -> None:
    entry, parts = pack("x", random(24, 40), None, "lowrank:15")
    assert entry["encoding"] == "full" and torch.equal(unpack("x", entry, parts, None), random(24, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_give_the_same_bits_whatever_the_order_of_sums(dtype: torch.dtype) -> None:
    """A hash of the weights must not depend on a machine's matrix product."""
    A, B, base = random(64, 16).to(dtype), random(16, 48, seed=1).to(dtype), random(64, 48, seed=2).to(dtype)
    total = torch.zeros(64, 48, dtype=torch.float64)
    for rank in range(16):
        total += A[:, rank, None].double() * B[None, rank].double()
    tensor = (base.double() + total).to(dtype)
    entry, parts = pack_factors("x", tensor, base, A, B)
    assert entry["error"] == 0 and torch.equal(unpack("x", entry, parts, base), tensor)


def test_a_difference_needs_its_teacher() -> None:
    base = random(24, 40)
    entry, parts = pack("x", base + 0.01 * random(24, 40, seed=1), base, "lowrank:5")
    for wrong, told in ((None, "none"), (base[:3], r"shape \[3, 40\]")):
        with pytest.raises(
            ValueError, match=f"x is stored as a difference from the teacher's, of which there is {told}"
        ):
            unpack("x", entry, parts, wrong)


def test_a_live_model_is_a_teacher_too(tmp_path: Path, teacher: Loaded, student: Any) -> None:
    live = describe(teacher.model, teacher.tokenizer, "somebody's model")
    save_delta(student, live, tmp_path / "delta")
    assert same_weights(load(str(tmp_path / "delta"), teacher=str(tmp_path / "teacher")).model, student)
