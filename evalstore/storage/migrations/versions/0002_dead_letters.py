"""Add dead letters, and a table for probe writes."""

from alembic import op

revision = "0002"
down_revision = "0001"

_TABLES = """
CREATE TABLE dead_letters (
    id uuid PRIMARY KEY,
    state text NOT NULL DEFAULT 'dead',
    queue text NOT NULL,
    actor text,
    eval_id text COLLATE "C",
    event_id uuid,
    message bytea NOT NULL,
    error_class text NOT NULL,
    error_message text NOT NULL,
    traceback text NOT NULL,
    signature text NOT NULL,
    deliveries integer NOT NULL,
    attempts integer NOT NULL,
    first_at timestamptz NOT NULL,
    last_at timestamptz NOT NULL,
    host text,
    release text,
    redrives integer NOT NULL DEFAULT 0,
    redrive uuid
);
CREATE INDEX dead_letters_by_time ON dead_letters (last_at);
CREATE INDEX dead_letters_by_signature ON dead_letters (signature);
CREATE INDEX dead_letters_by_evaluation ON dead_letters (eval_id);
CREATE TABLE probes (
    name text PRIMARY KEY,
    at timestamptz NOT NULL
);
CREATE INDEX dead_letters_by_redrive ON dead_letters (redrive) WHERE redrive IS NOT NULL;
"""


def upgrade() -> None:
    op.execute(_TABLES)
