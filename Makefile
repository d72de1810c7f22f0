# Every target makes what it needs. CI calls `check` and `test`, as anyone can.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Which tests `make test` runs; CI has run the fast ones in `make check` and asks for the slow ones alone.
TESTS ?=

.PHONY: demo test check clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.core

demo: $(VENV)/.core  ## the demo study, to runs/demo/report.html; goes on where it was stopped
	$(BIN)/trimtab run demo --resume

test: $(VENV)/.dev  ## all tests; TESTS='-m slow' for some
	$(BIN)/python -m pytest -n 2 $(TESTS)

check: $(VENV)/.dev  ## format, lint, types, layers, fast tests, doctests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 -m 'not slow' tests src --doctest-modules

clean:  ## everything that the other targets made
	rm -rf $(VENV) build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
