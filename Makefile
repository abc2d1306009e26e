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

# Two at a time: tests wait for servers and processes more than they compute. JOBS=0 runs them one by one. They kill servers and
# processes at chance moments, on a machine that may be busy: one that fails is run again with nothing beside it, and must pass there.
JOBS ?= 2
test: setup check
	$(BIN)/pytest --numprocesses $(JOBS) --dist worksteal || $(BIN)/pytest --last-failed --last-failed-no-failures none --exitfirst

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
	uv export --quiet --no-emit-project --extra worker --extra api --extra otel --no-header --format requirements-txt --output-file deploy/requirements.lock

clean:
	rm -rf .venv .bench-venv .evalstore

# evalstore beside what else one would use; the others live in an environment of their own. BENCH takes options, like --quick.
.PHONY: bench bench-large
bench: setup .bench-venv/.setup
	$(BIN)/python -m bench --peers .bench-venv/bin/python $(BENCH)

# The same with ten million evaluations stored before, and a queue of a million events: needs 30 GB of disk and an hour.
bench-large: setup .bench-venv/.setup
	$(BIN)/python -m bench --large --peers .bench-venv/bin/python $(BENCH)

.bench-venv/.setup: requirements.lock requirements-bench.lock
	$(PYTHON) -m venv .bench-venv
	echo '*' > .bench-venv/.gitignore
	.bench-venv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock -r requirements-bench.lock
	touch $@

# What tries to make the broker lose, strand, repeat or stall messages.
.PHONY: chaos chaos-stock soak
chaos: setup
	$(BIN)/pytest tests/chaos

# The same against Dramatiq's own Redis broker, to see it fail.
chaos-stock: setup
	-EVALSTORE_CHAOS_BROKER=stock $(BIN)/pytest tests/chaos --tb=line

# Ten minutes of senders at 2,000 events a second while servers and workers are killed at random. SOAK takes options, like --seed 1.
soak: setup
	$(BIN)/python -m tests.chaos.soak $(SOAK)
