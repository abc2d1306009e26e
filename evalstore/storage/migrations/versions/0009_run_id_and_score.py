"""The run of an evaluation, and the score of its result."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    # Columns without a default rewrite no table. Workers of the release before name their columns, and go on.
    op.execute("ALTER TABLE evaluations ADD COLUMN run_id text, ADD COLUMN score double precision")
    op.execute("ALTER TABLE evaluation_events ADD COLUMN run_id text, ADD COLUMN score double precision")
