# make demo: set everything up, restore a small archive.
# make test: set everything up, pass the tests that take seconds.   make test-all: all tests.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-all check exiftool chromium report-assets

demo: $(INSTALLED)
	$(BIN)/python -m supir_batch.demo build demo
	$(BIN)/supir-batch run manifests/demo.yaml
	$(BIN)/supir-batch report demo/restored
	$(BIN)/python -m supir_batch.demo score demo

test: $(INSTALLED) exiftool chromium
	$(BIN)/python -m pytest -m "not slow"

test-all: $(INSTALLED) exiftool chromium
	$(BIN)/python -m pytest

check: $(INSTALLED) exiftool chromium
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# The tests read metadata with ExifTool as well; what needs it is skipped where it cannot be had.
exiftool:
	@command -v exiftool >/dev/null || $(if $(filter 0,$(shell id -u)),,sudo -n) sh -c \
	  'apt-get update -q && apt-get install -q -y libimage-exiftool-perl' >/dev/null 2>&1 || \
	  echo "exiftool is not here and cannot be installed: install Debian's libimage-exiftool-perl or your system's like"

# The tests look at the report in Chromium; they are skipped where it cannot be had.
chromium:
	@command -v chromium >/dev/null || $(if $(filter 0,$(shell id -u)),,sudo -n) sh -c \
	  'apt-get update -q && apt-get install -q -y chromium' >/dev/null 2>&1 || \
	  echo "chromium is not here and cannot be installed: install Debian's chromium or your system's like"

# The front end of the report, which is in the repository as built; needs Node 20 or newer.
report-assets:
	cd supir_batch/report/frontend && npm ci && npm run build

# Nothing is installed twice: the marker is younger than what it was made from.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	touch $@
