# Every target sets up what it needs: `make test` on a clean checkout creates the virtual environment first.
PYTHON ?= python3
PYTHON312 ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Megatron-Core has one line for Python 3.11 and one for 3.12, and the pins go with them.
PINS = $(shell $(BIN)/python -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")')
CONSTRAINTS = constraints/$(PINS).txt
# For two cores: a test for each, whose ranks share it, and one with what these leave (tests/conftest.py). Two tests that
# shared a core evenly were slower than one after the other: messages of each waited for the other's turn. More cores
# have room for more, at up to 3 GB each.
WORKERS ?= 3
DURATIONS = --durations=50 --durations-min=1
AT_A_TIME = -n $(WORKERS) --dist worksteal $(DURATIONS)
# Tests for one Python: of what is no part of the package, and of rooms that call no library that changes with it.
ONCE = benchmarks cli config docker docs evaluation examples metrics report support

.DEFAULT_GOAL := help
.PHONY: help install packages-py312 install-py312 demo miniature test test-slow test-together test-alone test-py312 test-nemo test-gpu lint format docs bench bench-store gpu-acceptance clean

help: ## Print the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1: /p' Makefile

install: $(STAMP) ## Create the virtual environment in VENV (.venv) and install the package, its tests' and its demo's needs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): setup.py pyproject.toml constraints/py311.txt constraints/py312.txt tests/model/engine/requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[dev,plot]'
	$(BIN)/python -m pip install --upgrade --no-deps --target $(VENV)/engine -r tests/model/engine/requirements.txt
	touch $@

demo: install ## Fine-tune a real small model with SFT and with PSFT and compare them; MODEL=DIR|ID takes another
	$(BIN)/python examples/demo/run.py $(if $(MODEL),--model "$(MODEL)")

miniature: install ## Compare SFT, PSFT and relatives on small models: target, general skills, entropy, then GRPO
	$(BIN)/python examples/miniature/run.py

test: install ## Run the CPU tests that take seconds
	$(BIN)/python -m pytest $(AT_A_TIME) -m "not slow and not gpu"

test-slow: test-together test-alone ## Run the CPU tests that take minutes

test-together: install # those that run beside others
	$(BIN)/python -m pytest $(AT_A_TIME) -m "slow and not alone and not gpu"

test-alone: install
	$(BIN)/python -m pytest $(DURATIONS) -m "alone and not gpu"

$(VENV)312/.packages: tests/nemo/install.sh tests/nemo/constraints.txt tests/model/engine/requirements.txt
	$(PYTHON312) -m venv $(VENV)312
	tests/nemo/install.sh $(VENV)312/bin/python
	touch $@

$(VENV)312/.installed: $(VENV)312/.packages setup.py pyproject.toml
	$(VENV)312/bin/python -m pip install --no-deps -e .
	touch $@

packages-py312: $(VENV)312/.packages # all that install-py312 installs but this package

install-py312: $(VENV)312/.installed ## Create the environment of Python 3.12 with its Megatron-Core and Megatron-Bridge

test-py312: install-py312 ## Run the tests of `make test` and some slow ones on Python 3.12, without rooms for which it makes no difference
	$(VENV)312/bin/python -m pytest $(AT_A_TIME) -m "(not slow or both) and not gpu" --ignore=tests/nemo $(ONCE:%=--ignore=tests/%)

# One at a time: each that runs at a time would have ranks of its own, and each of these imports Bridge for 13 seconds.
test-nemo: install-py312 ## Run the tests of Megatron-Bridge, on Python 3.12
	$(VENV)312/bin/python -m pytest $(DURATIONS) -m "not gpu" tests/nemo

test-gpu: install ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: install ## Check format, style, types, spelling and file sizes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck examples/slurm/psft.sbatch examples/kubernetes/node.sh
	git ls-files -z | xargs -0 -r $(BIN)/check-added-large-files --enforce-all --maxkb=500

format: install ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed-docs: $(STAMP)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

docs: $(VENV)/.installed-docs ## Build the documentation into build/site, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

CPU_BENCHMARKS = head psft_overhead scaling vs_trl real_model lora plan checkpoint convert

$(VENV)/.installed-bench: $(STAMP)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[bench]'
	touch $@

bench: $(VENV)/.installed-bench ## Measure on this machine's CPU, one JSON line per figure, against the peers that run there
	@for name in $(CPU_BENCHMARKS); do $(BIN)/python -W ignore benchmarks/$$name.py --size cpu || exit 1; done

bench-store: $(VENV)/.installed-bench ## Measure on this machine's CPU, keep the figures and write the tables of docs/performance.md
	$(BIN)/python benchmarks/store.py
	$(BIN)/python -m docs.generate

gpu-acceptance: $(VENV)/.installed-bench ## Measure and test on this machine's GPU, in minutes, keep the figures and write docs/gpu.md
	$(BIN)/python benchmarks/store.py --size gpu; status=$$?; $(BIN)/python -m docs.generate && exit $$status

clean: ## Remove the virtual environment and all caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
