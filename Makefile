# Everything a fresh machine needs: python3 (3.11 or newer) with venv, make. No Debian package, no GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= .demo

.PHONY: env demo test slow lint bench clean

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

demo: env
	$(BIN)/python examples/demo_assets.py --out $(DEMO)
	$(BIN)/qcompile $(DEMO)/model.onnx --target cpu --budget 3.5bits --calib $(DEMO)/calib --preprocess "$$(cat $(DEMO)/preprocess.txt)" -o $(DEMO)/model.qc
	$(BIN)/qcompile eval $(DEMO)/model.qc --data $(DEMO)/eval.npz

test: env
	$(BIN)/python -m pytest -q

slow: env
	$(BIN)/python -m pytest -q -m slow

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache
