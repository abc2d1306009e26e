PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.setup

.PHONY: setup demo test check docs lock clean

# One virtual environment with everything, at the versions and hashes of the lock files.
setup: $(SETUP)

$(SETUP): requirements.lock requirements-demo.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-demo.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(SETUP)

demo: setup
	$(BIN)/evalstore demo

test: setup check
	$(BIN)/pytest

# What pre-commit runs too: style, types, and which room may import which.
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The parts of the documentation that follow from the code.
docs: setup
	$(BIN)/python docs/generate.py

# Names and hashes only; uv.lock names registry addresses and stays out of the repository.
lock:
	uv lock
	uv export --quiet --no-emit-project --all-extras --no-header --format requirements-txt --output-file requirements.lock
	uv export --quiet --no-emit-project --extra worker --no-header --format requirements-txt --output-file deploy/requirements.lock

clean:
	rm -rf .venv .evalstore
