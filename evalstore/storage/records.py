"""Load records and event logs for the HTTP service: small content whole, large content as its size and beginning."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import psycopg
from sqlalchemy import Connection

from evalstore.objects.object_store import Stores
from evalstore.storage import content_reader, database
from evalstore.storage.content_reader import Connect, Content, Kind
from evalstore.storage.event_store import CONTENT_JOINS, WITH_CONTENT
from models.record import EventRow, RecordRow, promote

INLINE_BYTES: Final = 64 * 1024
PREVIEW_BYTES: Final = 1024
CONTENTS: Final[tuple[Kind, ...]] = ("code", "output", "error")


class ContentView(NamedTuple):
    """All bytes of some content, or its beginning.

    `where` is set for content in an object, until `complete` reads the object.
    """

    size: int
    data: bytes
    where: Content | None = None

    @property
    def is_complete(self) -> bool:
        return len(self.data) == self.size


class RecordView(NamedTuple):
    """A record or an event. `stamp` changes with each change of the record, and never repeats."""

    stamp: str
    fields: dict[str, Any]
    contents: dict[str, ContentView]


# A record that was deleted and stored again may have the same version. The writing transaction (xmin) and the time then differ.
_TAG: Final = "e.version || CASE WHEN e.repairs > 0 THEN '-' || e.repairs ELSE '' END"
_ROW_VERSION: Final = f"{_TAG} || '.' || e.xmin || '.' || extract(epoch FROM e.updated_at)"
_ROW_VERSIONS: Final = f"SELECT e.eval_id, {_ROW_VERSION} FROM evaluations e WHERE e.eval_id = ANY(%s::text[])"


def row_versions(conn: Connection, eval_ids: Sequence[str]) -> dict[str, str]:
    """Return the current row versions of the records that exist. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        return dict(cursor.execute(_ROW_VERSIONS, [list(eval_ids)], prepare=True).fetchall())


_FIELDS: Final = [name for name in RecordRow._fields if not name.endswith("_event_id")]


def _content(kind: str, event: str) -> str:
    """Return SQL columns for one kind of content: the size, the content or its beginning, and the place.

    `event` is the table alias of the event; the alias of its row of `contents` is `kind`.
    """
    return f"""coalesce(octet_length({event}.{kind}), {kind}.size),
    CASE WHEN {kind}.size > {INLINE_BYTES} THEN substring({kind}.data, 1, {PREVIEW_BYTES})
        ELSE coalesce({event}.{kind}, {kind}.data) END,
    {kind}.event_id, {kind}.sha256, {kind}.store, {kind}.encoding"""


_CONTENTS: Final = ", ".join([_content("code", "queued"), _content("output", "ending"), _content("error", "ending")])
_LOAD: Final = f"""
SELECT {_ROW_VERSION}, {", ".join(f"e.{name}" for name in _FIELDS)}, e.created_at, e.updated_at, e.enrichment, {_CONTENTS}
{WITH_CONTENT}
"""
_CONTENTS_OF: Final = f"""
SELECT {_CONTENTS} FROM (SELECT %s::text AS eval_id, %s::uuid AS code_event_id, %s::uuid AS result_event_id) e {CONTENT_JOINS}
"""


def readable(fields: dict[str, Any]) -> dict[str, Any]:
    """Remove `metadata_truncated` from the fields of a record if it is false, and `enrichment` if it is None."""
    if not fields["metadata_truncated"]:
        del fields["metadata_truncated"]
    if fields.get("enrichment", ...) is None:
        del fields["enrichment"]
    return fields


def load(conn: Connection, eval_id: str) -> RecordView | None:
    """Return the record, or None. Content in objects is not read: call `complete`. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        row = cursor.execute(_LOAD, [eval_id]).fetchone()
    if row is None:
        return None
    fields = readable(dict(zip([*_FIELDS, "created_at", "updated_at", "enrichment"], row[1:-18], strict=True)))
    return RecordView(row[0], fields, _content_views(eval_id, row[-18:]))


def from_row(cursor: psycopg.Cursor[Any], row: RecordRow, created_at: datetime, updated_at: datetime) -> RecordView:
    """Return a record that is not the stored one, with the content that its events have; objects are left to `complete`."""
    fields = {name: getattr(row, name) for name in _FIELDS} | {"created_at": created_at, "updated_at": updated_at}
    found = cursor.execute(_CONTENTS_OF, [row.eval_id, row.code_event_id, row.result_event_id]).fetchall()
    return RecordView("", readable(fields), _content_views(row.eval_id, found[0]))


def _content_views(eval_id: str, columns: Sequence[Any]) -> dict[str, ContentView]:
    parts: dict[str, ContentView] = {}
    for at, kind in enumerate(CONTENTS):
        size, data, event_id, sha256, store, encoding = columns[at * 6 :][:6]
        if store is not None:
            parts[kind] = ContentView(size, b"", Content(eval_id, event_id, kind, size, b"", sha256, 0, store, encoding))
        elif size is not None:
            parts[kind] = ContentView(size, bytes(data or b""))
    return parts


def complete(connect: Connect, stores: Stores, record: RecordView) -> RecordView:
    """Read content in objects: small content whole, and the beginning of large content.

    Raises ObjectStoreOutage, DatabaseOutage (retry), ObjectMissing, ObjectDamaged, LookupError.
    """
    parts = dict(record.contents)
    for kind, part in parts.items():
        if part.where is not None:
            stop = part.size if part.size <= INLINE_BYTES else PREVIEW_BYTES
            parts[kind] = ContentView(part.size, b"".join(content_reader.read(connect, stores, part.where, 0, stop)))
    return record._replace(contents=parts)


def _parts(columns: Sequence[Any]) -> dict[str, ContentView]:
    pairs = zip(CONTENTS, columns[::2], columns[1::2], strict=True)
    return {kind: ContentView(size, bytes(data or b"")) for kind, size, data in pairs if size is not None}


_LOGGED: Final = [name for name in EventRow._fields if name not in {"eval_id", *CONTENTS}]
# The log shows only content in the event's own row. For other content it shows the size.
_LOG: Final = f"""
SELECT {", ".join(f"e.{name}" for name in _LOGGED)}, e.recorded_at, {
    ", ".join(
        f"coalesce(octet_length(e.{kind}), (SELECT c.size FROM contents c "
        f"WHERE c.eval_id = e.eval_id AND c.event_id = e.event_id AND c.kind = '{kind}')), e.{kind}"
        for kind in CONTENTS
    )
}
FROM evaluation_events e
WHERE e.eval_id = %s AND (e.occurred_at, e.event_id) > (%s, %s) ORDER BY e.occurred_at, e.event_id LIMIT %s
"""
_BEGINNING: Final = (datetime.fromisoformat("0001-01-01T00:00:00+00:00"), UUID(int=0))


def log(conn: Connection, eval_id: str, *, limit: int, after: tuple[datetime, UUID] | None = None) -> list[RecordView]:
    """Return the events of an evaluation after `after`, by (`occurred_at`, `event_id`). Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        rows = cursor.execute(_LOG, [eval_id, *(after or _BEGINNING), limit]).fetchall()
    names = [*_LOGGED, "recorded_at"]
    return [RecordView("", _promoted(eval_id, dict(zip(names, row[:-6], strict=True))), _parts(row[-6:])) for row in rows]


def _promoted(eval_id: str, logged: dict[str, Any]) -> dict[str, Any]:
    if logged["extra"] is None:
        return logged
    row = promote(EventRow(eval_id=eval_id, **{name: logged[name] for name in _LOGGED}))
    return logged | {name: getattr(row, name) for name in _LOGGED}
