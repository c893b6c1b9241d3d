# The two commands of README, and what .ci/run is made of.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-slow test-clients check notebooks docs wheel clean

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

demo: $(VENV)/.train  ## trains a dense and a sparse model on real text; pictures in out/
	$(BIN)/python examples/train_lm.py --out out

test: $(VENV)/.test  ## all tests but the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/.test  ## the rest: each case on every backend, laws on all examples
	SADSL_WHOLE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-clients: $(VENV)/.test  ## Flax's own attention tests, from the package index
	$(BIN)/python tests/clients/flax_suite.py

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
