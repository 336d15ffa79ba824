# Everything starts from Python 3.11 and nothing else; `make` lists what there is.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
OUT ?= reports
WORKERS ?= 1
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV := uv==0.13.8

.DEFAULT_GOAL := help
.PHONY: help setup hooks reports reports-all data test test-slow nb lint lab docs browser bench lock clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup: $(READY) hooks  ## Make .venv as requirements.lock says (a moment if it is there), and git's hooks for notebooks

$(READY): requirements.lock settings.ini setup.py
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "Python 3.11 is needed and '$(PYTHON)' is not it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	@echo "Installing requirements.lock into $(VENV) ..."
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

# The part of nbdev_install_hooks that belongs to this repository, kept in its .git: notebooks are merged cell by cell,
# and those that a merge brings are trusted. Nothing is written into the home folder; another post-merge hook stays.
hooks:
	@if prefix=$$(git rev-parse --show-prefix 2>/dev/null) && [ -z "$$prefix" ]; then set -e; \
	  git config --local merge.nbdev-merge.name 'resolve conflicts with nbdev_fix'; \
	  git config --local merge.nbdev-merge.driver "'$(CURDIR)/$(BIN)/nbdev_merge' %O %A %B %P"; \
	  folder=$$(git rev-parse --git-common-dir); mkdir -p "$$folder/info" "$$folder/hooks"; \
	  attributes="$$folder/info/attributes" hook="$$folder/hooks/post-merge"; \
	  grep -qs 'merge=nbdev-merge' "$$attributes" || echo '*.ipynb merge=nbdev-merge' >> "$$attributes"; \
	  test -e "$$hook" || { printf '#!/bin/sh\ntrust="%s/nbdev_trust"\n! test -x "$$trust" || "$$trust"\n' '$(CURDIR)/$(BIN)' > "$$hook"; \
	    chmod +x "$$hook"; }; \
	fi

reports: setup  ## Execute the starter suite into reports/starter (OUT=FOLDER, WORKERS=2: two at a time)
	@$(BIN)/medclip-nb suite nbs/experiments/suites/starter.yaml --out $(OUT) --workers $(WORKERS)

reports-all: reports  ## What goes on from there as well: more seeds, few labels, corruptions, an ablation (an hour)
	@$(BIN)/medclip-nb suite nbs/experiments/suites/starter-more.yaml --out $(OUT) --workers $(WORKERS)
	@$(BIN)/medclip-nb suite nbs/experiments/suites/ablation.yaml --out $(OUT) --workers $(WORKERS)

test: lint  ## Style and types, modules in step, notebooks clean, README current, library notebooks, pytest
	@$(BIN)/python tests/repository.py
	@$(MAKE) --no-print-directory data
	@OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks.py --workers 2
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

data: setup  ## Make the embedded data in data/starter (a moment if they are there)
	@$(BIN)/python -c "from medclip_nb.datasets import load_manifest as load; \
	  [load('starter', 'data/starter', view=view) for view in ('slices', 'studies')]"

test-slow: setup  ## What takes long: fresh reports with their goals
	@$(BIN)/python -m pytest -m slow

nb: setup  ## Run the tests of one notebook: make nb NB=nbs/00_core.ipynb
	@test -f "$(NB)" || { echo "Which notebook? make nb NB=nbs/00_core.ipynb"; exit 1; }
	@OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks.py $(NB)

lint: setup  ## Style (ruff) and types (pyrefly)
	@$(BIN)/ruff check --quiet
	@$(BIN)/pyrefly check --summary=none

lab: setup  ## Open the repository in JupyterLab, at nbs/start.ipynb (LAB="--no-browser --port 9999" passes options on)
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/start.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

docs: setup  ## Build the documentation site, _site/index.html; it needs no network and no server
	@OMP_NUM_THREADS=1 $(BIN)/python docs/make_site.py

browser:  ## Install Chromium, in which pages are tested, if there is no browser (Debian and Ubuntu, as root)
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	  chromium fonts-dejavu-core >/dev/null

bench: setup  ## Measure the speed of everything against what one would use instead: one table, benchmarks/results.json
	@$(BIN)/python benchmarks/table.py

lock: setup  ## Resolve the requirements of settings.ini anew into requirements.lock
	@$(BIN)/uv pip compile setup.py --extra dev --universal --python-version 3.11 --upgrade --no-annotate --quiet \
	  -P 'torch==2.14.1' -P 'torchvision>=0.29,<0.30' --custom-compile-command "make lock" -o requirements.lock

clean:  ## Remove what was built here (data, reports and .venv stay)
	@rm -rf build dist *.egg-info _proc _site _site_src .pytest_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -print0 | xargs -0 rm -rf
	@find reports -type d \( -name .partial -o -name '*.failed' \) -print0 | xargs -0 rm -rf
