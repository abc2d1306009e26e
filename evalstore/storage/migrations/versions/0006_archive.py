"""Add indexes for the archive and the sweep: content that is due, and the users of an object."""

from alembic import op

revision = "0006"
down_revision = "0005"

_TABLES = """
ALTER TABLE contents ADD COLUMN occurred_at timestamptz NOT NULL DEFAULT now();
CREATE INDEX contents_by_size ON contents (store, size);
CREATE INDEX contents_by_time ON contents (store, occurred_at) WHERE store IS NULL OR store = 'objects';
CREATE INDEX contents_by_object ON contents (sha256) WHERE store IS NOT NULL;
CREATE INDEX contents_failed ON contents (retry_at) WHERE failure IS NOT NULL;
ALTER TABLE dead_letters ADD COLUMN objects bytea[] NOT NULL DEFAULT '{}';
CREATE INDEX dead_letters_by_object ON dead_letters USING gin (objects) WHERE objects <> '{}';
"""


def upgrade() -> None:
    op.execute(_TABLES)
