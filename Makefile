# `make demo` and `make test` do all the set-up on a fresh machine. A second `make` installs nothing again.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# With ONNX Runtime for the CPU, or `make EXTRA=gpu` on a machine with an NVIDIA GPU.
EXTRA ?= cpu
VENV := .venv
RUN := $(VENV)/bin/python -m
# One process a core, and all tests of a file in one: they share what is slow to make.
SPREAD := --numprocesses logical --dist loadfile
INSTALL := $(RUN) pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt
INSTALLED := $(VENV)/installed

.PHONY: demo test slow lint types check gpu clean

demo: $(INSTALLED)
	$(RUN) bakeout demo -o demo

test: $(INSTALLED)
	$(RUN) pytest $(SPREAD)

slow: $(INSTALLED)
	$(RUN) pytest $(SPREAD) -m slow

lint: $(INSTALLED)
	$(RUN) ruff check
	$(RUN) ruff format --check

types: $(INSTALLED)
	$(RUN) mypy

check: lint types test slow

# What needs an NVIDIA GPU and TensorRT, in an environment of its own: each part runs whatever became of the one before.
gpu:
	$(MAKE) VENV=.venv-gpu EXTRA=gpu,tensorrt .venv-gpu/installed
	mkdir -p runs; status=0; \
	.venv-gpu/bin/python -m pytest -m "gpu or tensorrt or claim" --what-ran=docs/what-ran-gpu.json || status=1; \
	.venv-gpu/bin/python tests/what_ran.py || status=1; \
	.venv-gpu/bin/python benchmarks/gpu_kernels.py -o runs/gpu_kernels.json || status=1; \
	.venv-gpu/bin/python benchmarks/gpu.py runs/gpu --seconds 3600 || status=1; \
	exit $$status

clean:
	rm -rf $(VENV) .venv-gpu build dist demo src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and alone, so that nothing else decides which build of it is installed. TensorRT's packages bring what
# builds them, which --no-build-isolation would leave out.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "bakeout needs Python 3.11 or newer: install it, or say where it is with 'make PYTHON=...'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools torch
	$(if $(findstring tensorrt,$(EXTRA)),$(INSTALL) tensorrt)
	$(INSTALL) --no-build-isolation --editable '.[dev,$(EXTRA)]'
	@touch $@
