"""Store everything in PostgreSQL. No other package runs SQL."""

import logging

# Alembic logs each plugin that it imports and each look at the schema.
logging.getLogger("alembic").setLevel(logging.WARNING)
