"""The limit of the batch that a sink was given last, and what a sink keeps for the next process."""

from alembic import op

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    op.execute(
        "ALTER TABLE sinks ADD COLUMN batch_limit jsonb, ADD COLUMN sink_state jsonb, ADD COLUMN replayed_until timestamptz"
    )
