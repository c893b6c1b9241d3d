# The two commands of README, and what .ci/run is made of.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What `test-clients` installs stays out of the environment of the tests.
CLIENTS := $(VENV)/clients
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-slow test-matrix test-short test-clients check notebooks docs wheel clean

$(VENV)/.train: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[train]"
	touch $@

$(VENV)/.test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/.docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

$(CLIENTS)/.done: pyproject.toml
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --upgrade pip
	$(CLIENTS)/bin/python -m pip install --quiet --editable ".[flax]" \
	  "recurrentgemma>=1.0.1" "pytest>=8.3"
	$(CLIENTS)/bin/python -m pip install --quiet --no-deps \
	  "google-tunix>=0.1.7" "timesfm>=3.0.2"
	touch $@

demo: $(VENV)/.train  ## trains a dense and a sparse model on real text; pictures in out/
	$(BIN)/python examples/train_lm.py --out out

test: $(VENV)/.test  ## all tests but the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/.test  ## the rest: each case on every backend, laws on all examples
	SADSL_WHOLE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# What touches jax's own interfaces: compilers, lowering, one test of each backend.
SHORT ?= tests/lowering/targets tests/sadsl/analysis/test_lower.py \
  tests/sadsl/analysis/test_lower_terms.py tests/sadsl/run/test_float64.py \
  tests/pallas_kernels/test_x64.py
PYTHON_OLD ?= python3.11
PYTHON_NEW ?= python3.12

test-matrix:  ## a short suite on Python 3.11 with jax 0.10 and on 3.12 with the newest jax
	$(MAKE) PYTHON=$(PYTHON_OLD) VENV=$(VENV)/3.11 test-short
	$(MAKE) PYTHON=$(PYTHON_NEW) VENV=$(VENV)/3.12 test-short

test-short: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(SHORT)

test-clients: $(VENV)/.test $(CLIENTS)/.done  ## code of others with one line swapped
	$(BIN)/python tests/clients/flax_suite.py
	for c in timesfm flax_lm1b flax_gemma tunix recurrentgemma; do \
	  $(CLIENTS)/bin/python tests/clients/$${c}_client.py || exit 1; done

check: $(VENV)/.test  ## lint, types, import arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

notebooks: $(VENV)/.test  ## runs every notebook
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 notebooks

docs: $(VENV)/.docs  ## builds the pages into docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html

wheel: $(VENV)/.test  ## builds the wheel and uses it outside of the checkout
	./.ci/wheel $(PYTHON)

clean:
	rm -rf $(VENV) out dist docs/_build docs/api docs/notebooks
	rm -rf .pytest_cache .ruff_cache .hypothesis
