"""The file that loads a saved hybrid where evalkit is not installed, in a process that can't import evalkit."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import torch

from models.remote import REMOTE_FILE, remote_source
from tests.models.hybrids import FAMILIES, padded, tiny_hybrid, tiny_teacher, tokens

OURS = ("models", "evalkit", "tasks", "distill", "reports")

HIDE = f"""
import sys, warnings
warnings.simplefilter("error")

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OURS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoConfig, AutoModelForCausalLM
"""


def elsewhere(script: str, folder: Path) -> str:
    """What ``script`` prints in a process of its own, in another folder, where evalkit can't be imported."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-I", "-c", HIDE + script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@torch.no_grad()
def test_without_evalkit_a_saved_folder_gives_the_same_logits_bit_for_bit(tmp_path: Path) -> None:
    ids, mask = padded(tokens(9, 70), "left")
    expected = {}
    for family, gate in zip(FAMILIES, ("softplus", "bounded", "bounded"), strict=True):
        model = tiny_hybrid(tiny_teacher(family), kda_gate=gate)
        model.save_pretrained(tmp_path / family)
        said = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        expected[family] = (model(ids, attention_mask=mask).logits, said)
    torch.save({"ids": ids, "mask": mask, "expected": expected}, tmp_path / "known.pt")
    script = f"""
known = torch.load("known.pt")
ids, mask = known["ids"], known["mask"]
for family, (logits, said) in known["expected"].items():
    for folder in (family, "again"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        with torch.no_grad():
            assert torch.equal(model(ids, attention_mask=mask).logits, logits)
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), said)
        model.save_pretrained("again")
        assert open("again/{REMOTE_FILE}").read() == open(f"{{family}}/{REMOTE_FILE}").read()
assert not any(name.split(".")[0] in {OURS!r} for name in sys.modules)
print(AutoConfig.from_pretrained("again", trust_remote_code=True).kda_layers)
"""
    assert elsewhere(script, tmp_path).splitlines()[-1] == "[0, 2]"


def test_without_evalkit_its_kernels_are_asked_for_in_vain_and_a_gpu_is_told_once(tmp_path: Path) -> None:
    tiny_hybrid(tiny_teacher("llama")).save_pretrained(tmp_path / "model")
    script = """
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
for impl in ("triton", "fla"):
    model.set_kda_impl(impl)
    try:
        model(torch.arange(5)[None])
    except ImportError as error:
        print(error)
module = sys.modules[type(model).__module__]
class OnGPU:
    is_cuda = True
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(module.default_impl(OnGPU), module.default_impl(OnGPU), module.default_impl(torch.ones(1)))
print(*[warning.message for warning in caught], sep="\\n")
"""
    assert elsewhere(script, tmp_path).splitlines()[-4:] == [
        *["models.kda.kernels.mixer.triton_conv is a part of evalkit: install it, or use impl='reference'"] * 2,
        "reference reference reference",
        "KDA runs in plain PyTorch on this GPU: evalkit, which has its Triton kernels, is not installed",
    ]


def test_with_evalkit_the_file_uses_its_kernels_on_a_gpu(tmp_path: Path) -> None:
    namespace: dict[str, object] = {"__name__": "remote", "__file__": str(tmp_path / REMOTE_FILE)}
    sys.modules["remote"] = sys  # dataclasses look their module up
    try:
        exec(compile(remote_source(), REMOTE_FILE, "exec"), namespace)
    finally:
        del sys.modules["remote"]
    on_gpu = type("OnGPU", (), {"is_cuda": True})
    assert namespace["default_impl"](on_gpu) == "triton"  # type: ignore[operator]


def test_the_file_imports_nothing_of_evalkit_and_says_everything_once() -> None:
    tree = ast.parse(remote_source())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] in OURS for name in names) and getattr(node, "level", 0) == 0
    defined = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(defined) == len(set(defined))
    assert {"HybridKDAConfig", "HybridKDAForCausalLM", "KimiDeltaAttention", "kda", "chunk_kda"} <= set(defined)
