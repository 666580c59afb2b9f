# `make demo` shows what autohdr does, `make test` checks all of it. Both make their own .venv first.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lab bench readme scenes clean
install: $(INSTALLED)

$(INSTALLED): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "autohdr needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python's venv module is missing. On Debian or Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -U pip setuptools wheel
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/autohdr demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

lab: $(INSTALLED)
	$(BIN)/jupyter lab nbs

bench: $(INSTALLED)
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.bench

readme: $(INSTALLED)
	$(BIN)/python -m tests.readme

scenes: $(INSTALLED)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[scenes]'

clean:
	rm -rf $(VENV) build dist *.egg-info
