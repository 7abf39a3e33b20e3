# make demo | test | gpu | bench | experiment | lint | clean, on a machine that has python3 (3.10 or newer, with venv and
# headers), g++ and make. Each target first makes .venv complete, with the versions of constraints.txt; a second call installs nothing,
# an edit of csrc/, the build files or the constraints installs again.
#
#   make test ARGS="-k decode -x"       further arguments for pytest, the demo, the benchmarks
#   make demo PYTHON=python3.12         another interpreter for a new .venv
#   make demo TORCH_INDEX=URL           a further package index for torch, e.g. PyTorch's own for CPU-only wheels
#   RK_CUDA=OFF make test               leave the CUDA sources out (default AUTO: built where nvcc is)

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP    := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

# Where pip finds torch besides its own index. Without an NVIDIA GPU the CPU build (200 MB) does what the CUDA build (3 GB)
# does; PyTorch's installation page names the index that has it.
TORCH_INDEX ?=

.DELETE_ON_ERROR:
.PHONY: help install demo test gpu bench experiment lint clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(STAMPS)/package
	$(BIN)/refusal-kernels demo $(ARGS)

test: $(STAMPS)/package
	$(BIN)/python -m pytest $(ARGS)

# All that needs a GPU: build, value tests, benchmarks, compute-sanitizer. Whether there is one is asked before anything is
# built; its result is kept below benches/results/gpu, where the README's table comes from. A $(PYTHON) that has PyTorch
# with CUDA and all that the build and the tests need is taken as it is, so that nothing is downloaded there; else it is
# said what is missing, and .venv is made.
GPU_RUN = -m benches.gpu --out gpu-run --keep $(ARGS)
NEEDS = benches/gpu/needs.py
gpu:
	@: $(if $(shell nvidia-smi -L >/dev/null 2>&1 && echo found),,$(error make gpu: there is no CUDA device))
	@$(PYTHON) $(NEEDS) || $(MAKE) --no-print-directory $(STAMPS)/package
	@if $(PYTHON) $(NEEDS) 2>/dev/null; then exec $(PYTHON) $(GPU_RUN); else exec $(BIN)/python $(GPU_RUN); fi

bench: $(STAMPS)/package
	$(BIN)/python -m benches $(ARGS)

# Every method, basis and site under five seeds; what it leaves becomes the README's table with `python -m benches readme`.
experiment: $(STAMPS)/package
	$(BIN)/refusal-kernels experiment --rows full --seeds 0,1,2,3,4 --out experiment-run $(ARGS)
	$(BIN)/python -m benches keep experiment-run

lint: $(STAMPS)/package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p refusal_kernels
	$(BIN)/mypy tests
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
		xargs $(BIN)/clang-format --dry-run --Werror

install: $(STAMPS)/package

clean:
	rm -rf $(VENV) build dist *.egg-info refusal_kernels/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Three steps. torch alone first: everything after it, the native build included, uses the one that is installed.
$(STAMPS)/torch: constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch numpy
	@mkdir -p $(@D) && touch $@

$(STAMPS)/tools: constraints.txt | $(STAMPS)/torch
	$(PIP) install -c constraints.txt setuptools cmake ninja pybind11
	@mkdir -p $(@D) && touch $@

$(STAMPS)/package: $(NATIVE) $(STAMPS)/torch $(STAMPS)/tools
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test,lint]'
	@mkdir -p $(@D) && touch $@

# What cannot come from pip is asked for once, by name, before anything is downloaded.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "refusal-kernels needs Python 3.10 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@missing=; \
	command -v $${CXX:-c++} >/dev/null || missing="$$missing g++"; \
	test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
		missing="$$missing python3-dev"; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	test -z "$$missing" || { echo "Missing on this machine:$$missing. On Debian and Ubuntu:" >&2; \
		echo "    sudo apt install$$missing" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
