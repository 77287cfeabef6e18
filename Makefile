# The two commands a newcomer needs: `make demo` and `make test`. Both create their environment.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# One test process for each of two cores; torch is then held to one thread in each.
JOBS ?= 2
# torch goes first: anything that depends on it would pull the newest build with its CUDA libraries.
# For a CPU-only build, name PyTorch's own index of those: make TORCH_ARGS="--index-url ..."
TORCH ?= $(shell grep '^torch==' constraints.txt)
TORCH_ARGS ?=

VENV := .venv
OLDEST := .venv-oldest
TREE := build/tree
PYTEST_ARGS ?=

.PHONY: help demo test lint format test-oldest gpu bench readme clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# $(call install,FOLDER,CONSTRAINTS): an environment with this checkout in it, editable.
define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet "setuptools>=77"
	$(1)/bin/python -m pip install --quiet $(TORCH_ARGS) $(TORCH)
	$(1)/bin/python -m pip install --quiet --no-build-isolation --constraint $(2) --editable ".[dev]"
	touch $(1)/.installed
endef

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(call install,$(VENV),constraints.txt)

$(OLDEST)/.installed: pyproject.toml setup.py constraints-oldest.txt
	$(call install,$(OLDEST),constraints-oldest.txt)

demo: $(VENV)/.installed ## the main job on real input, under two minutes
	$(VENV)/bin/hf-ext demo $(DEMO_ARGS)

test: $(VENV)/.installed lint ## linters, then the whole suite
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python tests/linked_tree.py $(TREE) > /dev/null
	cd $(TREE) && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p hf_ext

format: $(VENV)/.installed ## let ruff rewrite what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test-oldest: $(OLDEST)/.installed ## the same suite on the oldest supported transformers
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(OLDEST)/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

# Only files with such tests are collected: the others may need packages that are missing there.
# Installs nothing, so that it runs without network in whatever environment the GPU machine has.
HAS_TORCH := -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("transformers")))'
GPU_PYTHON ?= $(or $(shell for p in python3 python $(PYTHON); do $$p $(HAS_TORCH) 2> /dev/null && echo $$p && break; done),$(PYTHON))
# Nearly all of the tests' time is compiling, for which many processes can share a GPU.
GPU_JOBS ?= 8
GPU_PARALLEL = $(shell $(GPU_PYTHON) -c 'import xdist' 2> /dev/null && printf "%s" "-n $(GPU_JOBS)")
GPU_TESTS ?= $(shell grep -rl 'mark\.gpu' tests --include='test_*.py')
GPU_BENCHES ?= attention_gpu cache_gpu
gpu: ## what needs a GPU: correctness, then speed, with the first Python that has torch, or GPU_PYTHON=...
	$(eval GPU_PYTHON := $(GPU_PYTHON))
	@$(GPU_PYTHON) $(HAS_TORCH) || \
		{ echo "make gpu: found no Python with torch and transformers; name one: make gpu GPU_PYTHON=..." >&2; exit 1; }
	@$(GPU_PYTHON) -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "make gpu: torch sees no GPU")'
	$(GPU_PYTHON) tests/linked_tree.py $(TREE) > /dev/null
	PYTHONSAFEPATH=1 PYTHONPATH=$(TREE) $(GPU_PYTHON) -m pytest -m gpu $(GPU_PARALLEL) $(PYTEST_ARGS) $(GPU_TESTS)
	$(foreach name,$(GPU_BENCHES),PYTHONSAFEPATH=1 PYTHONPATH=$(TREE) $(GPU_PYTHON) -m hf_ext.cli bench $(name) $(BENCH_ARGS) &&) true

bench: $(VENV)/.installed ## cost of importing, into benchmarks/results/
	$(VENV)/bin/hf-ext bench import_time

readme: $(VENV)/.installed ## renew the plugin table of README.md
	$(VENV)/bin/python -m hf_ext.cli.readme

clean: ## remove what was built (environments stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
