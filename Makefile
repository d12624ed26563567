# `make serve` and `make test` need only Python 3.11 to 3.13 (with venv), make and a C compiler; both install what is
# missing into .venv first, at the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= models/pocket
VARIANTS ?= bf16,int8-row,fp8-row
TORCH := $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
INPUTS := pyproject.toml constraints.txt Makefile

.DEFAULT_GOAL := help
.PHONY: help serve test lint bench constraints clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '%-18s %s\n' "$$name" "$$text"; done
	@echo "variables: PYTHON=python3.12  MODEL=folder-or-hub-id  VARIANTS=bf16,…  ARGS='more options'"

serve: $(VENV)/.serve  ## serve the bundled model on http://127.0.0.1:8000
	@exec $(BIN)/octavo-serve $(MODEL) --variants $(VARIANTS) $(ARGS)

test: lint  ## check format, lint and types, then run every test
	@$(BIN)/python -m pytest -q $(ARGS)

lint: $(VENV)/.dev  ## check format, lint and types
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff --quiet .; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

bench: $(VENV)/.serve  ## measure offline throughput of the bundled model
	@exec $(BIN)/octavo-bench throughput $(MODEL) --variants $(VARIANTS) $(ARGS)

# The nvidia and cuda lines go: torch itself pins those that its build needs, and a CPU build needs none.
constraints:  ## resolve the newest versions into constraints.txt (needs uv)
	@{ echo "# Every version that make installs, for Python 3.11 to 3.13. Made by make constraints."; \
	echo "torch==$(TORCH)" | uv pip compile pyproject.toml - --universal --python-version 3.11 --all-extras \
		--no-annotate --no-header --quiet | grep -v -E '^(nvidia-|cuda-)'; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove .venv and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Octavo needs Python 3.11, 3.12 or 3.13: make … PYTHON=python3.12"; exit 1; }
	@echo "[1/3] making $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV)

# torch goes first and alone: asked for by its exact version only, pip takes the build that this machine's indexes prefer.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "[2/3] installing torch $(TORCH): the large one, some minutes on the first run"
	@$(PIP) torch==$(TORCH)
	@touch $@

$(VENV)/.serve: $(INPUTS) $(VENV)/.torch
	@echo "[3/3] installing the server's other dependencies"
	@$(PIP) -e '.[serve]'
	@touch $@

$(VENV)/.dev: $(INPUTS) $(VENV)/.torch
	@echo "[3/3] installing the server's and the tests' other dependencies"
	@$(PIP) -e '.[serve,load,plot,dev]'
	@touch $@ $(VENV)/.serve
