PYTHON ?= python3.11
VENV := .venv
FULLSIZE ?= artifacts/fullsize
READY := $(VENV)/.ready

.PHONY: run test lint setup clean fullsize

run: $(READY) ## build and validate the int4 program of the bundled checkpoint
	$(VENV)/bin/python -m pipeline run recipe=int4_xnnpack overwrite=true

test: $(READY) ## all tests
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

lint: $(READY) ## style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

fullsize: $(READY) ## measure all that is claimed for Dream-7B's shape: 60 GB of disk in FULLSIZE
	CMAKE_ARGS=-DCMAKE_CXX_FLAGS=-fno-dse $(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev,llama]"
	$(VENV)/bin/python -m scripts.fullsize $(FULLSIZE) docs/fullsize.json

setup: $(READY) ## the virtual environment, from the pins

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV), which takes a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean: ## remove the environment and what was built
	rm -rf $(VENV) artifacts
