"""Alembic's entry: run the migrations on the connection that `storage.migrations.upgrade` hands over."""

from alembic import context

from models.tables import metadata
from storage.migrations.version import VERSION_TABLE, schema_of

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    version_table_schema=schema_of(connection),
)
context.run_migrations()
