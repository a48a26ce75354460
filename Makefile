# Every target makes the virtual environment and installs what it needs, the first time and
# whenever the requirements change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SECONDS := 60
DEVICE := cpu

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test slow fuzz lint format docs check-site package clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Threads that wait for others do not keep them, or other programs, from a core.
demo: $(VENV)/.plot ## Train a small model, check and time its attention, draw what it chose
	OMP_WAIT_POLICY=passive $(BIN)/python -m flexmoba demo

# By file, because each example uses the names of those before it in its file.
test: $(VENV)/.dev ## Run the tests, examples in documents and docstrings included
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 5

slow: $(VENV)/.dev ## Run the tests that `make test` leaves out because they take long
	$(BIN)/python -m pytest -m slow

fuzz: $(VENV)/.dev ## Compare random calls with the oracle for SECONDS=60, on DEVICE=cpu or cuda
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --device $(DEVICE)

lint: $(VENV)/.dev ## Check style and types, those of the examples included
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python docs/check_types.py

format: $(VENV)/.dev ## Format, and mend what can be mended
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(VENV)/.docs ## Build the site into site/
	$(BIN)/python -m mkdocs build --strict

check-site: docs $(VENV)/.browser ## Look at every page of the site in Chromium
	$(BIN)/python docs/check_site.py

package: $(VENV)/.dev ## Build the package into dist/, check it, and run the example of README.md with it
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest tests/package.py

clean: ## Remove what the other targets made, the virtual environment included
	rm -rf $(VENV) site site-screens dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis

# pip comes last into a new environment, so where it is, the environment is whole.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("flexmoba needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	@touch $@
