"""The only package that speaks to PostgreSQL and the object store."""

import logging

# Alembic tells of each of its plugins as it is imported.
logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)
