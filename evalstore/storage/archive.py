"""Move content from the database, or from a directory, to the archive. Each step can be repeated.

A run stores the content in the archive, reads it back and checks the hash. Only then one transaction points the row to the
archive and deletes the copy in the database. A crash before that transaction leaves the row unchanged. At worst, it leaves an
object without a row: the next run uses the object, or the sweep removes it.

The sweep also removes the copy in a directory. The archiver must not: a sender may have just found that copy, and the sender's
event may not be stored yet.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

import psycopg
from sqlalchemy import Connection

from evalstore.objects import object_store
from evalstore.objects.object_store import Place, Store
from evalstore.storage import database
from models.addresses import parse_store_url
from models.content import FRAME_BYTES, Reference
from models.errors import DatabaseOutage, InvalidSettings, ObjectDamaged, ObjectMissing, ObjectStoreOutage, printable
from models.settings import Settings

Step = Literal["claimed", "uploaded", "verified", "pointed", "moved", "failed"]

_FETCH: Final = 200
_OUTAGES_IN_A_ROW: Final = 3
_LONGEST_WAIT: Final = timedelta(hours=1)
_MOST_FAILURES: Final = 1000


class Row(NamedTuple):
    """A row of `contents`, without its data."""

    eval_id: str
    event_id: UUID
    kind: str
    size: int
    sha256: bytes
    store: Place | None
    encoding: Literal["identity", "zstd"] | None

    @property
    def reference(self) -> Reference:
        """Return the reference to the object. Raises ValueError if the content is in the database."""
        if self.encoding is None:
            raise ValueError(f"{self.kind} of {self.eval_id!r} is in the database")
        return Reference(self.sha256.hex(), self.size, self.encoding)

    @property
    def name(self) -> str:
        """Describe the row for messages to operators."""
        return f"{self.kind} of {self.eval_id!r}, event {self.event_id}"


class Archive(NamedTuple):
    """Where content goes, which content is due, and at what age the sweep may remove an object.

    `source` is the object store, if content moves from there too. `place` is the name of `store` in rows. The place is
    "objects" if the archive is the object store, so a separate archive can be set up later.
    """

    store: Store
    place: Place
    source: "Store | None"
    threshold_bytes: int
    after: timedelta | None
    sweep_grace: timedelta

    @classmethod
    def of(cls, settings: Settings) -> "Archive":
        """Return the archive that the settings name. Raises InvalidSettings if they name none."""
        url = settings.archive_url or settings.object_store_url
        if url is None:
            raise InvalidSettings("EVALSTORE_OBJECT_STORE_URL, EVALSTORE_ARCHIVE_URL: neither is set, so there is no archive")
        own = settings.object_store_url
        is_apart = own is None or not object_store.is_same(url, own)
        leaves = is_apart and own is not None and parse_store_url(own)[0] == "file"
        return cls(
            store=object_store.open_store(url, settings),
            place="archive" if is_apart else "objects",
            source=object_store.open_store(own, settings) if leaves and own else None,
            threshold_bytes=settings.archive_threshold_bytes,
            after=None if settings.archive_after_days is None else timedelta(days=settings.archive_after_days),
            sweep_grace=timedelta(days=settings.sweep_grace_days),
        )

    def close(self) -> None:
        """Close the connections of both stores."""
        self.store.close()
        if self.source:
            self.source.close()


@dataclass
class Moved:
    """The counts of a run.

    `outage` is set if the archive was unavailable and the run ended early: the next run moves the rest.
    """

    moved: int = 0
    bytes: int = 0
    failed: int = 0
    outage: ObjectStoreOutage | None = None


# Both queries find rows by index alone, however many rows are not due. The query by age skips content of evaluations that have
# not finished. A lost evaluation counts from its last update.
_IS_DUE: Final = "c.store {store} AND (c.retry_at IS NULL OR c.retry_at <= %(now)s)"
_BY_SIZE: Final = f"FROM contents c WHERE {_IS_DUE} AND c.size > %(threshold)s"
_BY_AGE: Final = f"""
FROM contents c JOIN evaluations e ON e.eval_id = c.eval_id
WHERE {_IS_DUE} AND c.occurred_at < %(finished)s AND c.size <= %(threshold)s
    AND (e.finished_at < %(finished)s OR (e.status = 'lost' AND e.updated_at < %(finished)s))
