"""Sessions and sign-in links of the console, and the samples of its overview."""

from alembic import op

revision = "0021"
down_revision = "0020"

_TABLES = """
CREATE TABLE console_sessions (
    digest bytea PRIMARY KEY,
    key_id text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    used_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX console_sessions_by_use ON console_sessions (used_at);
CREATE TABLE console_links (
    digest bytea PRIMARY KEY,
    key_id text NOT NULL,
    expires_at timestamptz NOT NULL
);
CREATE TABLE overview_samples (
    at timestamptz PRIMARY KEY,
    numbers jsonb NOT NULL
);
"""


def upgrade() -> None:
    op.execute(_TABLES)
