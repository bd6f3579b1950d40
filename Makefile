# bytekernels: `make help` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

TORCH       ?= torch==2.13.0
TORCH_INDEX ?=
JOBS        ?= 2

NATIVE  := $(wildcard csrc/CMakeLists.txt csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp)
FORMATS := $(filter %.h %.cpp,$(NATIVE))
SOURCES := $(wildcard bytekernels models training evals benchmarks tests setup.py)

.DEFAULT_GOAL := help
.PHONY: help setup test lint format bench compile-check distill clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with torch, this package and the test tools (TORCH_INDEX=URL for torch's wheels)

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# Without an NVIDIA driver the CPU build is asked for first; where the index has none, the default build does.
HAS_GPU   = [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi > /dev/null
GET_TORCH = $(BIN)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

$(VENV)/.torch: | $(BIN)/pip
	@if $(HAS_GPU); then \
	  echo "NVIDIA driver found: $(TORCH)"; $(GET_TORCH) '$(TORCH)'; \
	elif ! $(GET_TORCH) '$(TORCH)+cpu'; then \
	  echo "no CPU build here, so the default one (a smaller download: TORCH_INDEX=URL of PyTorch's CPU wheels)"; \
	  $(GET_TORCH) '$(TORCH)'; \
	fi
	@touch $@

$(STAMP): $(VENV)/.torch pyproject.toml setup.py requirements-test.txt $(NATIVE)
	$(BIN)/pip install -r requirements-test.txt
	$(BIN)/pip install -e .
	@touch $@

test: setup ## run the tests (JOBS=N processes; ARGS=... for pytest)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

lint: setup ## check style and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(FORMATS)
	$(BIN)/mypy

format: setup ## apply style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i $(FORMATS)

bench: setup ## time the ops (pytest-benchmark; ARGS=... for pytest)
	$(BIN)/python -m pytest -q benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-autosave $(ARGS)

compile-check: setup ## compile every Triton kernel for sm_80, sm_90, sm_100 and hold it to its budget
	$(BIN)/python tests/compile/compile_check.py $(ARGS)

RECIPE ?= quickstart

# BUDGET=3m scales all training to that time; CONTROL=1 trains the control too; TEACHER=PATH, DATA="FILES", OUT=DIR,
# RECIPE=NAME; RESUME=1 goes on where a run was stopped, OVERWRITE=1 makes it anew.
distill: setup ## token-trained teacher in, byte-level model out (BUDGET CONTROL TEACHER DATA OUT RECIPE RESUME OVERWRITE)
	$(BIN)/python training/stage.py --stage all --recipe $(RECIPE) $(if $(BUDGET),--budget $(BUDGET)) \
	  $(if $(CONTROL),--control) $(if $(TEACHER),--teacher '$(TEACHER)') $(if $(DATA),--data $(DATA)) \
	  $(if $(OUT),--out '$(OUT)') $(if $(RESUME),--resume) $(if $(OVERWRITE),--overwrite)

clean: ## remove builds and caches; .venv and runs/ stay
	rm -rf build dist *.egg-info bytekernels/_C*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(STAMP)
