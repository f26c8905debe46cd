# Two commands do everything on a fresh machine with Python >= 3.10 and a C++ compiler:  make demo   make test
# JOBS: how many tests run at a time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := $(VENV)/.native-built
READY  := $(VENV)/.installed
DEMO   := $(VENV)/.demo-installed
JOBS   ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=worksteal

# Tests run JOBS at a time, so that each process has one thread, and none spins; `make demo` has them all.
test-python test-slow bench-test test-long fuzz: export OMP_NUM_THREADS ?= 1
test-python test-slow bench-test test-long fuzz: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: wheel setup demo test test-all test-native test-histories test-python test-slow bench-test test-long fuzz lint format clean

setup: $(READY) $(NATIVE)

$(DEMO): pyproject.toml constraints.txt requirements-hashed.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12") if sys.version_info < (3, 10) else 0'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch and transformers (a minute or two) ..."
	$(BIN)/pip install --no-compile --quiet --require-hashes --no-deps --requirement requirements-hashed.txt
	$(BIN)/pip install --no-compile --quiet --no-deps --no-build-isolation --editable . & compiling=$$!; \
	$(BIN)/pip install --no-compile --quiet --constraint constraints.txt torch && wait $$compiling
	$(BIN)/pip install --no-compile --quiet --constraint constraints.txt 'sarathi-vattention[demo]'
	@touch $@ $(NATIVE)

$(READY): $(DEMO)
	@echo "Installing the tools (a minute or two) ..."
	$(BIN)/pip install --quiet --constraint constraints.txt 'sarathi-vattention[dev]'
	@touch $@ $(NATIVE)

$(NATIVE): $(DEMO) $(wildcard csrc/vattention/*)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: $(DEMO) $(NATIVE)
	$(BIN)/sarathi demo

test: setup test-native test-python

# What takes long: the parity matrix against transformers, long histories, fuzzing, every benchmark's short form.
test-all: test test-histories fuzz test-long

test-native:
	$(MAKE) --no-print-directory -j$(JOBS) -C csrc/tests

test-histories:
	$(MAKE) --no-print-directory -j$(JOBS) -C csrc/tests HISTORIES=3000

test-python: setup
	$(PYTEST) -m "not bench and not slow"

# test-slow and bench-test together leave no process without work at the end of the first.
test-long: setup
	$(PYTEST) -m "slow or bench"

test-slow: setup
	$(PYTEST) -m slow

bench-test: setup
	$(PYTEST) -m bench

# Broken model files, configurations and traces: a minute of one core here, FUZZ_SECONDS=1800 by hand.
fuzz: setup
	$(BIN)/python tests/fuzz/run.py --jobs $(JOBS) --seconds $(or $(FUZZ_SECONDS),60)

# A manylinux wheel of this Python and an sdist, into dist/.
wheel: $(DEMO)
	$(BIN)/python scripts/build_wheel.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*/*.h csrc/*/*.cpp)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*/*.h csrc/*/*.cpp)

clean:
	rm -rf build $(VENV) vattention/_native*.so
	$(MAKE) --no-print-directory -C csrc/tests clean
