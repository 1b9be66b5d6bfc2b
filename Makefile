# `make demo` and `make test` do all the set-up on a machine with Python >= 3.11 and a package index.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS) -e
PYTEST_FLAGS ?=

.PHONY: help demo test test-long reliability audit lint format docs docs-serve release clean

help:
	@echo "make demo         train, merge and compare a small chat model, from nothing"
	@echo "make test         install what tests need and run them"
	@echo "make test-long    the long forms of tests: thousands of rows, tens of kills, 10,000 steps"
	@echo "make reliability  both forms of the tests, and docs/reliability.md from what they find"
	@echo "make audit        known vulnerabilities in what is installed"
	@echo "make lint         ruff and mypy"
	@echo "make format       let ruff rewrite the code"
	@echo "make docs         the documentation site, into site/"
	@echo "make docs-serve   the site on localhost, built again when a page changes"
	@echo "make release      sdist and wheel in dist/, checked, with the release's notes"
	@echo "make clean        delete the environment and what the demo wrote"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "sampo needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(INSTALL) '.[demo]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(INSTALL) '.[dev]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not long" $(PYTEST_FLAGS)

test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m long --timeout 7200 $(PYTEST_FLAGS)

# The tables are written from a whole run only: a test that fails leaves them as they are.
reliability: export SAMPO_RELIABILITY := $(abspath $(VENV)/reliability.jsonl)
reliability:
	rm -f $(SAMPO_RELIABILITY)
	$(MAKE) test test-long
	$(BIN)/python -m scripts.make_reliability $(SAMPO_RELIABILITY)

audit: $(VENV)/.dev
	$(BIN)/python -m pip install --disable-pip-version-check --quiet 'pip-audit>=2.7'
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict

docs-serve: export NO_MKDOCS_2_WARNING := 1
docs-serve: $(VENV)/.dev
	$(BIN)/python -m mkdocs serve --strict

# Publishes nothing: CONTRIBUTING.md says what comes after.
release: $(VENV)/.dev
	$(BIN)/python -m scripts.release

clean:
	rm -rf $(VENV) outputs/demo .cache site dist
