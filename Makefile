# make demo | test | test-slow | check | families | bench   (each sets up .venv first); make test-oldest has its own
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SPARSITY ?= 0.3

.PHONY: demo test test-slow test-oldest check families bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	# For one example only: beside the packages, because transformers imports it wherever it is installed.
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
	    --target $(VENV)/torchao torchao
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m llm_snp --sparsity $(SPARSITY) --samples 64 --sequence-length 256 --output demo-output --overwrite

# A process per core and one more, since tests wait for processes of their own, and one thread in each: threads that wait
# for busy cores cost more than they bring. Each begins with a part of its own, so that what a file of tests shares is
# mostly made once.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist worksteal \
	    -n $$($(BIN)/python -c "import os; print((os.cpu_count() or 1) + 1)")

# What `make test` leaves out, because it takes half a minute or more.
test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# What depends on transformers most, with the oldest one that is supported; and what one has written, with the other.
test-oldest: $(VENV)/.installed
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install -q --disable-pip-version-check -c constraints-oldest.txt -e . pytest pytest-xdist
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n auto tests/families tests/result/test_result_loads.py \
	    tests/running/test_end_to_end.py tests/running/test_again.py tests/result/test_stock_format.py
	rm -rf $(VENV)-oldest/written
	OMP_NUM_THREADS=1 $(BIN)/python tests/versions/write_models.py $(VENV)-oldest/written/newest
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python tests/versions/write_models.py $(VENV)-oldest/written/oldest
	OMP_NUM_THREADS=1 LLM_SNP_WRITTEN=$(VENV)-oldest/written/newest $(VENV)-oldest/bin/python -m pytest -n auto \
	    tests/versions
	OMP_NUM_THREADS=1 LLM_SNP_WRITTEN=$(VENV)-oldest/written/oldest $(BIN)/python -m pytest -n auto tests/versions

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The files of llm_snp/modeling that come from a row of llm_snp/families/llama_like.py
families: $(VENV)/.installed
	$(BIN)/python docs/families.py

# The quality table needs text: make bench CALIBRATION=train.txt EVALUATION=wiki.test.raw
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/elimination.py
ifdef CALIBRATION
	$(BIN)/python benchmarks/quality.py llm_snp/demo/opt-wiki-1m --calibration $(CALIBRATION) \
	    $(addprefix --evaluate ,$(or $(EVALUATION),wikitext2)) --sparsity 0.2 0.3 0.4 0.5 --json quality.json
endif

clean:
	rm -rf $(VENV) $(VENV)-oldest demo-output build *.egg-info
