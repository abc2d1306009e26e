"""The traces that confirmations go on in."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.execute("ALTER TABLE confirmations ADD COLUMN traceparents text")
    op.execute("ALTER TABLE confirmations ALTER COLUMN traceparents SET STORAGE EXTERNAL")  # random: compressing it is in vain
