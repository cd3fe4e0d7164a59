# Two commands are all of the set-up: `make demo` runs the main job, `make test` the tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# torch is pinned here and installed first, so that no later step replaces it. On Linux the
# default package index may answer with a build that brings gigabytes of CUDA libraries; to
# take a CPU build from another index, or a wheel on disk, pass what PyTorch's own install
# page says for your machine:
#   make demo TORCH_PIP_ARGS="--index-url <the CPU index named there>"
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=
# The oldest supported transformers; its tests run from a folder of their own.
OLDEST_TRANSFORMERS := transformers==4.57.6

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
COMPAT := .compat/oldest
PEERS := .peers
CMAKE := $(BIN)/cmake

.PHONY: demo test check setup fmt fmt-check lint type arch words bench-smoke peers compat-test \
	native-test neon-test clean

demo: $(VENV)/.installed
	$(BIN)/kvswap demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto

# The tests run every benchmark at toy size; `make bench-smoke` runs only those.
check: $(VENV)/.installed fmt-check lint type arch words native-test neon-test test compat-test

setup: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(TORCH_PIP_ARGS) "$(TORCH)"
	touch $@

$(VENV)/.packages: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[dev]"
	touch $@

# The extension lies beside the Python modules.
$(VENV)/.installed: $(VENV)/.packages CMakeLists.txt $(shell find csrc -type f)
	$(CMAKE) -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python --log-level=WARNING
	$(CMAKE) --build build/native
	$(CMAKE) --install build/native --prefix src >/dev/null
	touch $@

NATIVE_SOURCES = $(shell find csrc tests/native -name '*.cc' -o -name '*.h')

fmt: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

fmt-check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE_SOURCES)

lint: $(VENV)/.installed
	$(BIN)/ruff check .

type: $(VENV)/.installed
	$(BIN)/mypy

# PYTHONPATH: the tool must read this tree and not an installed copy.
arch: $(VENV)/.installed
	PYTHONPATH=src $(BIN)/lint-imports --no-cache

words: $(VENV)/.installed
	$(BIN)/codespell src tests benchmarks docs README.md CONTRIBUTING.md CHANGELOG.md

bench-smoke: $(VENV)/.installed
	$(BIN)/python -m pytest tests/bench -m smoke -rs

# What decode_throughput.py --peers runs beside us, in a Python of its own; llama.cpp is built.
peers: $(VENV)/.installed
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet $(TORCH_PIP_ARGS) "$(TORCH)"
	$(PEERS)/bin/pip install --quiet transformers==5.23.0 gguf==0.19.0 llama-cpp-python==0.3.36
	$(PEERS)/bin/pip install --quiet --no-deps ollm==1.0.3

# The newest transformers lies in $(VENV), the oldest in a folder in front of it on the path.
$(COMPAT)/.installed: $(VENV)/.installed
	$(PIP) --target "$(COMPAT)" --upgrade $(OLDEST_TRANSFORMERS)
	touch "$@"

# Faults of a disk and interrupts are the same with every transformers, and so is what a device
# computes: of its tests only those of families run.
OF_THE_DISK := $(addprefix --ignore=tests/e2e/test_,faults.py interrupts.py)
OF_A_DEVICE := -k "not test_device or test_families_of_all_kinds"

compat-test: $(COMPAT)/.installed
	PYTHONPATH="$(COMPAT)" $(BIN)/python -m pytest -n auto tests/hf tests/e2e $(OF_THE_DISK) \
		$(OF_A_DEVICE) -m "not newest"

# The tests of csrc that need no Python, built once a sanitizer, unoptimised for the time it
# takes. $(call native_tests,<folder>,<settings>,<what runs it>)
define native_tests
$(CMAKE) -S . -B build/$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	-DKVSWAP_NATIVE_TESTS=ON $(if $(filter 1,$(CI)),-DCMAKE_COMPILE_WARNING_AS_ERROR=ON) \
	$(2) --log-level=WARNING
$(CMAKE) --build build/$(1)
$(3) $(BIN)/ctest --test-dir build/$(1) --parallel $(CORES) --output-on-failure --no-tests=error
endef

CORES := $(shell getconf _NPROCESSORS_ONLN)
# Some thread sanitizers cannot place their memory where addresses are randomised widely.
PLAIN_ADDRESSES := $(shell setarch -R true 2>/dev/null && echo setarch -R)

native-test: $(VENV)/.packages
	$(call native_tests,native-address,-DCMAKE_BUILD_TYPE=Debug -DKVSWAP_SANITIZE=address$(COMMA)undefined)
	$(call native_tests,native-thread,-DCMAKE_BUILD_TYPE=Debug -DKVSWAP_SANITIZE=thread,$(PLAIN_ADDRESSES))
COMMA := ,

# The ARM kernels on another processor, by emulation; without its tools this fails only where
# it is asked for by name.
NEON_CXX ?= aarch64-linux-gnu-g++
NEON_RUN ?= qemu-aarch64-static;-L;/usr/aarch64-linux-gnu
NEON_TOOLS := $(and $(shell command -v $(NEON_CXX)),$(shell command -v $(firstword $(subst ;, ,$(NEON_RUN)))))
NEON_MUST := $(filter neon-test,$(MAKECMDGOALS))

neon-test: $(VENV)/.packages
ifneq ($(filter aarch64 arm64,$(shell uname -m)),)
	@echo "neon-test: this is an ARM; native-test has run its kernels"
else ifeq ($(NEON_TOOLS),)
	@echo "neon-test: not run: apt install g++-aarch64-linux-gnu qemu-user-static" \
		$(if $(NEON_MUST),&& false)
else
	$(call native_tests,native-neon,-DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux \
		-DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(NEON_CXX) \
		-DCMAKE_CXX_FLAGS_RELEASE=-O1 '-DCMAKE_CROSSCOMPILING_EMULATOR=$(NEON_RUN)')
endif

clean:
	rm -rf $(VENV) .compat $(PEERS) .pytest_cache .mypy_cache .ruff_cache build dist
