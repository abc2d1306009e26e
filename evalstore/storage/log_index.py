"""The index that a replay of the event log uses. `evalstore migrate` builds it CONCURRENTLY, so storing goes on meanwhile.

A build that is interrupted leaves an invalid index, which the next `evalstore migrate` builds anew. Without the index a replay
reads the whole log for each page. An empty log gets its index in the transaction of the migrations.
"""

import time
from collections.abc import Callable
from typing import Final

from psycopg import sql
from sqlalchemy import Connection

from evalstore.storage import database

NAME: Final = "evaluation_events_by_recorded_at"
DEFINITION: Final = "USING brin (recorded_at) WITH (pages_per_range = 32, autosummarize = on)"
_RETRY_S: Final = 0.2

_IS_VALID: Final = """
SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
WHERE c.relname = %s AND c.relnamespace = quote_ident(%s)::regnamespace
"""


def ensure(conn: Connection, schema: str, lock_key: int, tell: Callable[[str], object] = lambda _: None) -> None:
    """Build the index if it is missing or invalid. Several processes may call this at once.

    `conn` has no limit of statement time. Raises DatabaseOutage (retry).
    """
    raw, is_pooled = database.driver(conn), database.is_pooled(conn)
    with database.errors():
        if raw.execute(_IS_VALID, [NAME, schema]).fetchone() == (True,):
            raw.rollback()
            return
        raw.rollback()
        raw.autocommit = True
        # A process that waited inside a statement would hold up the build that it waits for. A pooler has no session to lock.
        while not is_pooled and raw.execute("SELECT pg_try_advisory_lock(%s)", [lock_key]).fetchone() != (True,):
            time.sleep(_RETRY_S)
        raw.execute("SET lock_timeout = 0")  # its locks hold up nobody who stores
        if raw.execute(_IS_VALID, [NAME, schema]).fetchone() != (True,):
            tell(f"builds the index {NAME}; storing goes on meanwhile")
            raw.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(schema, NAME)))
            build = sql.SQL("CREATE INDEX CONCURRENTLY {} ON {} {}")
            table = sql.Identifier(schema, "evaluation_events")
            raw.execute(build.format(sql.Identifier(NAME), table, sql.SQL(DEFINITION)))
