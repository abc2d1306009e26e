"""Add the merge state, which lets a record take up an event without reading earlier events."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    # A column with a constant default rewrites no table. Workers of the previous release name their columns in each INSERT.
    op.execute(
        "ALTER TABLE evaluations ADD COLUMN metadata_truncated boolean NOT NULL DEFAULT false,"
        " ADD COLUMN merge_state bytea, ADD COLUMN merge_version integer"
    )
    op.execute("ALTER TABLE evaluations ALTER COLUMN merge_state SET STORAGE EXTERNAL")  # Mostly UUIDs, which do not compress.
