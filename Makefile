# Only `make install` and what depends on it touch .venv; a second run changes nothing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Two test processes share the machine: one thread each. Nothing is sent to W&B, and no file is compiled twice.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 WANDB_MODE=offline WANDB_SILENT=true PYTHONDONTWRITEBYTECODE=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-hard test-oldest test-newest thresholds systems frontier guard pretrained reflora scaling killtest card check docs format clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: .venv/.installed  ## create .venv and install switchlora with its development tools

.venv/.installed: pyproject.toml
	@echo "Installing switchlora into .venv (the first time this takes some minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: .venv/.installed  ## train a small ViT on Fashion-MNIST, switch, and show the result
	$(BIN)/switchlora +experiments=demo
	$(BIN)/switchlora-bench phases runs/demo --rounds 10

test: .venv/.installed  ## run the tests
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-hard: .venv/.installed  ## run the tests with other kernels, threads, orders, under load, as another user
	$(BIN)/python scripts/test_hard.py

test-oldest: .venv/.installed  ## run the tests with the oldest packages that pyproject.toml admits
	$(BIN)/python scripts/test_versions.py oldest

test-newest: .venv/.installed  ## run the tests with the newest release of every package
	$(BIN)/python scripts/test_versions.py newest

systems: .venv/.installed  ## run every system of the field on the same images and make their table, in hours
	$(BIN)/python scripts/systems.py
	cp runs/systems/tuning.json experiments/systems
	$(BIN)/python scripts/tables.py runs/systems/sweep --preset systems --notes runs/systems/tuning.md --out experiments/systems
	$(BIN)/python scripts/systems_speed.py runs/systems/sweep --out experiments/systems

frontier: .venv/.installed  ## switched runs above full training of the same cost? table and picture
	$(BIN)/switchlora +experiments=frontier
	$(BIN)/switchlora +experiments=systems +method=update_norm seed=0,1,2,3,4 hydra.sweep.dir=runs/frontier/settled
	$(BIN)/switchlora +experiments=systems +method=full seed=0,1,2,3,4 hydra.sweep.dir=runs/frontier/full
	$(BIN)/switchlora +experiments=systems +method=full_short length=0.6,0.7,0.8,0.9 seed=0,1,2,3,4 hydra.sweep.dir=runs/frontier/full
	$(BIN)/python scripts/tables.py runs/frontier --preset systems --out experiments/frontier

guard: .venv/.installed  ## switch too early on purpose, with and without a guard
	$(BIN)/switchlora +experiments=guard
	$(BIN)/python scripts/tables.py runs/guard/sweep --preset systems --out experiments/guard

pretrained: .venv/.installed  ## fine-tune a pretrained ViT-S/14, all of it or by adapters, each at its own rate
	$(BIN)/python scripts/systems.py pretrained
	cp runs/pretrained/tuning.json experiments/pretrained
	$(BIN)/python scripts/tables.py runs/pretrained/sweep --preset systems --notes runs/pretrained/tuning.md --out experiments/pretrained

# A start where B is not 0 needs no warm-up of the refactoring.
REFLORA := $(BIN)/switchlora +experiments=reflora
WITH_SGD := recipe@full=sgd full.optimizer.lr=0.01
BALANCED := switch/init=balanced adapter.factor_lr=1,3,10
reflora: .venv/.installed  ## RefLoRA: factorisation, accuracy over learning rates, balanced starts
	$(BIN)/python scripts/reflora.py --out experiments/reflora
	test -f runs/pretraining/model.safetensors || $(BIN)/switchlora +experiments=pretraining
	$(REFLORA) +method=reflora adapter.refactoring.warmup_updates=30 adapter.refactoring.reset_moments=false,true adapter.factor_lr=3
	$(REFLORA) +method=reflora_s switch/init=re_init adapter.refactoring.warmup_updates=0 adapter.factor_lr=3
	for rule in "" "$(WITH_SGD)"; do \
	  $(REFLORA) $$rule || exit 1; \
	  $(REFLORA) $$rule +method=lora $(BALANCED) || exit 1; \
	  $(REFLORA) $$rule +method=reflora $(BALANCED) adapter.refactoring.warmup_updates=0 || exit 1; \
	done
	$(BIN)/python scripts/reflora_rates.py runs/reflora/sweep --out experiments/reflora

scaling: .venv/.installed  ## loss against training FLOPs, dense and low-rank, images and text
	$(BIN)/switchlora +experiments=scaling
	$(BIN)/python scripts/scaling.py runs/scaling/sweep --out experiments/scaling
	$(BIN)/switchlora +experiments=scaling_text
	$(BIN)/python scripts/scaling.py runs/scaling_text/sweep --out experiments/scaling_text

# The folders of the sweeps are METHOD_SEED; a card compares with full training of all seeds but its own run.
card: .venv/.installed  ## what a switch changes besides accuracy: cards of three settings, in hours
	$(BIN)/switchlora -m +experiments=systems +method=full,update_norm,prelora,relora seed=0,1,2 hydra.sweep.dir=runs/card/systems 'hydra.sweep.subdir=$${method}_$${seed}'
	$(BIN)/switchlora -m +experiments=demo +method=full,update_norm seed=0,1,2 hydra.sweep.dir=runs/card/demo 'hydra.sweep.subdir=$${method}_$${seed}'
	$(BIN)/switchlora -m +experiments=systems data=digits model=digits data.train_size=null epochs=20 monitor.window=10 full.scheduler.warmup_t=20 +method=full,update_norm,prelora,relora seed=0,1,2 hydra.sweep.dir=runs/card/digits 'hydra.sweep.subdir=$${method}_$${seed}'
	for set in systems demo digits; do \
	  ood=digits; test $$set = digits && ood=fashion_mnist; \
	  for run in runs/card/$$set/*_[0-9]; do \
	    out=experiments/card/$$set/$$(basename $$run); \
	    $(BIN)/switchlora-runs card $$run --no-cost --ood data=$$ood --output $$out --against $$(ls -d runs/card/$$set/full_[0-9] | grep -v $$run) && rm $$out/card.html || exit 1; \
	  done; \
	  $(BIN)/switchlora-runs cards experiments/card/$$set > experiments/card/$$set/table.md; \
	done

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

docs: .venv/.installed  ## build the documentation in docs/_build
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

format: .venv/.installed  ## rewrite the code in its one format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove caches and build output; .venv, data/ and runs/ stay
	rm -rf build dist docs/_build .mypy_cache .pytest_cache .ruff_cache
	find switchlora tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
