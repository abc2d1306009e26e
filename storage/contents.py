"""The content of evaluations, read piece by piece: memory stays flat however large it is.

Content belongs to an event and never changes, so its pieces may be read at any time and over several connections: a slow
reader holds none.
"""

from typing import Final, Literal, NamedTuple
from uuid import UUID

from sqlalchemy import Connection

from models.errors import ObjectStoreOutage
from storage import database

Kind = Literal["code", "output", "error"]
HEAD_BYTES: Final = 1024


class Content(NamedTuple):
    """Where some content is, and what is known of it without reading it."""

    eval_id: str
    event_id: UUID
    kind: Kind
    size: int
    head: bytes
    sha256: bytes | None  # where it was computed when it was stored
    piece_bytes: int  # in how large pieces it is best read

    @property
    def is_text(self) -> bool:
        """Whether it looks like text, judged by its beginning."""
        try:
            self.head.decode()
        except UnicodeDecodeError as error:
            if self.size <= len(self.head) or error.start < len(self.head) - 3:
                return False
        return b"\0" not in self.head


# A compressed value is unpacked from its beginning for each piece of it: fewer, larger pieces.
_FIND: Final = """
SELECT e.eval_id, e.event_id, %(kind)s::text,
    coalesce(octet_length(e.{kind}), c.size),
    substring(coalesce(e.{kind}, c.data), 1, %(head)s),
    c.sha256,
    CASE WHEN pg_column_compression(c.data) IS NULL THEN 1048576 ELSE 4194304 END
FROM evaluation_events e
LEFT JOIN contents c ON c.eval_id = e.eval_id AND c.event_id = e.event_id AND c.kind = %(kind)s
WHERE e.eval_id = %(eval_id)s AND e.event_id = {event_id}
    AND coalesce(octet_length(e.{kind}), c.size) IS NOT NULL
"""


def find(conn: Connection, eval_id: str, kind: Kind, event_id: UUID | None = None) -> Content | None:
    """The content of a record, or of one of its events; None where it has none. Raises DatabaseOutage (retry)."""
    of_record = f"(SELECT {'code' if kind == 'code' else 'result'}_event_id FROM evaluations WHERE eval_id = %(eval_id)s)"
    query = _FIND.format(kind=kind, event_id=of_record if event_id is None else "%(event_id)s")
    values = {"eval_id": eval_id, "kind": kind, "head": HEAD_BYTES, "event_id": event_id}
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        row = cursor.execute(query.encode(), values).fetchone()
    return None if row is None else Content._make((*row[:4], row[4] or b"", *row[5:]))


_READ: Final = """
SELECT substring(coalesce(e.{kind}, c.data), %(start)s, %(length)s)
FROM evaluation_events e
LEFT JOIN contents c ON c.eval_id = e.eval_id AND c.event_id = e.event_id AND c.kind = %(kind)s
WHERE e.eval_id = %(eval_id)s AND e.event_id = %(event_id)s
"""


def read(conn: Connection, content: Content, start: int, stop: int) -> bytes:
    """The bytes from `start` up to `stop`, at most `content.piece_bytes` of them.

    Raises DatabaseOutage, ObjectStoreOutage (retry); LookupError where it was deleted meanwhile.
    """
    length = min(stop - start, content.piece_bytes)
    values = {**content._asdict(), "start": start + 1, "length": length}
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        row = cursor.execute(_READ.format(kind=content.kind).encode(), values).fetchone()
    if row is None:
        raise LookupError(f"{content.kind} of {content.eval_id!r} is not there any more")
    data = row[0]
    if data is None or len(data) != length:
        raise ObjectStoreOutage(f"{content.kind} of {content.eval_id!r} is archived, and the archive cannot be read from here")
    return bytes(data)
