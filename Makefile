# `make example` and `make test` do all the set-up on a bare machine with Python 3.11 or later, which
# the versions pinned in constraints.txt need; the package itself runs on 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/ns_2d
# Marks a finished installation: a changed pin or dependency renews it.
INSTALLED := $(VENV)/.installed

.PHONY: install example example-traffic test test-all test-gpu lint types docs bench ablation \
	traffic-week clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

example: install
	$(BIN)/python examples/ns_2d.py --seeds 1 --out $(OUT)

example-traffic: install
	$(BIN)/python examples/metr_la.py

test: lint types docs
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-all: lint types docs
	$(BIN)/python -m pytest -n 2 -m "not gpu"

# All checks that need a CUDA device, in one command.
test-gpu: install
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/grid_loss.py --device cuda
	$(BIN)/python benchmarks/graph_loss.py --device cuda
	$(BIN)/python benchmarks/neuralop_epoch.py --device cuda

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: install
	$(BIN)/mypy

# Warnings are errors, and names in single backticks must be in the reference.
docs: install
	$(BIN)/python -m sphinx -E -W -n -q docs docs/_build

bench: install
	$(BIN)/python benchmarks/grid_loss.py
	$(BIN)/python benchmarks/graph_loss.py
	$(BIN)/python benchmarks/navier_stokes_convergence.py
	$(BIN)/python benchmarks/neuralop_epoch.py
	$(BIN)/python benchmarks/graph_teacher.py

# An hour or two on two cores; DATA is a folder with traffic files.
ablation: install
	$(BIN)/python benchmarks/ablation.py $(if $(DATA),--data $(DATA))

traffic-week: install
	$(BIN)/python benchmarks/traffic_week.py --data $(DATA)

clean:
	rm -rf $(VENV) build dist *.egg-info runs docs/_build docs/_pictures docs/benchmarks
