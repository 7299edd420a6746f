# Every target sets itself up: a virtual environment in .venv, and in it what the target needs.
#
#   make demo                        the pair on loopback, data moved and verified, a short table
#   make test                        every check
#   make test PYTEST_ARGS="-n 0"     the same, tests one after the other in one process
#   make soak                        the long tests, two hours; REFLEX_SOAK_S=300 shortens the longest
#   make bench                       beside the peers that are installed; writes docs/benchmarks.md (an hour)
#   make bench-quick                 ours alone, under two minutes; for before and after a change:
#   make bench-quick BENCH_ARGS="--compare OLD.json"
#   make fuzz                        100,000 steps of the state machines, and the fuzzers (minutes)
#   make test PYTHON=python3.12      another interpreter (after `make clean`)

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto
BENCH_ARGS ?=
FUZZ_ARGS ?=
SOAK_ARGS ?=

BIN := $(VENV)/bin
SOURCES := reflex tests bench
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo bench bench-quick test soak fuzz lint cover clean help

demo: $(VENV)/.runtime-installed ## run both daemons on loopback, move and verify data, print a short table
	@$(BIN)/python -m bench.demo

bench: $(VENV)/.runtime-installed ## every figure beside the peers, docs/benchmarks.md with pictures; about an hour
	@$(BIN)/python -m bench.run $(BENCH_ARGS)

bench-quick: $(VENV)/.runtime-installed ## ours alone, under two minutes, a table
	@$(BIN)/python -m bench.run --quick $(BENCH_ARGS)

# The coverage check stays silent when it is satisfied, so that pytest's closing line is the last one.
test: lint ## every check: lint, layers, types, tests, coverage
	@rm -f .coverage .coverage.*
	$(BIN)/python -m pytest --cov --cov-report=term --cov-report=json:.coverage.json $(PYTEST_ARGS)
	@$(BIN)/python tests/check_coverage.py .coverage.json

# The guided fuzzer runs where it is installed: `.venv/bin/pip install -e '.[fuzz]'`.
fuzz: $(VENV)/.dev-installed ## state machines with 100,000 steps, random input for every parser; minutes
	$(BIN)/python -m pytest -m fuzz -rP tests/test_fuzz.py $(FUZZ_ARGS)

lint: $(VENV)/.dev-installed ## ruff, mypy --strict and the layer check
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy --strict
	$(BIN)/lint-imports

cover: $(VENV)/.dev-installed ## the tests alone, with a browsable report in htmlcov/
	@rm -f .coverage .coverage.*
	$(BIN)/python -m pytest --cov --cov-report=term-missing --cov-report=html $(PYTEST_ARGS)

soak: $(VENV)/.dev-installed ## the long tests: chaos, floods, probes
	$(BIN)/python -m pytest -m soak -p no:cacheprovider $(SOAK_ARGS)

clean: ## remove the virtual environment and everything that was generated
	rm -rf $(VENV) *.egg-info build dist htmlcov .coverage .coverage.* \
		.hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "  %-16s %s\n", $$1, $$2 }'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Reflex needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
			"Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) comes without the venv module." \
			"On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime-installed: pyproject.toml | $(BIN)/python
	$(PIP) install -e .
	@touch $@

$(VENV)/.dev-installed: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[dev]'
	@touch $@ $(VENV)/.runtime-installed
