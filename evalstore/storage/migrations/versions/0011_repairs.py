"""How often a record was repaired at its version: an ETag names both."""

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    # No table is rewritten: the default is a constant.
    op.execute("ALTER TABLE evaluations ADD COLUMN repairs integer NOT NULL DEFAULT 0")
