# Each target makes the environment it needs; Python 3.11 and make are all a machine has to have.
# Users and the demo have .venv. Tests have .venv-test: transformers 4.33.3, which they compare with, needs an old
# tokenizers, which must not replace the user's. .venv-newest is the newest tokenizers alone, put in front of that.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
TEST := .venv-test
NEWEST := .venv-newest
PIP := -m pip install --quiet --disable-pip-version-check
# Nearly all the time of the tests goes into compiling; the programs are kept for two weeks. PROGRAMS= compiles all anew.
PROGRAMS := .pytest_cache/programs
PYTEST := $(TEST)/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(if $(PROGRAMS),--programs=$(PROGRAMS))

# The modules' bytecode is kept: both workers and every process of a test would compile all of it again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo serve-demo test test-fast test-newest full contract lint format clean

demo: $(VENV)/.demo
	$(VENV)/bin/python -m experiments.demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(ARGS)

# A server that learns from a stream of questions, with its dashboard.
serve-demo: $(VENV)/.serve
	$(VENV)/bin/python -m experiments.serve_demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(TEST)/.ready $(NEWEST)/.ready
	$(PYTEST) $(ARGS)
	$(if $(ARGS),,@$(MAKE) --no-print-directory test-newest)

test-fast: $(TEST)/.ready
	$(PYTEST) -m "not real" $(ARGS)

# The tests of tokenizers once more, with the release that users get. Modules that import transformers cannot be.
test-newest: $(TEST)/.ready $(NEWEST)/.ready
	PYTHONPATH=$(NEWEST) $(PYTEST) -m tokenizers tests/importing tests/data $(ARGS)

# What `make test` has a choice of: tests marked `full`, and every combination of the contract's axes
# (tests/contract/cases.py), tens of thousands, which take days. `make full ARGS=tests/decode` for a part.
full: $(TEST)/.ready $(NEWEST)/.ready
	$(PYTEST) --full $(ARGS)

contract: $(TEST)/.ready
	$(PYTEST) --full tests/contract $(ARGS)

lint: $(TEST)/.ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy

format: $(TEST)/.ready
	$(TEST)/bin/ruff check --fix .
	$(TEST)/bin/ruff format .

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo "Setting up $(VENV) ..."
	@$(VENV)/bin/python $(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.serve: $(VENV)/.demo
	@$(VENV)/bin/python $(PIP) --editable '.[demo,serve,client]'
	@touch $@

# torch first and by exact version, so that nothing else chooses another build of it.
$(TEST)/.ready: pyproject.toml | $(TEST)/bin/python
	@echo "Setting up $(TEST) ..."
	@$(TEST)/bin/python $(PIP) torch==2.13.0
	@$(TEST)/bin/python $(PIP) --editable '.[convert,ref,plots,test]'
	@touch $@

$(NEWEST)/.ready: pyproject.toml | $(TEST)/bin/python
	@$(TEST)/bin/python $(PIP) --upgrade --no-deps --target $(NEWEST) tokenizers
	@touch $@

$(VENV)/bin/python $(TEST)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: install it, or name it with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is older: name one with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("$@" == "$(TEST)/bin/python" and sys.version_info[:2] != (3, 11))' \
	  || { echo "The tests compare with transformers 4.33.3, which needs Python 3.11 ($(PYTHON) is another): install it, or name it with make PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(@D)/..

clean:
	rm -rf $(VENV) $(TEST) $(NEWEST) $(PROGRAMS)
