"""Add the place of content: the database, the object store or the archive."""

from alembic import op

revision = "0005"
down_revision = "0004"

_TABLES = """
ALTER TABLE contents
    ADD COLUMN store text CHECK (store IN ('objects', 'archive')),
    ADD COLUMN encoding text CHECK (encoding IN ('identity', 'zstd')),
    ADD COLUMN recorded_at timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN failures integer NOT NULL DEFAULT 0,
    ADD COLUMN failure text,
    ADD COLUMN retry_at timestamptz;
"""


def upgrade() -> None:
    op.execute(_TABLES)
