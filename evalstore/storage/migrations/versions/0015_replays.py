"""Replays in the background, and the ranges of ids that their jobs work through."""

from alembic import op

revision = "0015"
down_revision = "0014"

_REPLAYS = """
CREATE TABLE replays (
    id uuid PRIMARY KEY,
    asked_at timestamptz NOT NULL DEFAULT now(),
    actor text NOT NULL,
    reason text,
    filter jsonb NOT NULL,
    write boolean NOT NULL,
    rate double precision,
    state text NOT NULL DEFAULT 'running' CHECK (state IN ('running', 'done', 'cancelled', 'failed')),
    error text,
    total bigint NOT NULL,
    paced_until timestamptz,
    started_at timestamptz,
    finished_at timestamptz
);
CREATE INDEX replays_by_time ON replays (asked_at);
CREATE INDEX replays_running ON replays (id) WHERE state = 'running';
CREATE TABLE replay_ranges (
    replay uuid NOT NULL,
    number integer NOT NULL,
    position text COLLATE "C" NOT NULL,
    last text COLLATE "C",
    is_done boolean NOT NULL DEFAULT false,
    evaluations bigint NOT NULL DEFAULT 0,
    different bigint NOT NULL DEFAULT 0,
    unrepairable bigint NOT NULL DEFAULT 0,
    differences jsonb NOT NULL DEFAULT '[]',
    PRIMARY KEY (replay, number)
);
"""


def upgrade() -> None:
    op.execute(_REPLAYS)
