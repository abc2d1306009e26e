"""Add grants: which key of the HTTP service uploaded which content."""

from alembic import op

revision = "0007"
down_revision = "0006"

_TABLES = """
CREATE TABLE content_grants (
    key_id text NOT NULL,
    sha256 bytea NOT NULL,
    size bigint NOT NULL,
    encoding text NOT NULL,
    granted_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (key_id, sha256)
);
CREATE INDEX content_grants_by_age ON content_grants (granted_at);
"""


def upgrade() -> None:
    op.execute(_TABLES)
