# Only `make install` and what depends on it touch .venv; a second run changes nothing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Two test processes share the machine: one thread each, and nothing is sent to W&B.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 WANDB_MODE=offline WANDB_SILENT=true

.DEFAULT_GOAL := help
.PHONY: help install demo test thresholds killtest check format clean

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install: .venv/.installed  ## create .venv and install switchlora with its development tools

.venv/.installed: pyproject.toml
	@echo "Installing switchlora into .venv (the first time this takes some minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: .venv/.installed  ## train a small ViT on Fashion-MNIST, switch, and show the result
	$(BIN)/switchlora +experiments=demo

test: .venv/.installed  ## run the tests
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

killtest: .venv/.installed  ## kill a run 30 times and compare with an uninterrupted one
	$(TEST_ENV) $(BIN)/python scripts/killtest.py

thresholds: .venv/.installed  ## sweep the switch threshold: table, pictures and page, in an hour
	$(BIN)/switchlora +experiments=thresholds
	$(BIN)/python scripts/tables.py runs/thresholds/sweep --out experiments/thresholds
	$(BIN)/python scripts/report.py runs/thresholds/sweep --out experiments/thresholds/report.html

check: .venv/.installed  ## lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.installed  ## rewrite the code in its one format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove caches and build output; .venv, data/ and runs/ stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find switchlora tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
