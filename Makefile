# `make demo` and `make test` need Python 3.11+ and make; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
ACCELERATORS ?= build/accelerators
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Each worker begins with one stretch of the tests, so that most files (and what their tests share)
# are one worker's; who has nothing left takes half of another's.
SPREAD := --numprocesses auto --dist worksteal
OPTIMIZED := tests/test_cli.py tests/runs/test_loop.py tests/runs/test_two_processes.py \
  tests/models/test_parity.py

.PHONY: demo test test-all test-optimized lint accelerators clean

demo: $(VENV)/.installed
	$(BIN)/kava demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SPREAD) -m "not long"

# One worker more than cores: processes of a test wait for each other, and leave a core free.
test-all: SPREAD := --numprocesses $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --dist worksteal
# With what takes minutes: signals and kills, several processes, fifty steps on five meshes, real
# text, a bucket, a gigabyte. The tests of the optimised program are run once, as users have it.
test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SPREAD) $(OPTIMIZED:%=--ignore=%)
	$(MAKE) test-optimized

# Tests compile without optimisation, to be quick. Here the program that users run is put to the test:
# trained, resumed, evaluated, exported, by one process and by two, and held against transformers.
test-optimized: $(VENV)/.installed-test
	KAVA_TEST_OPTIMIZED=1 $(BIN)/python -m pytest $(SPREAD) $(OPTIMIZED)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The compilers of GPUs and TPUs, for which no GPU and no TPU is needed: 5.5 GB, in an environment of
# their own.
accelerators:
	$(MAKE) VENV=$(ACCELERATORS) $(ACCELERATORS)/.installed-accelerators
	JAX_PLATFORMS=cpu $(ACCELERATORS)/bin/python docs/results/accelerators.py

clean:
	rm -rf $(VENV) $(ACCELERATORS)

# Stamps: the second call starts at once, a changed pyproject.toml or constraints.txt installs again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "$(PYTHON) is missing or older than Python 3.11; install Python 3.11+ or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo \
	  "$(PYTHON) cannot make virtual environments; install the venv package of your system (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

# The test extra adds torch (the parity oracle, Python 3.11 only), which the demo does not need.
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.installed-accelerators: $(VENV)/.installed
	$(PIP) --editable '.[cuda,tpu]'
	@touch $@
