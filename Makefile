# make demo | test | bench | lint | clean, on a machine that has python3 (3.10 or newer, with venv and headers), g++ and
# make. Each target first makes .venv complete, with the versions of constraints.txt; a second call installs nothing,
# an edit of csrc/, the build files or the constraints installs again.
#
#   make test ARGS="-k decode -x"       further arguments for pytest, the demo, the benchmarks
#   make demo PYTHON=python3.12         another interpreter for a new .venv
#   make demo TORCH_INDEX=https://…     another place for torch; empty for the default index and its CUDA build
#   RK_CUDA=OFF make test               leave the CUDA sources out (default AUTO: built where nvcc is)

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP    := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

# Without an NVIDIA GPU the CPU build of torch (200 MB) does what the CUDA build (3 GB) does. It has an index of its
# own, which is used where it answers.
CPU_INDEX   := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= auto

.DELETE_ON_ERROR:
.PHONY: help install demo test bench lint clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(STAMPS)/package
	$(BIN)/refusal-kernels demo $(ARGS)

test: $(STAMPS)/package
	$(BIN)/python -m pytest $(ARGS)

bench: $(STAMPS)/package
	$(BIN)/python -m benches $(ARGS)

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
	@index='$(TORCH_INDEX)'; \
	if [ "$$index" = auto ]; then \
		index=; \
		command -v nvidia-smi >/dev/null || index=$$($(BIN)/python -c "import urllib.request as r; \
			r.urlopen('$(CPU_INDEX)/torch/', timeout=5); print('$(CPU_INDEX)')" 2>/dev/null) || true; \
	fi; \
	set -x; $(PIP) install -c constraints.txt $${index:+--extra-index-url $$index} torch numpy
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
