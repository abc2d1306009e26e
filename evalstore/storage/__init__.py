"""The only package that speaks to PostgreSQL and the object store."""

import logging

# Alembic tells of each plugin as it is imported, and of each look at the schema.
logging.getLogger("alembic").setLevel(logging.WARNING)
