"""The enrichment of a record."""

from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    # Without a default the table is not rewritten.
    op.execute("ALTER TABLE evaluations ADD COLUMN enrichment jsonb")
