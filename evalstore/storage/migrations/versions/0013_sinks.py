"""The position of each sink in the outbox, and the lease of its runner."""

from alembic import op

revision = "0013"
down_revision = "0012"

_TABLE = """
CREATE TABLE sinks (
    name text PRIMARY KEY,
    type text NOT NULL,
    state text NOT NULL DEFAULT 'running' CHECK (state IN ('running', 'paused')),
    position bigint NOT NULL,
    position_offset integer NOT NULL DEFAULT 0,
    recorded_at timestamptz NOT NULL,
    timeline bigint NOT NULL,
    generation bigint NOT NULL DEFAULT 0,
    replay_until timestamptz,
    replay_at timestamptz,
    replay_eval_id text COLLATE "C",
    replay_occurred_at timestamptz,
    replay_event_id uuid,
    lease_owner text,
    lease_token bigint NOT NULL DEFAULT 0,
    lease_until timestamptz,
    delivered bigint NOT NULL DEFAULT 0,
    dead bigint NOT NULL DEFAULT 0,
    missed bigint NOT NULL DEFAULT 0,
    last_error text,
    failing_since timestamptz,
    gap_since timestamptz,
    delivered_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
"""


_INDEX = """
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM evaluation_events) THEN
        CREATE INDEX evaluation_events_by_recorded_at ON evaluation_events
        USING brin (recorded_at) WITH (pages_per_range = 32, autosummarize = on);
    END IF;
END $$
"""


def upgrade() -> None:
    op.execute(_TABLE)
    # An event is inserted after its evaluation was locked. So the times of an evaluation's events ascend in commit order, which
    # the start of the transaction does not: it may have waited for the lock.
    op.execute("ALTER TABLE evaluation_events ALTER COLUMN recorded_at SET DEFAULT statement_timestamp()")
    # A sink is filled from the log in this order. Rows are appended, so block ranges are enough, and cost an insert nothing.
    # A build on a log with rows would hold up storing: evalstore/storage/log_index.py builds that one after the migrations.
    op.execute(_INDEX)
