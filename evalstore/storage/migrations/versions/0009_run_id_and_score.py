"""Add the run of an evaluation, and the score of its result."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    # A column without a default rewrites no table. Workers of the previous release name their columns in each INSERT.
    op.execute("ALTER TABLE evaluations ADD COLUMN run_id text, ADD COLUMN score double precision")
    op.execute("ALTER TABLE evaluation_events ADD COLUMN run_id text, ADD COLUMN score double precision")
