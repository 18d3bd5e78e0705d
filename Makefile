# `make demo` and `make test` need Python >= 3.10, git and make: their first call sets up .venv.
#
#   make test PYTHON=python3.12   another interpreter for a new .venv
#   make test VENV=               no .venv: use the environment that is already active

PYTHON ?= python3
VENV   ?= .venv

ifeq ($(strip $(VENV)),)
RUN   := $(PYTHON)
READY :=
else
RUN   := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# Every model and picture that the demo and the tests need is inside the package.
export HF_HUB_OFFLINE = 1
export TRANSFORMERS_OFFLINE = 1
export HF_DATASETS_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false
export OMP_NUM_THREADS ?= 2

CODE      := $(wildcard cephalo_lite tests notebooks benchmarks)
TORCH_CPU := torch==2.13.0
# Where this index cannot be reached, the build on PyPI is taken: larger, and as good on a CPU.
CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP       := $(RUN) -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint unit notebooks env clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## build a mixture of three tiny experts, train its gates, ask it (results/)
	@$(RUN) -m cephalo_lite.demo

test: lint unit notebooks  ## every check: lint, tests, notebooks
	@echo "make test: lint, tests and notebooks passed."

lint: $(READY)  ## ruff and codespell
	@$(RUN) -m ruff check $(CODE)
	@$(RUN) -m codespell_lib $(CODE) README.md CHANGELOG.md Makefile pyproject.toml

unit: $(READY)  ## the tests under tests/, two at a time
	@MPLBACKEND=Agg OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 tests

notebooks: $(READY)  ## run every notebook at tiny size, two at a time, leaving the files as they are
	@CEPHALO_SIZE=tiny OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadgroup \
	  --nbmake --nbmake-timeout=900 --durations=0 notebooks

env: $(READY)  ## only set up .venv
	@echo "$(or $(VENV),The active environment) is ready."

clean:  ## remove .venv, caches and build products
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted set-up is taken up again, and an edited
# requirements.txt or pyproject.toml is installed anew.
$(VENV)/.ready: requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.10 or later, or say which: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$$($(PYTHON) -V) is too old: Python 3.10 or later is needed (make PYTHON=python3.12)"; exit 1; }
	@echo "Setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || $(PYTHON) -m virtualenv -q $(VENV) 2>/dev/null || { \
	  echo "This Python cannot make an environment. On Debian or Ubuntu: sudo apt install python3-venv." \
	  "Elsewhere: $(PYTHON) -m pip install virtualenv. Then call make again."; exit 1; }
	@$(PIP) --upgrade pip
	@if nvidia-smi >/dev/null 2>&1; then echo "  torch for the NVIDIA GPU found here"; \
	else echo "  torch, CPU build"; \
	  $(PIP) --no-deps --retries 0 --timeout 15 --extra-index-url $(CPU_INDEX) "$(TORCH_CPU)" 2>/dev/null \
	  || $(PIP) --no-deps "$(TORCH_CPU)"; fi
	@echo "  everything else"
	@$(PIP) -r requirements.txt -e .
	@touch $@
