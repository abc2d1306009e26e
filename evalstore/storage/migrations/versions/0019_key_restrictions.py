"""Restrictions and rates of keys.

A key with a restriction has its scopes in `restricted_scopes` and none in `scopes`. A service of the release before does not
know restrictions: it refuses such a key.
"""

from alembic import op

revision = "0019"
down_revision = "0018"

_COLUMNS = """
ALTER TABLE api_keys
    ADD COLUMN restricted_scopes text[],
    ADD COLUMN submitter text,
    ADD COLUMN run_prefix text,
    ADD COLUMN rate_requests integer,
    ADD COLUMN rate_period_s integer
"""


def upgrade() -> None:
    op.execute(_COLUMNS)
