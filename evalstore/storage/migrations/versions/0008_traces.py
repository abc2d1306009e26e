"""Add the traces that confirmations continue."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.execute("ALTER TABLE confirmations ADD COLUMN traceparents text")
    op.execute("ALTER TABLE confirmations ALTER COLUMN traceparents SET STORAGE EXTERNAL")  # Random ids do not compress.
