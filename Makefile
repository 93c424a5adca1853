# Two commands do everything on a fresh machine: `make demo` and `make test`. What is left out of the second for its length
# or its packages runs by `make test-long` and `make test-runtimes`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# ExecuTorch and LiteRT: pip finds no versions that suit both at once, so they are installed one after the other, with what
# must not move pinned each time; that it then warns of typing-extensions is known to be harmless.
RUNTIMES := .venv-runtimes
PINNED := $(shell grep -E '^(torch|transformers|numpy|pandas|pytest|pytest-timeout|pytest-xdist)==' constraints.txt)
# A file of tests stays in one process, as its models are made once; each process computes on one thread. Files go in the
# order of tests/conftest.py.
OPTIONS := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(OPTIONS)

.PHONY: venv demo test test-fast test-long test-runtimes lint bench wheel clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip check
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/secateur demo --output demo-out --overwrite

test: $(STAMP) lint
	$(PYTEST) -m 'not long'

test-fast: $(STAMP)
	$(PYTEST) -m 'not slow'

test-long: $(STAMP)
	$(PYTEST) -m long

$(RUNTIMES)/.installed: pyproject.toml constraints.txt CMakeLists.txt
	test -x $(RUNTIMES)/bin/python || $(PYTHON) -m venv $(RUNTIMES)
	$(RUNTIMES)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[executorch]' $(PINNED)
	$(RUNTIMES)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[litert]' $(PINNED)
	touch $@

test-runtimes: $(RUNTIMES)/.installed
	OMP_NUM_THREADS=1 $(RUNTIMES)/bin/python -m pytest $(OPTIONS) -m 'not long' tests/deploy tests/kept

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

wheel:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

clean:
	rm -rf build dist demo-out .cache
