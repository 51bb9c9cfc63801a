# `make demo` and `make test` are all that a fresh machine needs: Python 3.10 or newer, a C++
# compiler and make. Options for pip go through PIP_FLAGS, another Python through PYTHON.
PYTHON ?= python3
PIP_FLAGS ?=
# One worker per core, each with one thread: OpenMP threads that outnumber the cores wait for each other. Those that tests of
# kernels take beside it wait asleep; otherwise they spin on the core that another worker needs.
WORKERS = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --maxprocesses=8
TEST_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-test
FOREIGN_STAMP := $(VENV)/.installed-foreign
DEV_STAMP := $(VENV)/.installed-dev
MUTANTS_STAMP := $(VENV)/.installed-mutants
CROSS_STAMP := $(VENV)/.installed-cross
TYPED := build/typed

.PHONY: demo test aarch64 soak coverage mutants check format clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/loki demo

test: $(FOREIGN_STAMP)
	$(WORKERS) $(TEST_FLAGS)

# The CPU kernels, compiled for 64-bit ARM and macOS: an emulator runs the former. Minutes. Where qemu-user and
# g++-aarch64-linux-gnu are installed they take part, and products of bf16 are tested too.
aarch64: $(CROSS_STAMP)
	$(WORKERS) -m slow -k aarch64 tests/kernels $(TEST_FLAGS)

# Hours: the tests marked `soak`, slow ones too, with thousands of generated cases for each clause; one
# table at the end. LOKI_SOAK_CASES=100 tries that many for a clause instead of 3000.
soak: $(STAMP)
	$(WORKERS) --hypothesis-profile=soak --timeout=0 -m soak $(TEST_FLAGS)

# Lines and branches of passes/, pca_store/ and the runtime, by the tests marked `covers`.
coverage: $(STAMP)
	$(WORKERS) --timeout=1800 --hypothesis-profile=brief --cov --cov-branch \
	  --cov-report=term-missing --cov-fail-under=95 -m "covers and not slow" $(TEST_FLAGS)

# Small changes to a file that some test should notice: make mutants FILE=passes/plan.py SAMPLE=30
FILE ?= passes/plan.py
SAMPLE ?= 20
mutants: $(MUTANTS_STAMP)
	$(BIN)/python tests/mutants.py $(FILE) --sample $(SAMPLE)

# mypy does not follow the editable install's mapping of folders, so it gets a normal one.
check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target $(TYPED) .
	MYPYPATH=$(TYPED) $(BIN)/mypy -p loki_compile

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "found $$($(PYTHON) -V 2>&1); needed Python 3.10 or newer: make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e ".[test]"
	touch $@

# Other people's tensors and adapters: the tests try them, nothing of ours needs them.
$(FOREIGN_STAMP): $(STAMP)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e ".[foreign]"
	touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	touch $@

$(MUTANTS_STAMP): $(STAMP)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e ".[mutants]"
	touch $@

$(CROSS_STAMP): $(STAMP)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e ".[cross]"
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
