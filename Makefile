# `make check` does what must pass before a change lands; the environment is made when needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: check lint test coverage demo bench clean

check: test lint

lint: $(BIN)/pytest
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(BIN)/pytest
	$(BIN)/pytest -q

coverage: $(BIN)/pytest
	$(BIN)/pytest -q --cov --cov-report=term --cov-fail-under=95

demo: $(BIN)/pytest
	$(BIN)/python examples/storage_demo.py

bench: $(BIN)/pytest
	$(BIN)/python -m benchmarks

$(BIN)/pytest: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
