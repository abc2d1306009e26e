"""Stream content from the object store or the archive back into the database, and check its hash."""

import struct
from collections.abc import Iterator
from datetime import datetime
from typing import Final

from sqlalchemy import Connection

from evalstore.objects import object_store
from evalstore.objects.object_store import Stores
from evalstore.storage import database
from evalstore.storage.archive import Row, claim
from models.errors import ObjectDamaged

_CHOOSE: Final = """
SELECT eval_id, event_id, kind, size, sha256, store, encoding FROM contents
WHERE store IS NOT NULL AND {condition} AND (eval_id, event_id, kind) > (%s, %s, %s)
ORDER BY eval_id, event_id, kind LIMIT 500
"""
_NIL: Final = "00000000-0000-0000-0000-000000000000"


def find(conn: Connection, eval_ids: list[str] | None) -> Iterator[Row]:
    """Return the content of these evaluations, or of all, that is outside the database. Raises DatabaseOutage (retry)."""
    condition = "eval_id = ANY(%s::text[])" if eval_ids is not None else "%s::text[] IS NULL"
    after: tuple[object, ...] = ("", _NIL, "")
    while True:
        with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
            query = _CHOOSE.format(condition=condition).encode()
            rows = [Row(*row) for row in cursor.execute(query, [eval_ids, *after])]
        yield from rows
        if not rows:
            return
        after = rows[-1][:3]


_COUNT: Final = "SELECT count(*), coalesce(sum(size), 0)::bigint FROM contents WHERE store IS NOT NULL AND {condition}"


def count(conn: Connection, eval_ids: list[str] | None) -> tuple[int, int]:
    """Return the number of contents that `find` yields, and their bytes. Raises DatabaseOutage (retry)."""
    condition = "eval_id = ANY(%s::text[])" if eval_ids is not None else "%s::text[] IS NULL"
    with database.errors(), conn.begin():
        ((contents, size),) = database.driver(conn).execute(_COUNT.format(condition=condition).encode(), [eval_ids]).fetchall()
    return int(contents), int(size)


_STAGE: Final = "CREATE TEMPORARY TABLE evalstore_stage_restored (data bytea) ON COMMIT DROP"
_COPY: Final = "COPY evalstore_stage_restored FROM STDIN (FORMAT BINARY)"
_POINT: Final = """
UPDATE contents c SET data = s.data, store = NULL, encoding = NULL, failures = 0, failure = NULL, retry_at = %s
FROM evalstore_stage_restored s
WHERE c.eval_id = %s AND c.event_id = %s AND c.kind = %s AND c.store = %s AND c.sha256 = %s AND sha256(s.data) = c.sha256
"""


def restore(conn: Connection, stores: Stores, row: Row, until: datetime) -> bool:
    """Put the content of a row back into the database, in one transaction. The archiver skips this row until `until`.

    Return false if the content had already moved. The object stays for the sweep. Memory here is bounded; the server holds the
    whole content. Raises ObjectMissing, ObjectDamaged (nothing is changed), ObjectStoreOutage, DatabaseOutage (retry).
    """
    if row.store is None:
        return False
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        if not claim(cursor, row):
            return False
        content = object_store.read(stores[row.store], row.reference)
        cursor.execute(_STAGE)
        with cursor.copy(_COPY) as copy:
            for block in _binary(content, row.size):
                copy.write(block)
        return cursor.execute(_POINT, [until, *row[:3], row.store, row.sha256]).rowcount == 1


def _binary(content: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Yield one row of one column in COPY's binary format.

    https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.3.55.9.4
    """
    yield b"PGCOPY\n\xff\r\n\0" + struct.pack(">iihi", 0, 0, 1, size)
    for chunk in content:
        size -= len(chunk)
        yield chunk
    if size:
        raise ObjectDamaged(f"an object brought {abs(size):,} bytes too {'few' if size > 0 else 'many'}")
    yield struct.pack(">h", -1)
