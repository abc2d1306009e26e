"""Add keys of the HTTP service, and an index for its lists."""

from alembic import op

revision = "0004"
down_revision = "0003"

_TABLES = """
CREATE TABLE api_keys (
    key_id text PRIMARY KEY,
    name text NOT NULL,
    digest bytea NOT NULL,
    scopes text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz
);
CREATE INDEX evaluations_by_time ON evaluations (created_at);
"""


def upgrade() -> None:
    op.execute(_TABLES)
