"""Add evaluations, their event log, large contents, and the outbox of confirmations."""

from alembic import op

revision = "0001"
down_revision = None

_TABLES = """
CREATE TABLE evaluations (
    eval_id text COLLATE "C" PRIMARY KEY,
    status text NOT NULL,
    attempt integer NOT NULL,
    version integer NOT NULL,
    language text,
    submitter text,
    executor_id text,
    container_id text,
    exit_code bigint,
    duration_ms double precision,
    memory_bytes bigint,
    timeout_s double precision,
    reason text,
    metadata jsonb NOT NULL,
    queued_at timestamptz,
    started_at timestamptz,
    finished_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    code_event_id uuid,
    result_event_id uuid
) WITH (fillfactor = 85);
CREATE INDEX evaluations_open ON evaluations (updated_at) WHERE status IN ('queued', 'running');

CREATE TABLE evaluation_events (
    eval_id text COLLATE "C",
    event_id uuid,
    type text NOT NULL,
    attempt integer NOT NULL,
    occurred_at timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    metadata jsonb,
    language text,
    submitter text,
    executor_id text,
    container_id text,
    timeout_s double precision,
    exit_code bigint,
    duration_ms double precision,
    memory_bytes bigint,
    reason text,
    code bytea,
    output bytea,
    error bytea,
    extra text,
    PRIMARY KEY (eval_id, event_id)
);

CREATE TABLE contents (
    eval_id text COLLATE "C",
    event_id uuid,
    kind text,
    size bigint NOT NULL,
    sha256 bytea NOT NULL,
    data bytea,
    PRIMARY KEY (eval_id, event_id, kind)
);

CREATE TABLE confirmations (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    count integer NOT NULL,
    body text NOT NULL,
    relayed_at timestamptz,
    stream_ms bigint,
    stream_seq bigint
);
CREATE INDEX confirmations_pending ON confirmations (id) WHERE relayed_at IS NULL;

CREATE TABLE confirmation_position (
    id smallint DEFAULT 1 PRIMARY KEY CHECK (id = 1),
    stream_ms bigint NOT NULL DEFAULT 0,
    stream_seq bigint NOT NULL DEFAULT 0
);
INSERT INTO confirmation_position DEFAULT VALUES;
-- Written once, read once: compressing it would cost more than the space.
ALTER TABLE confirmations ALTER COLUMN body SET STORAGE EXTERNAL;
"""

# lz4 compresses outputs several times faster than the default. Servers built without lz4 keep the default.
_COMPRESSION = """
DO $$ BEGIN
    ALTER TABLE contents ALTER COLUMN data SET COMPRESSION lz4;
    ALTER TABLE evaluation_events ALTER COLUMN code SET COMPRESSION lz4;
    ALTER TABLE evaluation_events ALTER COLUMN output SET COMPRESSION lz4;
    ALTER TABLE evaluation_events ALTER COLUMN error SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN NULL;
END $$
"""


def upgrade() -> None:
    op.execute(_TABLES)
    op.execute(_COMPRESSION)
