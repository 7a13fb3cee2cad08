# make demo | test | check | bench   (each sets up .venv first)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SPARSITY ?= 0.3

.PHONY: demo test check bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m llm_snp --sparsity $(SPARSITY) --output demo-output --overwrite

test: $(VENV)/.installed
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/elimination.py

clean:
	rm -rf $(VENV) demo-output build *.egg-info
