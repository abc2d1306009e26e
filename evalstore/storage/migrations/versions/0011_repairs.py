"""The number of repairs of a record. An ETag contains it after the version."""

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    # No table is rewritten: the default is a constant.
    op.execute("ALTER TABLE evaluations ADD COLUMN repairs integer NOT NULL DEFAULT 0")
