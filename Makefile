# Every target makes .venv, or brings it up to date, by itself: see scripts/setup.sh for PYTHON, ACCELERATOR, RESOLUTION.
VENV ?= .venv
PY := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
ARGS ?=
PYTEST_ARGS ?=
# At most 8: each worker compiles its own programs and holds 8 virtual devices.
PYTEST_WORKERS ?= auto
# With a public registry, TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu" fetches the CPU build: 200 MB
# where the default one for Linux brings CUDA, several GB.
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
# What peft needs beside these, transformers or torch has brought.
PEFT ?= peft==0.21.2 accelerate==1.15.0 psutil==7.2.2
SETUP = VENV=$(VENV) scripts/setup.sh
PYTEST = $(PY) -m pytest --maxprocesses=8

export PYTHON ACCELERATOR RESOLUTION

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-parity test-browser soak test-lowest lint format setup clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart:  ## the whole road of RLHF in small, five minutes on 2 cores (WORKDIR=..., ARGS=...)
	@$(SETUP)
	$(PY) experiments/rlhf.py --config=experiments/configs/quickstart.py --workdir=$(WORKDIR) $(ARGS)

test:  ## run the tests, without torch (PYTEST_ARGS=...)
	@$(SETUP) test
	@scripts/install_package.sh bubblewrap 1 bwrap || echo "the sandbox will not be tested" >&2
	$(PYTEST) -n $(PYTEST_WORKERS) --ignore=tests/parity --ignore=tests/browser $(PYTEST_ARGS)

# By pip, not by uv: where an index serves both the CUDA and the CPU build, pip takes the one that its configuration names.
test-parity:  ## compare with torch and peft, live; installs both (TORCH_ARGS=...)
	@$(SETUP) test
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH) $(TORCH_ARGS)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps $(PEFT)
	$(PYTEST) -n $(PYTEST_WORKERS) tests/parity $(PYTEST_ARGS)

test-browser:  ## label in a real browser; installs chromium where it may (PYTEST_ARGS=...)
	@$(SETUP) test browser
	@scripts/install_package.sh chromium 350 chromium chromium-browser google-chrome
	$(PYTEST) tests/browser $(PYTEST_ARGS)

soak:  ## crashes, full disks, bit rot, signals: ten times as many as in `make test`
	@$(SETUP) test
	$(PYTEST) -n $(PYTEST_WORKERS) --soak tests/test_durability.py tests/test_ending.py tests/test_resume.py tests/test_data.py $(PYTEST_ARGS)

test-lowest:  ## run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(MAKE) test VENV=.venv-lowest RESOLUTION=lowest-direct

lint:  ## check style and types
	@$(SETUP) dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyrefly check --python-interpreter-path $(PY)

format:  ## fix what can be fixed
	@$(SETUP) dev
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

setup:  ## make .venv with everything for development
	@$(SETUP) dev

clean:  ## remove the environments and caches, not the runs
	rm -rf .venv .venv-lowest .cache .pytest_cache .ruff_cache .hypothesis build dist
	find ppo_jax experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
