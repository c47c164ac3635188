# Set-up, tests and demo on a machine with Python 3.11 and pip. `make help` lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Used only where pip as configured does not find the CPU build of torch.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
MODEL  := smollm2-135m

export OMP_NUM_THREADS ?= 2
export VLLM_CPU_KVCACHE_SPACE ?= 1

.PHONY: help setup model test test-fast test-slow package demo docs lint clean
help:
	@echo "make setup      create .venv, install everything, fetch the embedded model"
	@echo "make demo       edit the model, serve it with vLLM, ask it, print before and after"
	@echo "make test       the whole test suite      (make test-fast: without vLLM engines)"
	@echo "make test-slow  what takes many minutes    make lint: ruff and mypy"
	@echo "make package    build sdist and wheel into dist/, install them where no development package is, run them"
	@echo "make docs       build the documentation site into site/"

setup: model

$(VENV)/.installed: requirements/cpu.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "setup: no python3.11 on the PATH: install Python 3.11 and run make again" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "setup: $(PYTHON) is not Python 3.11: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "setup: creating $(VENV)"
	@"$(PYTHON)" -m venv $(VENV) || { echo "setup: venv failed: install Python's venv module" >&2; exit 1; }
	@echo "setup: installing the pinned packages (about 2 minutes)"
	@# Python compiles what it imports by itself; compiling every file takes 50 s of a core.
	@$(PIP) install -qq --no-deps --no-compile -r requirements/cpu.txt \
	  || { echo "setup: trying again with PyTorch's CPU wheel index"; \
	       $(PIP) install -qq --no-deps --no-compile --extra-index-url $(TORCH_CPU_INDEX) -r requirements/cpu.txt; } \
	  || { echo "setup: pip cannot install requirements/cpu.txt: check the network and pip's index" >&2; exit 1; }
	@$(PIP) install -qq --no-deps --no-build-isolation --editable . \
	  || { echo "setup: pip cannot install this checkout" >&2; exit 1; }
	@touch $@

model: $(VENV)/.installed
	@$(BIN)/memoir model get $(MODEL)

test: setup
	@echo "test: fast tests first, then those with vLLM engines"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not engine and not slow"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "engine and not slow"

test-fast: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not engine and not slow"

test-slow: setup
	@$(BIN)/python -m pytest -m slow --timeout 5400

demo: setup
	@$(BIN)/memoir demo

package: setup
	@$(BIN)/python -m pytest -q tests/retrieval/test_package.py
	@$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null && ls dist

docs: $(VENV)/.installed
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "docs: site/index.html"

lint: $(VENV)/.installed
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/mypy --strict --follow-imports=silent examples/*.py

clean:
	rm -rf $(VENV) .memoir build dist site *.egg-info
