"""Run the migrations on the connection from `evalstore.storage.migrations.upgrade`. Alembic imports this file."""

from alembic import context

from evalstore.storage.migrations.version import VERSION_TABLE, schema_of
from evalstore.storage.tables import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    version_table_schema=schema_of(connection),
)
context.run_migrations()
