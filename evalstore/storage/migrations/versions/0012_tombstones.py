"""Which evaluations were erased: keyed hashes of their ids, so that who reads them learns no id."""

import secrets

from alembic import op

from evalstore.storage.tombstones import pads

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.execute("CREATE TABLE tombstones (digest bytea PRIMARY KEY, erased_at timestamptz NOT NULL DEFAULT now())")
    op.execute(
        "CREATE TABLE erasure_key (id smallint PRIMARY KEY DEFAULT 1 CHECK (id = 1),"
        " key bytea NOT NULL, inner_pad bytea NOT NULL, outer_pad bytea NOT NULL)"
    )
    key = secrets.token_bytes(32)
    values = ", ".join(f"decode('{value.hex()}', 'hex')" for value in (key, *pads(key)))
    op.execute(f"INSERT INTO erasure_key (key, inner_pad, outer_pad) VALUES ({values})")
