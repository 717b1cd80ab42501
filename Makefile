# Each target makes .venv and installs what it needs; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUFF := ruff==0.17.6
# Torch's idle threads spin, which on a busy machine takes the cores from what they wait for.
export GOMP_SPINCOUNT ?= 3000

.PHONY: train test lint results baselines integrations real

# Plain GRPO and COPO from one warm start, and both side by side.
train: .venv/installed
	$(BIN)/python train.py --output runs/grpo --lambda-s 0 --lambda-n 0 --resume
	$(BIN)/python train.py --output runs/first --resume
	$(BIN)/python report.py runs/first --beside runs/grpo

# Two processes of one thread each; `pytest` alone runs the same tests in one.
test: lint .venv/extras
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

# One thread per training and two trainings at once; every run that is in the CSVs already is skipped.
results: export OMP_NUM_THREADS := 1
results: .venv/extras
ifdef QUICK
	$(BIN)/python -m experiments.claims runs tokens --quick
	$(BIN)/python -m experiments.build --compare runs/quick
else
	$(BIN)/python -m experiments.claims runs tokens
	$(BIN)/python -m experiments.levels
	$(BIN)/python -m experiments.asking
	env -u OMP_NUM_THREADS $(BIN)/python -m experiments.claims first
	$(BIN)/python -m experiments.build
endif

# The systems that the paper compares with, one after the other on one thread; rows in the CSV are not run again.
baselines: export OMP_NUM_THREADS := 1
baselines: .venv/extras
ifdef QUICK
	$(BIN)/python -m experiments.baselines --quick
else
	$(BIN)/python -m experiments.baselines
	$(BIN)/python -m experiments.build
endif

# The first file is the short one.
integrations: .venv/trl
	$(BIN)/python -m pytest -q tests/integrations/test_copo_in_trl.py tests/integrations/long_copo_in_trl.py

# A LLaVA around a published language model: built, compared with reference.py, taught to see, and trained.
real: .venv/real
	test -d runs/real || $(BIN)/python -m experiments.real build
	test -d runs/taught || $(BIN)/python -m experiments.real teach
	$(BIN)/python -m experiments.real exact --model runs/taught
	$(BIN)/python -m experiments.real train

lint: .venv/extras
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

# What only the tests, the laboratory and --lora-rank need.
.venv/extras: .venv/installed experiments/requirements.txt gpu/requirements.txt
	$(PIP) -r experiments/requirements.txt -r gpu/requirements.txt $(RUFF)
	touch $@

.venv/trl: .venv/installed integrations/requirements.txt
	$(PIP) -r integrations/requirements.txt
	touch $@

.venv/real: .venv/extras experiments/real-requirements.txt
	$(PIP) --no-deps -r experiments/real-requirements.txt
	touch $@
