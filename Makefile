# Every target sets up what it needs: `make test` on a clean checkout creates the virtual environment first.
PYTHON ?= python3
PYTHON312 ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Megatron-Core has one line for Python up to 3.11 and one from 3.12 on, and the pins go with them.
PINS = $(shell $(BIN)/python -c 'import sys; print("py310-py311" if sys.version_info < (3, 12) else "py312")')
CONSTRAINTS = constraints/$(PINS).txt
# Most quick tests are of one process, so two run at a time. Slow ones are of several, which wait for each other: beside
# another such test each collective waits for its turn, and make demo, for one, took five times as long.
TWO_AT_A_TIME = -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo miniature test test-slow test-py312 test-gpu lint format docs bench bench-gpu clean

help: ## Print the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

install: $(STAMP) ## Create the virtual environment in VENV (.venv) and install the package, its tests' and its demo's needs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): setup.py constraints/py310-py311.txt constraints/py312.txt | $(BIN)/python
	$(BIN)/python -m pip install -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[dev,demo]'
	touch $@

demo: install ## Train a small model with SFT and PSFT and compare them
	$(BIN)/python examples/demo/run.py

miniature: install ## Compare SFT, PSFT and relatives on small models: target, general skills, entropy, then GRPO
	$(BIN)/python examples/miniature/run.py

test: install ## Run the CPU tests that take seconds
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m "not slow and not gpu"

test-slow: install ## Run the CPU tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu"

$(VENV)312/.installed: tests/nemo/install.sh tests/nemo/constraints.txt
	$(PYTHON312) -m venv $(VENV)312
	tests/nemo/install.sh $(VENV)312/bin/python
	touch $@

test-py312: $(VENV)312/.installed ## Run the tests of `make test`, and those of Megatron-Bridge, on Python 3.12 and its Megatron-Core
	$(VENV)312/bin/python -m pytest $(TWO_AT_A_TIME) -m "not slow and not gpu"
	$(VENV)312/bin/python -m pytest -m slow tests/nemo

test-gpu: install ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: install ## Check format, style, types, spelling and file sizes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck examples/slurm/psft.sbatch
	git ls-files -z | xargs -0 -r $(BIN)/check-added-large-files --enforce-all --maxkb=500

format: install ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed-docs: $(STAMP)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

docs: $(VENV)/.installed-docs ## Build the documentation into build/site, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

BENCHMARKS = head psft_overhead scaling vs_trl plan

$(VENV)/.installed-bench: $(STAMP)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[bench]'
	touch $@

bench: $(VENV)/.installed-bench ## Measure on this machine's CPU, one JSON line per figure, against the peers that run there
	@for name in $(BENCHMARKS); do $(BIN)/python -W ignore benchmarks/$$name.py --size cpu || exit 1; done

bench-gpu: $(VENV)/.installed-bench ## The same in sizes for a GPU
	@for name in $(BENCHMARKS) throughput; do $(BIN)/python -W ignore benchmarks/$$name.py --size gpu || exit 1; done

clean: ## Remove the virtual environment and all caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
