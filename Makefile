PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.setup

.PHONY: setup setup-integrations demo test test-fast check docs lock clean

# Create one virtual environment with all dependencies, at the versions and hashes of the lock files.
setup: $(SETUP)

$(SETUP): requirements.lock requirements-demo.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-demo.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(SETUP)

# What the tests of optional parts need besides, 2 GB: clients and stand-ins of ClickHouse, BigQuery, Iceberg, Celery and Inspect AI.
# Without them these tests are skipped.
INTEGRATIONS := .venv/.integrations
setup-integrations: $(INTEGRATIONS)

$(INTEGRATIONS): $(SETUP) $(wildcard tests/environments/*.lock)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r tests/environments/integrations.lock
	for name in bqemulator inspect; do \
		$(PYTHON) -m venv .tools/$$name && \
		.tools/$$name/bin/pip install --quiet --disable-pip-version-check --require-hashes -r tests/environments/$$name.lock || exit 1; \
	done
	.tools/inspect/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/evalstore demo

# Two tests run at a time, because tests wait for servers more than they compute. JOBS=0 runs one by one. Tests kill servers and
# processes at random moments, on a machine that may be busy. A failed test runs again alone and must pass there.
JOBS ?= 2
test: setup check
	$(BIN)/pytest --numprocesses $(JOBS) --dist worksteal || $(BIN)/pytest --last-failed --last-failed-no-failures none --exitfirst

# For every save: unit tests, the house tests that start no server, and one message on its way through real servers.
test-fast: setup
	$(BIN)/pytest --numprocesses $(JOBS) --dist worksteal -q tests/unit tests/house/test_repository.py tests/house/test_logs.py \
		tests/house/test_commands.py tests/house/test_imports.py tests/integration/test_smoke.py

# Style, types, and the direction of imports. pre-commit runs it too.
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Write the parts of the documentation that derive from the code.
docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/python clients/typescript/generate.py

# Lock names and hashes only. uv.lock contains registry addresses, so it stays out of the repository.
lock:
	uv lock
	uv export --quiet --no-emit-project --extra dev --no-header --format requirements-txt --output-file requirements.lock
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --no-annotate -c requirements.lock tests/environments/integrations.in -o tests/environments/integrations.lock
	for name in bqemulator inspect; do uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --no-annotate tests/environments/$$name.in -o tests/environments/$$name.lock; done
	uv export --quiet --no-emit-project --extra worker --extra api --extra otel --extra kafka --extra clickhouse --extra bigquery --extra webhook --no-header --format requirements-txt --output-file deploy/requirements.lock

clean:
	rm -rf .venv .bench-venv .evalstore

# Compare evalstore with other queues, which have their own environment. BENCH takes options, like --quick.
.PHONY: bench bench-large
bench: setup .bench-venv/.setup
	$(BIN)/python -m bench --peers .bench-venv/bin/python $(BENCH)

# The same beside ten million stored evaluations, and with a queue of a million events. It needs 30 GB of disk and an hour.
bench-large: setup .bench-venv/.setup
	$(BIN)/python -m bench --large --peers .bench-venv/bin/python $(BENCH)

.bench-venv/.setup: requirements.lock requirements-bench.lock
	$(PYTHON) -m venv .bench-venv
	echo '*' > .bench-venv/.gitignore
	.bench-venv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock -r requirements-bench.lock
	touch $@

# Try to make the broker lose, strand, repeat or stall messages.
.PHONY: chaos chaos-stock soak
chaos: setup
	$(BIN)/pytest tests/chaos

# The same against Dramatiq's own Redis broker, which fails.
chaos-stock: setup
	-EVALSTORE_CHAOS_BROKER=stock $(BIN)/pytest tests/chaos --tb=line

# Send 2,000 events a second for ten minutes while servers and workers are killed at random. SOAK takes options, like --seed 1.
soak: setup
	$(BIN)/python -m tests.chaos.soak $(SOAK)
