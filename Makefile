# One command per job; each makes its environment first. `make help` lists them.
#   make PYTHON=python3.12 test       another interpreter
#   make PIP_ARGS="--index-url URL"   another package index, for example one with CPU builds of torch
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-stdlib test test-all bench lint format clean check-python

PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
PIP_ARGS ?=
# Files of tests on all cores; every test keeps to one thread. PARALLEL= runs them one after another.
PARALLEL ?= --numprocesses auto --dist loadfile
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS) --editable

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## find wrong labels among handwritten digits; writes runs/demo/report.html
	$(BIN)/whence demo --out runs/demo

demo-stdlib: $(VENV)/.dev ## train a language model on Python's own functions, ask it; minutes; writes runs/stdlib/report.html
	$(BIN)/whence demo stdlib --out runs/stdlib

test: lint ## linter, types and quick tests
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: lint ## the same with the slow tests
	$(BIN)/python -m pytest $(PARALLEL)

bench: $(BENCH_VENV)/.bench ## compare with a peer library (an hour and a half); writes JSON into bench/results
	set -e; for name in kronfluence_parity kronfluence_speed digits_lds precision plan_accuracy; do echo "== $$name"; $(BENCH_VENV)/bin/python bench/$$name.py; done

lint: $(VENV)/.dev ## linter, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## delete the environment, caches and runs
	rm -rf $(VENV) $(BENCH_VENV) runs build .mypy_cache .ruff_cache .pytest_cache src/whence.egg-info
	find src tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp says which extras the environment holds; it is out of date when the requirements change.
$(VENV)/.demo: EXTRAS := report
$(VENV)/.dev: EXTRAS := report,dev
$(VENV)/.demo $(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing whence[$(EXTRAS)] into $(VENV); once, a minute or two"
	$(INSTALL) ".[$(EXTRAS)]"
	@touch $@

# The peer asks for torchvision, which would exchange torch, and never imports it: it comes without its dependencies.
$(BENCH_VENV)/.bench: bench/requirements.txt constraints.txt | check-python
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --requirement bench/requirements.txt --editable .
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps kronfluence==1.0.1 traker==0.3.2 cleanlab==2.9.0
	@touch $@

$(BIN)/python: | check-python
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: $(PYTHON) cannot create environments. Install its venv module (Debian: apt install python3-venv)." >&2; exit 1; }

check-python:
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no $(PYTHON) here. Install Python 3.11 or later, or name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: whence needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name a later one: make PYTHON=python3.12 ..." >&2; exit 1; }
