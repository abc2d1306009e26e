"""The indexes of lists. `evalstore migrate` builds and drops them CONCURRENTLY, so storing goes on meanwhile.

A build that is interrupted leaves an invalid index, which the next `evalstore migrate` builds anew. Lists work without an
index, by scanning a bounded number of evaluations. Other indexes come with the tables, in the transaction of the migrations.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql
from sqlalchemy import Connection

from evalstore.storage import database

# Longer text would not fit into an entry of an index. Queries compare the whole text besides.
PREFIX_CHARACTERS: Final = 200
_METADATA: Final = "evaluations_by_metadata_"
_RETRY_S: Final = 0.2

FIXED: Final[dict[str, LiteralString]] = {
    "evaluations_by_run": "(run_id, created_at) WHERE run_id IS NOT NULL",
    "evaluations_by_submitter": f"(left(submitter, {PREFIX_CHARACTERS}), created_at) WHERE submitter IS NOT NULL",
    "evaluations_by_executor": f"(left(executor_id, {PREFIX_CHARACTERS}), created_at) WHERE executor_id IS NOT NULL",
    "evaluations_by_status": "(status, created_at) WHERE status <> 'completed'",
}
# `evaluations_by_status` took its place: an index on `updated_at` changes with each event.
_REPLACED: Final = ("evaluations_open",)


def metadata_index(key: str) -> str:
    """Return the name of the index on a metadata key."""
    return _METADATA + hashlib.sha256(key.encode()).hexdigest()[:16]


def metadata_expression(key: str) -> sql.Composed:
    """Return what the index on a metadata key holds. A query has to use the same expression, with the key as a literal."""
    return sql.SQL("left(metadata ->> {}, {})").format(sql.Literal(key), sql.Literal(PREFIX_CHARACTERS))


def _wanted(keys: Sequence[str]) -> dict[str, sql.Composable]:
    fixed: dict[str, sql.Composable] = {name: sql.SQL(text) for name, text in FIXED.items()}
    return fixed | {
        metadata_index(key): sql.SQL("(({}), created_at) WHERE metadata ->> {} IS NOT NULL").format(
            metadata_expression(key), sql.Literal(key)
        )
        for key in keys
    }


_USABLE: Final = """
SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
WHERE i.indrelid = 'evaluations'::regclass AND i.indisvalid
"""


def existing(conn: Connection) -> set[str]:
    """Return the names of the usable indexes of `evaluations`. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        return existing_in(cursor)


def existing_in(cursor: psycopg.Cursor[Any]) -> set[str]:
    """Do as `existing` does, in the caller's transaction."""
    return {name for (name,) in cursor.execute(_USABLE)}


_BUILT: Final = """
SELECT c.relname, i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid
WHERE t.relname = 'evaluations' AND t.relnamespace = quote_ident(%s)::regnamespace
"""


def ensure(
    conn: Connection, schema: str, keys: Sequence[str], lock_key: int, tell: Callable[[str], object] = lambda _: None
) -> None:
    """Build the missing indexes and drop those that are not wanted any more. Any number of processes may call this at once.

    `conn` has no limits of time. Raises DatabaseOutage (call again: what is built stays).
    """
    wanted = _wanted(keys)
    with database.errors(), _alone(conn, lock_key) as raw:
        table = sql.Identifier(schema, "evaluations")
        is_empty = raw.execute(sql.SQL("SELECT FROM {} LIMIT 1").format(table)).fetchone() is None
        found = dict(raw.execute(_BUILT, [schema]).fetchall())
        for name, definition in wanted.items():
            if found.get(name):
                continue
            if not is_empty:
                tell(f"builds the index {name}; storing goes on meanwhile")
            _drop(raw, schema, name)
            build = sql.SQL("CREATE INDEX CONCURRENTLY IF NOT EXISTS {} ON {} {}")
            raw.execute(build.format(sql.Identifier(name), table, definition))
        for name in found:
            if name in _REPLACED or (name.startswith(_METADATA) and name not in wanted):
                _drop(raw, schema, name)


def _drop(raw: psycopg.Connection[Any], schema: str, name: str) -> None:
    raw.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(schema, name)))


@contextmanager
def _alone(conn: Connection, lock_key: int) -> Iterator[psycopg.Connection[Any]]:
    """Hold an advisory lock of the session, outside of a transaction.

    A process that waited inside a statement would hold up the build that it waits for, so this asks again and again. Behind a
    pooler there is no session to hold the lock: there, two processes at once may fail, and have to be started again.
    """
    raw, is_pooled = database.driver(conn), database.is_pooled(conn)
    raw.autocommit = True
    try:
        while not is_pooled and raw.execute("SELECT pg_try_advisory_lock(%s)", [lock_key]).fetchone() != (True,):
            time.sleep(_RETRY_S)
        if not is_pooled:
            raw.execute("SET lock_timeout = 0")
        yield raw
    finally:
        if not raw.closed:
            if not is_pooled:
                raw.execute("SELECT pg_advisory_unlock_all()")
            raw.autocommit = False
