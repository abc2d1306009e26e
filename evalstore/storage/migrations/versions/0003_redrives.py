"""Add redrives of dead letters, and the actions of operators."""

from alembic import op

revision = "0003"
down_revision = "0002"

_TABLES = """
CREATE TABLE redrives (
    id uuid PRIMARY KEY,
    asked_at timestamptz NOT NULL DEFAULT now(),
    actor text NOT NULL,
    reason text,
    filter jsonb NOT NULL,
    rate double precision,
    canary integer,
    state text NOT NULL DEFAULT 'running',
    error text,
    total integer NOT NULL,
    sent integer NOT NULL DEFAULT 0,
    stored integer NOT NULL DEFAULT 0,
    died integer NOT NULL DEFAULT 0,
    returned integer NOT NULL DEFAULT 0,
    started_at timestamptz,
    paced_until timestamptz,
    finished_at timestamptz
);
CREATE INDEX redrives_by_time ON redrives (asked_at);
CREATE INDEX redrives_unfinished ON redrives (id) WHERE finished_at IS NULL;
CREATE TABLE operator_actions (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT now(),
    actor text NOT NULL,
    verb text NOT NULL,
    reason text,
    filter jsonb NOT NULL,
    count integer NOT NULL,
    redrive uuid,
    details jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX operator_actions_by_time ON operator_actions (at);
ALTER TABLE dead_letters ADD COLUMN sent_at timestamptz;
CREATE INDEX dead_letters_redriving ON dead_letters (id) WHERE state = 'redriving';
CREATE INDEX dead_letters_unsent ON dead_letters (redrive, first_at, id) WHERE state = 'redriving' AND sent_at IS NULL;
"""


def upgrade() -> None:
    op.execute(_TABLES)
