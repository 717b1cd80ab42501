# Each target makes .venv and installs what it needs; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
RUFF := ruff==0.17.6

.PHONY: train test lint

train: .venv/installed
	$(BIN)/python train.py --output runs/first --resume

test: lint
	$(BIN)/python -m pytest -q --doctest-modules copo.py tests

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt $(RUFF)
	touch $@