"""
_SELECT: Final = "SELECT c.eval_id, c.event_id, c.kind, c.size, c.sha256, c.store, c.encoding"
PLAN: Final = """
SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_sort = off;
SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off;
"""


def conditions(archive: Archive) -> list[str]:
    """Return the SQL conditions for due rows: above the size threshold, and, with an age set, smaller content that finished
    earlier."""
    stores = ["IS NULL", *(["= 'objects'"] if archive.source else [])]
    queries = [_BY_SIZE.format(store=store) for store in stores]
    if archive.after is not None:
        queries += [_BY_AGE.format(store=store) for store in stores]
    return queries


def values(archive: Archive, now: datetime) -> dict[str, Any]:
    """Return the parameters of the SQL that `conditions` and `due` return."""
    finished = now - archive.after if archive.after is not None else None
    return {"threshold": archive.threshold_bytes, "now": now, "finished": finished, "limit": _FETCH}


def due(archive: Archive) -> list[str]:
    """Return the queries for due rows, in the order to run them: the largest first, then the oldest."""
    orders = {True: "c.store, c.occurred_at", False: "c.store DESC, c.size DESC"}
    return [
        f"{_SELECT} {condition} ORDER BY {orders['c.occurred_at' in condition]} LIMIT %(limit)s"
        for condition in conditions(archive)
    ]


def run_once(
    conn: Connection,
    archive: Archive,
    now: datetime,
    *,
    go_on: Callable[[], bool] = lambda: True,
    watch: Callable[[Step, Row], None] = lambda _step, _row: None,
) -> Moved:
    """Move due content until none is left or `go_on` returns false. Commit after each content.

    Any number of callers share the work: a row lock gives each content to one caller at a time. Memory is bounded. A failure is
    noted in its row and retried later; it does not block other rows. Raises DatabaseOutage (run again).
    """
    done = Moved()
    outages = 0
    for query in due(archive):
        progress = True
        while progress:
            progress = False
            for row in _rows(conn, query, values(archive, now)):
                if not go_on():
                    return done
                outcome = _try(conn, archive, row, now, watch)
                if outcome is None:
                    continue
                progress = True
                if outcome is True:
                    done.moved, done.bytes, outages = done.moved + 1, done.bytes + row.size, 0
                    continue
                done.failed += 1
                outages = outages + 1 if isinstance(outcome, ObjectStoreOutage) else 0
                if isinstance(outcome, ObjectStoreOutage) and outages == _OUTAGES_IN_A_ROW:
                    done.outage = outcome
                    return done
    return done


def _rows(conn: Connection, query: str, parameters: dict[str, Any]) -> list[Row]:
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        cursor.execute(PLAN.encode(), binary=False)
        return [Row(*row) for row in cursor.execute(query.encode(), parameters)]


# The claim lasts as long as the transaction, so a crash releases it. The connection is idle during an upload: allow for that.
_PATIENCE: Final = "SET LOCAL idle_in_transaction_session_timeout = '15min'"
_CLAIM: Final = """
SELECT store FROM contents WHERE eval_id = %s AND event_id = %s AND kind = %s AND sha256 = %s FOR NO KEY UPDATE SKIP LOCKED
"""


def claim(cursor: psycopg.Cursor[Any], row: Row) -> bool:
    """Lock a row until the transaction ends. Return false if another run has the lock or has already moved the content."""
    cursor.execute(_PATIENCE)
    return cursor.execute(_CLAIM, [*row[:3], row.sha256]).fetchone() == (row.store,)


_POINT: Final = """
UPDATE contents SET store = %s, encoding = %s, data = NULL, failures = 0, failure = NULL, retry_at = NULL
WHERE eval_id = %s AND event_id = %s AND kind = %s
"""


def _try(
    conn: Connection, archive: Archive, row: Row, now: datetime, watch: Callable[[Step, Row], None]
) -> Literal[True] | Exception | None:
    """Move the content of a row and return True. Return the error if the move failed, after noting it in the row.

    Return None if another run has the row or has already moved the content.
    """
    try:
        with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
            if not claim(cursor, row):
                return None
            watch("claimed", row)
            reference = _upload(cursor, archive, row, now, watch)
            cursor.execute(_POINT, [archive.place, reference.encoding, *row[:3]])
            watch("pointed", row)
    except (ObjectStoreOutage, ObjectDamaged, ObjectMissing, psycopg.Error) as error:
        _note_failure(conn, row, error, now)
        watch("failed", row)
        return error
    except DatabaseOutage as error:
        if error.may_be_the_work:  # Otherwise the next run meets this row first and fails too.
            with suppress(DatabaseOutage):
                _note_failure(conn, row, error, now)
        raise
    watch("moved", row)
    return True


def _upload(
    cursor: psycopg.Cursor[Any], archive: Archive, row: Row, now: datetime, watch: Callable[[Step, Row], None]
) -> Reference:
    """Store the content of a row in the archive and read it back. Replace a damaged object that is already there."""
    for replace_damaged in (False, True):
        content = (
            _pieces(cursor, row)
            if row.store is None or archive.source is None
            else object_store.read(archive.source, row.reference)
        )
        put = object_store.put(
            archive.store,
            content,
            sha256=row.sha256.hex(),
            touch_before=now - archive.sweep_grace / 2,
            replace_damaged=replace_damaged,
        )
        watch("uploaded", row)
        try:
            object_store.verify(archive.store, put.reference)
        except (ObjectDamaged, ObjectMissing):
            if replace_damaged:
                raise
        else:
            watch("verified", row)
            return put.reference
    raise AssertionError("the second attempt returns or raises")


_PIECE: Final = "SELECT substring(data, %s, %s) FROM contents WHERE eval_id = %s AND event_id = %s AND kind = %s"


def _pieces(cursor: psycopg.Cursor[Any], row: Row) -> Iterator[bytes]:
    """Read the content of a row in the database, in pieces of 4 MiB."""
    for start in range(0, row.size, FRAME_BYTES):
        with cursor.connection.cursor(binary=True) as own:  # A cursor keeps its last result in memory.
            piece = own.execute(_PIECE, [start + 1, FRAME_BYTES, *row[:3]]).fetchone()
        if piece is None or piece[0] is None:
            raise ObjectDamaged(f"{row.name}: the database does not hold it")
        yield piece[0]
        del piece


# An array of times by the number of failures: Citus refuses to add an interval of a column to a time.
_FAILED: Final = """
UPDATE contents SET failures = least(failures, %s) + 1, failure = %s,
    retry_at = (%s::timestamptz[])[1 + least(failures, 10)]
WHERE eval_id = %s AND event_id = %s AND kind = %s AND store IS NOT DISTINCT FROM %s
"""


def _note_failure(conn: Connection, row: Row, error: Exception, now: datetime) -> None:
    why = printable(f"{type(error).__name__}: {error}")[:1000].replace("\0", "\\x00")
    with database.errors(), conn.begin():
        retries = [now + min(timedelta(minutes=2**failures), _LONGEST_WAIT) for failures in range(11)]
        parameters = [_MOST_FAILURES, why, retries, *row[:3], row.store]
        database.driver(conn).execute(_FAILED, parameters)


_RETRY: Final = "UPDATE contents SET retry_at = NULL WHERE failure IS NOT NULL AND retry_at > %s"


def retry_failed(conn: Connection, now: datetime) -> int:
    """Let failed moves be retried at once. Return their number. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        return database.driver(conn).execute(_RETRY, [now]).rowcount
