"""Alembic's entry: runs the migrations on the connection that `evalstore.storage.migrations.upgrade` hands over."""

from alembic import context

from evalstore.storage.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
