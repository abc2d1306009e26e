"""Report where content is, what is due to move, and whether the objects that rows name are present and undamaged."""

import os
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from psycopg.rows import dict_row
from sqlalchemy import Connection

from evalstore.objects import object_store
from evalstore.objects.frames import State
from evalstore.objects.object_store import Place, Stores
from evalstore.storage import archive, database
from evalstore.storage.archive import Archive
from models.content import Reference
from models.errors import ObjectDamaged, ObjectMissing

_PAGE: Final = 500
_SHOWN: Final = 100

_PLACES: Final = """
SELECT coalesce(store, 'database') AS place, count(*) AS contents, coalesce(sum(size), 0)::bigint AS bytes
FROM contents GROUP BY store ORDER BY store NULLS FIRST
"""
_DUE: Final = "SELECT count(*) AS contents, coalesce(sum(c.size), 0)::bigint AS bytes, min(c.recorded_at) AS oldest"
_FAILING: Final = "SELECT count(*) AS contents FROM contents WHERE failure IS NOT NULL"
_FAILURES: Final = """
SELECT eval_id, event_id, kind, size, failures, failure, retry_at FROM contents
WHERE failure IS NOT NULL ORDER BY retry_at DESC LIMIT %s
"""


def status(conn: Connection, at: Archive | None, now: datetime) -> dict[str, Any]:
    """Return contents and bytes by place, the due contents with the oldest, and the failed moves with the latest.

    Content inside its event's row is not counted. Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        places = cursor.execute(_PLACES).fetchall()
        due: dict[str, Any] = {"contents": 0, "bytes": 0, "oldest": None}
        queries = [(condition, archive.values(at, now)) for condition in archive.conditions(at)] if at else []
        for condition, parameters in queries:
            totals = cursor.execute(f"{_DUE} {condition}".encode(), parameters).fetchone() or due
            oldest = min((time for time in (due["oldest"], totals["oldest"]) if time), default=None)
            due = {"contents": due["contents"] + totals["contents"], "bytes": due["bytes"] + totals["bytes"], "oldest": oldest}
        failing = cursor.execute(_FAILING).fetchone() or {"contents": 0}
    return {"places": places, "due": due, "failing": failing["contents"], "failures": failures(conn)}


def failures(conn: Connection) -> list[dict[str, Any]]:
    """Return up to a hundred moves that failed, those with the latest next attempt first. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        return cursor.execute(_FAILURES, [_SHOWN]).fetchall()


class Object(NamedTuple):
    """An object that rows name."""

    reference: Reference
    place: Place


_OBJECTS: Final = """
SELECT DISTINCT ON (sha256, store, encoding) encode(sha256, 'hex'), size, encoding, store, sha256 FROM contents
WHERE store IS NOT NULL AND sha256 >= %(first)s AND (sha256, store, encoding) > (%(first)s, %(store)s, %(encoding)s)
ORDER BY sha256, store, encoding LIMIT %(limit)s
"""
_COUNT: Final = "SELECT count(DISTINCT (sha256, store, encoding)) FROM contents WHERE store IS NOT NULL"


def count_objects(conn: Connection) -> int:
    """Return the number of objects that rows name. Reads an index entry for each. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        ((number,),) = database.driver(conn).execute(_COUNT).fetchall()
    return int(number)


def named_objects(conn: Connection, sample: int | None = None) -> Iterator[Object]:
    """Return the objects that rows name, each once: all of them, or a sample. Raises DatabaseOutage (retry).

    A sample is a range of hashes from a random start. Hashes are random, so objects in a range are unrelated.
    """
    begin = b"" if sample is None else os.urandom(32)
    remaining = sample
    for first, last in ((begin, None), (b"", begin)) if begin else ((b"", None),):
        after = (first, "", "")
        while remaining is None or remaining > 0:
            position = dict(zip(("first", "store", "encoding"), after, strict=True))
            with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
                rows = cursor.execute(_OBJECTS, {**position, "limit": min(_PAGE, remaining or _PAGE)}).fetchall()
            for sha256, size, encoding, store, digest in rows:
                if last is not None and digest >= last:
                    return
                yield Object(Reference(sha256, size, encoding), store)
                after = (digest, store, encoding)
                remaining = None if remaining is None else remaining - 1
            if len(rows) < min(_PAGE, remaining or _PAGE):
                break


def verify(stores: Stores, listed: Object) -> tuple[State, str | None]:
    """Read the whole object and check it. Return the fault, or None. Raises ObjectStoreOutage (retry)."""
    try:
        object_store.verify(stores[listed.place], listed.reference)
    except ObjectMissing as error:
        return "missing", str(error)
    except ObjectDamaged as error:
        return "damaged", str(error)
    return "intact", None


_NAMING: Final = """
SELECT eval_id, event_id, kind FROM contents WHERE sha256 = decode(%s, 'hex') AND store = %s AND encoding = %s LIMIT %s
"""


def rows_naming(conn: Connection, listed: Object) -> list[tuple[str, UUID, str]]:
    """Return up to a hundred rows whose content is this object. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        values = [listed.reference.sha256, listed.place, listed.reference.encoding, _SHOWN]
        return [(eval_id, event_id, kind) for eval_id, event_id, kind in cursor.execute(_NAMING, values)]
