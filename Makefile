# `make check` runs every check that a change must pass. Targets create the virtual environment if it
# is missing or older than pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: check lint test coverage demo bench docs screenshots clean

check:
	@for step in test lint docs; do echo "== make $$step"; $(MAKE) --no-print-directory $$step || exit 1; done

lint: $(BIN)/pytest
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: $(BIN)/pytest
	$(BIN)/pytest -q

coverage: $(BIN)/pytest
	$(BIN)/pytest -q --cov --cov-report=term --cov-fail-under=95

docs: $(BIN)/pytest
	rm -rf build/docs
	$(BIN)/sphinx-build -q -b html -W --keep-going -n docs build/docs

screenshots: $(BIN)/pytest
	$(BIN)/python -m devtools.screenshots

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
