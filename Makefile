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
BENCH_TESTS := $(addprefix bench/,$(shell grep -l pytest.mark.bench tests/integration/test_*.py))

# Tests run JOBS at a time, so that each process has one thread, and none spins; `make demo` has them all.
test-python test-slow bench-test: export OMP_NUM_THREADS ?= 1
test-python test-slow bench-test: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: wheel setup demo test test-all test-native test-python test-slow fuzz bench-test $(BENCH_TESTS) lint format clean

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

# What takes long: the parity matrix against transformers and every benchmark's short form.
test-all: test test-slow fuzz bench-test

test-native:
	$(MAKE) --no-print-directory -j$(JOBS) -C csrc/tests

test-python: setup
	$(PYTEST) -m "not bench and not slow"

test-slow: setup
	$(MAKE) --no-print-directory -j$(JOBS) -C csrc/tests HISTORIES=3000
	$(PYTEST) -m slow

# Broken model files, configurations and traces: a minute here, FUZZ_SECONDS=1800 by hand.
fuzz: setup
	$(BIN)/python tests/fuzz/run.py --seconds $(or $(FUZZ_SECONDS),60)

# JOBS files at a time, since each process of a test has one thread; make keeps the output of a file together if it can.
bench-test: setup
	$(MAKE) --no-print-directory -j$(JOBS) $(if $(filter output-sync,$(.FEATURES)),--output-sync) $(BENCH_TESTS)

$(BENCH_TESTS): bench/%:
	$(BIN)/python -m pytest -m bench $*

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
