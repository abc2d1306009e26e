"""What a record needs to take up an event without the events before it."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    # No table is rewritten: the default is a constant. Workers of the release before name their columns, and go on.
    op.execute(
        "ALTER TABLE evaluations ADD COLUMN metadata_truncated boolean NOT NULL DEFAULT false,"
        " ADD COLUMN merge_state bytea, ADD COLUMN merge_version integer"
    )
    op.execute(
        "ALTER TABLE evaluations ALTER COLUMN merge_state SET STORAGE EXTERNAL"
    )  # mostly UUIDs: compressing it is in vain
