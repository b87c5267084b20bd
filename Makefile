# `make test` and `make demo` need a Python of 3.10 or newer and nothing else: they make .venv where there is none.
# The comment behind a target is what `make help` prints of it.

PYTHON ?= python3
# The index torch is installed from; empty: the one pip is configured with. A machine without a GPU can name an
# index of CPU builds here, which are a tenth of the size.
TORCH_INDEX_URL ?=

BIN := .venv/bin
# Two processes run the tests, a file at a time: each starts up to four ranks, which a core or two keep busy.
IN_PARALLEL := -n 2 --dist loadfile
TORCH := $(shell grep '^torch==' constraints.txt)
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
# The oldest versions that setup.cfg admits, as pip takes them.
OLDEST := $(shell sed -n '/^install_requires/,/^$$/s/^ *\([a-z]*\)>=\(.*\)$$/\1==\2/p' setup.cfg)
# The tests that run with other versions than those of constraints.txt. CI runs them with the newest.
OF_VERSIONS := tests/test_versions.py tests/test_compat.py tests/test_docs.py tests/trainer tests/integration/checks \
	tests/integration/interfaces/test_compiled_attention.py \
	tests/test_cli.py::test_a_split_run_equals_one_process tests/test_cli.py::test_the_example_trains
# Of the process that pytest runs in, so of tests without processes: the ranks of process groups are killed when they are
# done, and would not tell. Only from 3.12 on, where Python monitors itself: tracing made tests of schedules 43% slower.
SINCE_3_12 := $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 12) else "")')
COVERAGE := $(if $(SINCE_3_12),--cov --cov-report=term:skip-covered)
export COVERAGE_CORE := sysmon

.PHONY: help test test-unit test-all test-newest test-oldest lint format demo fuzz soak drills audit .venv

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

test: lint  ## lint, all tests but the exhaustive ones, and the lines that they reached
	$(BIN)/pytest tests $(IN_PARALLEL) -m "not exhaustive and not versions" $(COVERAGE)

test-unit: .venv  ## the tests that start no processes, the first case of each: within a minute
	QUICK_TESTS=1 $(BIN)/pytest tests -m "not distributed and not cuda and not exhaustive and not versions"

test-all: lint  ## lint and all tests, those with DeepSpeed too
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,deepspeed]'
	$(BIN)/pytest tests $(IN_PARALLEL)

# Torch alone stays that of constraints.txt: where no index of CPU builds is named, a newer one brings gigabytes of CUDA.
test-newest:  ## a sample of all tests, with the newest versions that the package index serves
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install $(TORCH_INDEX) $(TORCH)
	.venv-newest/bin/python -m pip install --upgrade --upgrade-strategy eager $(TORCH) -e '.[test]'
	.venv-newest/bin/python -m pip freeze | grep -E '^(accelerate|datasets|peft|torch|transformers)=='
	.venv-newest/bin/pytest $(IN_PARALLEL) $(OF_VERSIONS) -m "not exhaustive"

# NumPy's oldest has no build for a Python newer than 3.12.
test-oldest:  ## the same sample, with the oldest versions that setup.cfg admits
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install $(TORCH_INDEX) $(filter torch==%,$(OLDEST))
	.venv-oldest/bin/python -m pip install $(OLDEST) -e '.[test]'
	.venv-oldest/bin/python -m pip freeze | grep -E '^(accelerate|datasets|peft|torch|transformers)=='
	.venv-oldest/bin/pytest $(IN_PARALLEL) $(OF_VERSIONS) -m "not exhaustive"

lint: .venv  ## what ruff and mypy say
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv  ## let ruff format the code and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: .venv  ## a small Qwen3 on two CPU processes beside the same on one
	$(BIN)/hf-context-parallel compare recipes/demo_cpu.yaml

fuzz: .venv  ## ten minutes of the property tests, with new random examples
	$(BIN)/python -m tests.fuzz --minutes 10

soak: .venv  ## 2,000 random steps on four ranks, each compared with one process
	$(BIN)/python -m benchmarks.soak

drills: .venv  ## runs that are killed at random moments, and resumed
	$(BIN)/python -m benchmarks.drills

# pip-audit lives by itself, so that what it brings is not among what it audits.
audit: .venv  ## known advisories of the pinned dependencies, and a search of the source
	$(BIN)/pytest -q tests/test_security.py
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install pip-audit
	.venv-audit/bin/python .ci/audit.py constraints.txt

.venv: .venv/.installed

# torch comes first and alone, so that the index given for it serves it and nothing else.
.venv/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH_INDEX) $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	touch $@
