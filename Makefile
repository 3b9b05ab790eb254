# Each target makes the environment it needs in .venv; Python 3.11 and make are all a machine has to have.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-fast contract lint format clean

demo: $(VENV)/.demo
	$(RUN) -m experiments.demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(VENV)/.test
	$(RUN) -m pytest -n 2 --dist loadscope $(ARGS)

test-fast: $(VENV)/.test
	$(RUN) -m pytest -n 2 --dist loadscope -m "not real" $(ARGS)

# Every combination of drafter, dtype, sampling, ... (tests/contract/cases.py); `make test` has a choice of them.
contract: $(VENV)/.test
	$(RUN) -m pytest -n auto --dist loadfile --full-contract tests/contract $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo "Setting up .venv ..."
	@$(PIP) --editable '.[demo]'
	@touch $@

# torch first and by exact version, so that nothing else chooses another build of it.
$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	@echo "Setting up .venv ..."
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[convert,ref,plots,test]'
	@touch $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: install it, or name it with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is older: name one with make PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV)
