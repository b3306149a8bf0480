# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` need nothing but Python 3.11, a C++ compiler and pip.

# The one place where PyTorch is pinned. Another version: make test TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
PYTHON ?= python3
PYTEST_ARGS ?=
# Two processes take the tests; 0 runs them in this one, as a debugger needs.
TEST_WORKERS ?= 2
GPU_CHECK ?= full

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# What is done is marked by a file in the environment; what it depends on decides when it is redone.
MADE := $(VENV)/made
WANTED := $(VENV)/torch-wanted
TORCHED := $(VENV)/torch-installed
TOOLED := $(VENV)/tools-installed
BUILT := $(VENV)/fastdiff-built
DEMO := $(VENV)/fastdiff-built-for-the-cpu
BUILD_INPUTS := $(wildcard pyproject.toml setup.py MANIFEST.in csrc/* csrc/*/* fastdiff/__init__.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench gpu-check clean always

help:
	@echo 'make demo    samples the shipped network and writes pictures to out/'
	@echo 'make test    runs the test suite (PYTEST_ARGS="-k solvers" passes options on)'
	@echo 'make lint    ruff and mypy'
	@echo 'make bench   runs every benchmark; benchmarks/run.py runs one'
	@echo 'make gpu-check  builds, tests and times on an NVIDIA GPU, in 10 minutes (GPU_CHECK=short: 6);'
	@echo '             makes no .venv: make gpu-check PYTHON=python3 VENV= takes a Python with torch;'
	@echo '             COMMIT= names the commit without git, WHEELS= a folder of wheels to time as well'
	@echo 'make clean   removes what was built, the caches and out/; .venv stays'
	@echo
	@echo 'Each makes .venv first: PYTHON=$(PYTHON) TORCH=$(TORCH)'

# The demo runs on the CPU: where nothing is built yet, it does not wait for the CUDA part.
demo: $(DEMO)
	@mkdir -p out
	$(BIN)/fastdiff sample --out out/digits.png
	$(BIN)/fastdiff compare --out out/error-against-nfe.png
	@echo 'pictures: out/digits.png out/error-against-nfe.png'

test: $(BUILT)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(TOOLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BUILT)
	$(BIN)/python benchmarks/run.py all

# Needs no network and no .venv: the Python of .venv if there is one, else PYTHON, which has torch.
gpu-check:
	@$(if $(VENV),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON)) benchmarks/gpu_check.py \
	    --setting $(GPU_CHECK) $(if $(COMMIT),--commit $(COMMIT)) $(if $(WHEELS),--wheels $(WHEELS))

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache $(BUILT) $(DEMO)
	rm -f fastdiff/*.so
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Each rule of the machine has its own sentence, said before anything is installed.
$(MADE):
	@say() { echo "fastdiff: $$*" >&2; exit 1; }; \
	command -v "$(PYTHON)" >/dev/null || \
	    say 'Python 3.11 or newer is needed; got no "$(PYTHON)". Install it, or name it: make PYTHON=python3.12'; \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    say "Python 3.11 or newer is needed; got $$("$(PYTHON)" -V 2>&1). Install it, or name it: make PYTHON=python3.12"; \
	"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
	    say 'the module venv (with ensurepip) is needed; $(PYTHON) has none. On Debian and Ubuntu: apt install python3-venv'; \
	cxx=$${CXX:-$$("$(PYTHON)" -c 'import sysconfig; print((sysconfig.get_config_var("CXX") or "c++").split()[0])')}; \
	echo '#include <cstdint>' | $$cxx -x c++ -std=c++17 -fsyntax-only - 2>/dev/null || \
	    say "a C++17 compiler is needed; \"$$cxx\" is not one. On Debian and Ubuntu: apt install g++; or name another: CXX=clang++ make"; \
	include=$$("$(PYTHON)" -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	test -f "$$include/Python.h" || \
	    say "Python's C headers are needed; $$include/Python.h does not exist. On Debian and Ubuntu: apt install python3-dev"
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(WANTED): $(MADE) always
	@test "$$(cat $@ 2>/dev/null)" = "$(TORCH)" || echo "$(TORCH)" > $@

# PyTorch goes first and alone, so that nothing below can choose another build of it.
$(TORCHED): $(WANTED)
	$(PIP) "$(TORCH)"
	@touch $@

$(TOOLED): $(TORCHED) requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

$(DEMO): $(TOOLED) $(BUILD_INPUTS)
	$(if $(wildcard $(BUILT)),,FASTDIFF_CUDA=0) $(PIP) --no-build-isolation --no-deps -e .
	@touch $@

$(BUILT): $(TOOLED) $(BUILD_INPUTS)
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@ $(DEMO)
