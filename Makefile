# Each target makes its own .venv if there is none. Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
OLD := sys.exit("The versions in constraints.txt need Python 3.11 or newer: make PYTHON=python3.12")

# Tests: no network, no thread pools on top of each other.
TEST_ENV := MLFLOW_DISABLE_TELEMETRY=true OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
SLOW := slow and not gpu
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest --quiet --basetemp=.pytest_tmp

# Notebooks without progress bars; the site without an advertisement of its successor.
BUILD_ENV := $(TEST_ENV) TQDM_DISABLE=1 NO_MKDOCS_2_WARNING=1

.PHONY: help demo test slow lint format docs notebooks clean

help:
	@echo "make demo       fine-tune MiniLM on the bundled data, about two minutes on two cores"
	@echo "make test       lint, types and fast tests"
	@echo "make slow       the slow tests, about 15 minutes on two cores"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff repair and format the code"
	@echo "make docs       the documentation, into site/"
	@echo "make notebooks  run the examples again and keep what they print"
	@echo "make clean      remove caches, builds and runs/demo; .venv stays"

demo: $(VENV)/.installed-demo
	@HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py

test: lint
	$(PYTEST) --numprocesses=auto --timeout=120

slow: $(VENV)/.installed-dev
	$(PYTEST) -m "$(SLOW)" --numprocesses=auto --timeout=900 --durations=10

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BUILD_ENV) $(BIN)/mkdocs build --strict
	@echo "Open site/index.html"

notebooks: $(VENV)/.installed-dev
	$(BUILD_ENV) $(BIN)/python examples/make_notebooks.py

clean:
	rm -rf runs/demo site build dist *.egg-info .pytest_cache .pytest_tmp .mypy_cache .ruff_cache
	find hflit tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp says which extra is in; a .venv without it, whoever made it, is installed into.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or $(OLD)' && \
	    echo "Making $(VENV)" && $(PYTHON) -m venv $(VENV); }
	@echo "Installing $(TORCH) (a few minutes, once)"
	@$(PIP) $(TORCH)
	@echo "Installing hflit[$*] (a few minutes, once)"
	@$(PIP) -c constraints.txt -e '.[$*]'
	@touch $@
