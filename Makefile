# Each target makes .venv and installs what it needs; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
RUFF := ruff==0.17.6
PEFT := peft==0.21.2

.PHONY: train test lint results

train: .venv/installed
	$(BIN)/python train.py --output runs/first --resume

test: lint
	$(BIN)/python -m pytest -q --doctest-modules copo.py tokens.py tables.py tests

# One thread a training and two trainings at once; every run that results/ holds already is skipped.
results: export OMP_NUM_THREADS := 1
results: .venv/installed
ifdef QUICK
	$(BIN)/python experiments.py runs tokens --quick
	$(BIN)/python results.py --compare runs/quick
else
	$(BIN)/python experiments.py runs tokens
	env -u OMP_NUM_THREADS $(BIN)/python experiments.py first
	$(BIN)/python results.py
endif

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt $(RUFF) $(PEFT)
	touch $@
