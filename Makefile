# make demo: set everything up, restore a small archive.   make test: set everything up, pass the tests.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test check

demo: $(INSTALLED)
	$(BIN)/python -m supir_batch.demo build demo
	$(BIN)/supir-batch run manifests/demo.yaml
	$(BIN)/supir-batch report demo/restored
	$(BIN)/python -m supir_batch.demo score demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# Nothing is installed twice: the marker is younger than what it was made from.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	touch $@
