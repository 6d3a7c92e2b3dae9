# Every target creates the environment it needs. Variables:
#   PYTHON=python3.12       the interpreter the environment is made from (3.10 or newer)
#   VENV=.venv              where it is made; `VENV=` uses PYTHON's own environment as it is
#   JOBS=2                  test processes, each on one thread
#   PYTEST_ARGS='-k name'   passed on to pytest
#   PIP_ARGS='...'          passed on to pip
#   BUDGET=480              seconds that gpu-check may take
#   OUT=build/gpu-check     where it leaves its page and archive
#   BENCH='rms_norm rope'   benches that `make bench` runs; default: all
#   BENCH_ARGS='...'        passed on to `stackwise bench`

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
PYTEST_ARGS ?=
PIP_ARGS ?=
BENCH ?=
BENCH_ARGS ?=
BUDGET ?= 480
OUT ?= build/gpu-check

HAS_DRIVER := $(shell { [ -e /proc/driver/nvidia/version ] || nvidia-smi -L; } >/dev/null 2>&1 && echo yes)
CPU_INDEX := https://download.pytorch.org/whl/cpu

# Without an NVIDIA driver: the CPU build of torch, and no time spent on csrc/.
STACKWISE_CUDA ?= $(if $(HAS_DRIVER),,0)
CONSTRAINTS := $(if $(HAS_DRIVER),,-c constraints-cpu.txt)

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

PYTEST := $(PY) -m pytest -q --tb=short -n $(JOBS) --dist loadfile

# The oldest Triton that the kernels must work with, in a folder beside the installed one.
OLD_TRITON := 3.6.0
OLD_TRITON_DIR := $(or $(strip $(VENV)),build)/triton-$(OLD_TRITON)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-old-triton test-machine-code test-all gpu-check bench plots lint format docs build-cuda clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(READY)  ## prepare the built-in corpus, train in every mode, evaluate, write a report (minutes)
	$(PY) -m stackwise.demo

test: $(READY)  ## run the tests (minutes, no GPU)
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: $(READY)  ## run only the tests that `make test` leaves out for their time
	$(PYTEST) --run-slow -m "slow and not gpu" $(PYTEST_ARGS)

test-old-triton: $(OLD_TRITON_DIR)/.installed  ## run the kernel tests with the oldest Triton that is supported
	PYTHONPATH=$(OLD_TRITON_DIR) $(PY) -c 'import triton; assert triton.__version__ == "$(OLD_TRITON)"'
	PYTHONPATH=$(OLD_TRITON_DIR) STACKWISE_MACHINE_CODE_SAMPLE=40 $(PY) -m pytest -q --tb=short -n $(JOBS) \
	  --dist load tests/triton -m "not slow and not gpu" -k "interpreter or sample or plain_training" $(PYTEST_ARGS)

test-machine-code: $(READY)  ## compile every configuration of every kernel for every architecture (long)
	$(PY) -m benchmarks.machine_code --all --processes $(JOBS)

test-all: test test-slow test-old-triton test-machine-code  ## run all four

gpu-check: $(READY)  ## on a machine with a GPU: prove, race, benchmark, one archive (VENV= without a network)
	$(PY) -m benchmarks.gpu_check --budget $(BUDGET) --out $(OUT)

bench: $(READY)  ## measure every operation beside its peers, then draw: make bench BENCH=rms_norm
	$(PY) -m stackwise bench $(BENCH) --peers $(BENCH_ARGS)
	$(PY) -m stackwise bench --plot

plots: $(READY)  ## regenerate docs/benchmarks.md and its pictures from benchmarks/results/
	$(PY) -m stackwise bench --plot

lint: $(READY)  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)  ## apply the style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(READY)  ## regenerate docs/configuration.md and docs/api.md
	$(PY) -m stackwise.config.docs > docs/configuration.md
	$(PY) -m stackwise.api_docs

build-cuda: $(READY)  ## compile csrc/ with nvcc into this environment's installation
	STACKWISE_CUDA=1 $(PY) -m pip install -q --no-deps $(PIP_ARGS) -e .
	@$(PY) -m stackwise.kernels._cuda

clean:  ## delete build outputs and caches (keeps the environment and runs/)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f kernels/libstackwise_cuda.so
	find stackwise kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(OLD_TRITON_DIR)/.installed: $(READY)
	rm -rf $(OLD_TRITON_DIR)
	$(PY) -m pip install -q --no-deps $(PIP_ARGS) --target $(OLD_TRITON_DIR) triton==$(OLD_TRITON)
	@touch $@

$(VENV)/.installed: setup.py pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "StackWise needs Python 3.10 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1)"; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)."; \
	  echo "Or use an environment that has the packages: make VENV= $(MAKECMDGOALS)"; exit 1; } >&2
	@echo "Making the environment in $(VENV) (some minutes at most) ..."
	$(PYTHON) -m venv $(VENV)
	@index=; if [ -z "$(HAS_DRIVER)" ]; then $(PY) -c \
	  'import urllib.request as r; r.urlopen("$(CPU_INDEX)/torch/", timeout=3)' 2>/dev/null && \
	  index="--extra-index-url $(CPU_INDEX)"; fi; set -x; \
	STACKWISE_CUDA=$(STACKWISE_CUDA) $(PY) -m pip install -q $(CONSTRAINTS) $$index $(PIP_ARGS) -e '.[test,dev]'
	@$(PY) -m stackwise.kernels._cuda
	@touch $@
