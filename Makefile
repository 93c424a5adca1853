# Two commands do everything on a fresh machine: `make demo` and `make test`. They share `.venv`: `make demo` installs what
# the demo needs, `make test` adds the rest. What `make test` leaves out for its length or its packages runs by
# `make test-long` and `make test-runtimes`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_STAMP := $(VENV)/.installed-demo
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUNTIMES := .venv-runtimes
DOCS := .venv-docs
# A file of tests stays in one process, as its models are made once; each process computes on one thread. Files go in the
# order of tests/conftest.py.
OPTIONS := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(OPTIONS)
NATIVE_SOURCES := $(shell find native -name '*.cpp' -o -name '*.h' -o -name '*.inl')

# Those that need no arguments, models or packages besides the test environment; benchmarks/README.md lists all.
BENCHMARKS := kernels_layer kernels_decode kernels_int8 kernels_model

.PHONY: venv demo demo-full picture test test-fast test-long test-runtimes fuzz lint docs bench wheel clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[dev]'
	$(BIN)/python -m pip check
	touch $(STAMP) $(DEMO_STAMP)

$(DEMO_STAMP): pyproject.toml constraints.txt CMakeLists.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the demo's packages (torch is the largest) ..."
	$(INSTALL) -e '.[demo]'
	touch $(DEMO_STAMP)

demo: $(DEMO_STAMP)
	$(BIN)/secateur demo --output demo-out --overwrite

demo-full: $(DEMO_STAMP)
	$(BIN)/secateur demo --full --output demo-out --overwrite

# The README's picture, from the full demo: two speed-ups of the search beside uniform pruning, zeros and units.
picture: demo-full
	$(BIN)/python benchmarks/demo_picture.py demo-out/demo.json --to docs/images

test: $(STAMP) lint
	$(PYTEST) -m 'not long'

test-fast: $(STAMP)
	$(PYTEST) -m 'not slow'

test-long: $(STAMP)
	$(PYTEST) -m long

$(RUNTIMES)/.installed: pyproject.toml constraints-runtimes.txt CMakeLists.txt
	test -x $(RUNTIMES)/bin/python || $(PYTHON) -m venv $(RUNTIMES)
	$(RUNTIMES)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-runtimes.txt \
		-e '.[executorch,litert,onnx]' pytest pytest-timeout pytest-xdist
	$(RUNTIMES)/bin/python -m pip check
	touch $@

test-runtimes: $(RUNTIMES)/.installed
	OMP_NUM_THREADS=1 $(RUNTIMES)/bin/python -m pytest $(OPTIONS) -m 'not long' tests/deploy tests/kept

# Damaged files for every reader, for MINUTES, from SEED; FORMAT names one format.
MINUTES ?= 5
SEED ?= 1
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED) $(addprefix --format ,$(FORMAT))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(NATIVE_SOURCES)

$(DOCS)/.installed: constraints-docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-docs.txt \
		mkdocs-material mkdocstrings-python ruff
	touch $@

# The site, in site/; `python -m http.server -d site` serves it, with its search, without a network. secateur itself is not
# installed, as the reference is made from its sources.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

bench: $(STAMP)
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

wheel:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

clean:
	rm -rf build dist site demo-out demo-out-pruned .cache
