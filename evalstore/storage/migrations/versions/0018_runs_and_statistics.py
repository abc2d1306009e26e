"""Runs, statistics by hour, and what each evaluation adds to both. list_indexes.py builds the indexes of lists afterwards."""

from alembic import op

revision = "0018"
down_revision = "0017"

_TABLES = """
CREATE TABLE counted_evaluations (
    eval_id text COLLATE "C" PRIMARY KEY,
    run_id text,
    submitter text,
    language text,
    executor_id text,
    status text NOT NULL,
    hour timestamptz,
    passed boolean NOT NULL,
    score double precision,
    duration_ms double precision,
    memory_bytes bigint
);
CREATE TABLE statistics (
    dimension text NOT NULL,
    value_key bytea NOT NULL,
    hour timestamptz NOT NULL,
    value text,
    queued bigint NOT NULL DEFAULT 0,
    running bigint NOT NULL DEFAULT 0,
    completed bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0,
    timed_out bigint NOT NULL DEFAULT 0,
    cancelled bigint NOT NULL DEFAULT 0,
    lost bigint NOT NULL DEFAULT 0,
    passed bigint NOT NULL DEFAULT 0,
    scores bigint NOT NULL DEFAULT 0,
    score_sum numeric NOT NULL DEFAULT 0,
    durations bytea NOT NULL DEFAULT '\\x80',
    memory bytea NOT NULL DEFAULT '\\x80',
    PRIMARY KEY (dimension, value_key, hour)
) WITH (fillfactor = 70);
CREATE INDEX statistics_by_hour ON statistics (dimension, hour);
CREATE TABLE runs (
    run_id text COLLATE "C" PRIMARY KEY,
    expected bigint,
    closed boolean NOT NULL DEFAULT false,
    submitter text,
    is_mixed boolean NOT NULL DEFAULT false,
    queued bigint NOT NULL DEFAULT 0,
    running bigint NOT NULL DEFAULT 0,
    completed bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0,
    timed_out bigint NOT NULL DEFAULT 0,
    cancelled bigint NOT NULL DEFAULT 0,
    lost bigint NOT NULL DEFAULT 0,
    passed bigint NOT NULL DEFAULT 0,
    scores bigint NOT NULL DEFAULT 0,
    score_sum numeric NOT NULL DEFAULT 0,
    durations bytea NOT NULL DEFAULT '\\x80',
    memory bytea NOT NULL DEFAULT '\\x80',
    first_at timestamptz NOT NULL DEFAULT now(),
    last_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    changes smallint NOT NULL DEFAULT 0
) WITH (fillfactor = 70);
CREATE INDEX runs_by_time ON runs (first_at, run_id);
CREATE INDEX runs_to_check ON runs (run_id) WHERE changes > 0;
"""


def upgrade() -> None:
    op.execute(_TABLES)
