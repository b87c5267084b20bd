# `make test` and `make demo` need a Python of 3.10 or newer and nothing else: they make .venv where there is none.

PYTHON ?= python3
# The index torch is installed from; empty: the one pip is configured with. A machine without a GPU can name an
# index of CPU builds here, which are a tenth of the size.
TORCH_INDEX_URL ?=

BIN := .venv/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: test test-all test-unit lint demo .venv

test: lint
	$(BIN)/pytest tests -m "not exhaustive"

test-all: lint
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,deepspeed]'
	$(BIN)/pytest tests

# What needs no processes, with fewer examples and groups: within a minute.
test-unit: .venv
	QUICK_TESTS=1 $(BIN)/pytest tests -m "not distributed and not cuda and not exhaustive"

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: .venv
	$(BIN)/hf-context-parallel compare recipes/demo_cpu.yaml

.venv: .venv/.installed

# torch comes first and alone, so that the index given for it serves it and nothing else.
.venv/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	touch $@
