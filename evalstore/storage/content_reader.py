"""Read the content of evaluations in pieces, and check its hash. Memory stays flat, however large the content is.

Content belongs to an event and never changes. Its place may change between the database and the stores. Each piece can be read
at any time and over any connection, so a slow reader holds no connection.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final, Literal, NamedTuple
from uuid import UUID

from sqlalchemy import Connection

from evalstore.objects import object_store
from evalstore.objects.object_store import Place, Stores
from evalstore.storage import database
from models.content import Reference
from models.errors import ObjectDamaged, ObjectMissing

Kind = Literal["code", "output", "error"]
HEAD_BYTES: Final = 1024

Connect = Callable[[], AbstractContextManager[Connection]]


class Content(NamedTuple):
    """The place of some content, and what is known before reading the content."""

    eval_id: str
    event_id: UUID
    kind: Kind
    size: int
    head: bytes  # Empty for an object until `with_head` reads it.
    sha256: bytes | None  # None if the hash was not computed at the time of storing.
    piece_bytes: int
    store: Place | None
    encoding: Literal["identity", "zstd"] | None

    @property
    def reference(self) -> Reference:
        """Return the reference to the object. Raises ValueError if the content is in the database."""
        if self.sha256 is None or self.encoding is None:
            raise ValueError(f"{self.kind} of {self.eval_id!r} is in the database")
        return Reference(self.sha256.hex(), self.size, self.encoding)

    @property
    def is_text(self) -> bool:
        """Tell whether the beginning of the content looks like text."""
        try:
            self.head.decode()
        except UnicodeDecodeError as error:
            if self.size <= len(self.head) or error.start < len(self.head) - 3:
                return False
        return b"\0" not in self.head


# PostgreSQL decompresses a value from its start for each piece, so read fewer and larger pieces.
_FIND: Final = """
SELECT e.eval_id, e.event_id, %(kind)s::text,
    coalesce(octet_length(e.{kind}), c.size),
    substring(coalesce(e.{kind}, c.data), 1, %(head)s),
    c.sha256,
    CASE WHEN pg_column_compression(c.data) IS NULL THEN 1048576 ELSE 4194304 END,
    c.store, c.encoding
FROM evaluation_events e
LEFT JOIN contents c ON c.eval_id = e.eval_id AND c.event_id = e.event_id AND c.kind = %(kind)s
WHERE e.eval_id = %(eval_id)s AND e.event_id = {event_id}
    AND coalesce(octet_length(e.{kind}), c.size) IS NOT NULL
"""


def find(conn: Connection, eval_id: str, kind: Kind, event_id: UUID | None = None) -> Content | None:
    """Return the content of a record or of one of its events. Return None if there is none. Raises DatabaseOutage (retry)."""
    of_record = f"(SELECT {'code' if kind == 'code' else 'result'}_event_id FROM evaluations WHERE eval_id = %(eval_id)s)"
    query = _FIND.format(kind=kind, event_id=of_record if event_id is None else "%(event_id)s")
    values = {"eval_id": eval_id, "kind": kind, "head": HEAD_BYTES, "event_id": event_id}
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        row = cursor.execute(query.encode(), values).fetchone()
    return None if row is None else Content._make((*row[:4], row[4] or b"", *row[5:]))


def with_head(connect: Connect, stores: Stores, content: Content) -> Content:
    """Return `content` with its beginning. Read the beginning of an object now. Raises the same errors as `read`."""
    if content.store is None:
        return content
    return content._replace(head=b"".join(read(connect, stores, content, 0, min(HEAD_BYTES, content.size))))


def read(connect: Connect, stores: Stores, content: Content, start: int = 0, stop: int | None = None) -> Generator[bytes]:
    """Read the bytes from `start` up to `stop`, in pieces of up to 4 MiB. Hold no connection between two pieces.

    Each piece is checked. For a read of the whole content, the last piece comes only if the SHA-256 is right. If the content
    moves during the read, look up its new place and go on.

    Raises DatabaseOutage, ObjectStoreOutage (retry), ObjectMissing, ObjectDamaged, and LookupError if the content was deleted,
    at any time during the iteration.
    """
    position, stop = start, content.size if stop is None else stop
    digest = hashlib.sha256() if content.sha256 is not None and stop - start == content.size else None
    while position < stop:
        pieces = _pieces(connect, stores, content, position, stop)
        try:
            for piece in pieces:
                position += len(piece)
                if digest is not None:
                    digest.update(piece)
                    if position == stop and digest.digest() != content.sha256:
                        raise ObjectDamaged(f"{content.kind} of {content.eval_id!r} has SHA-256 {digest.hexdigest()}")
                handed = [piece]
                del piece  # Free the memory before the next piece is requested.
                yield handed.pop()
        except ObjectMissing:
            before = content.store, content.encoding
            with connect() as conn:
                moved = find(conn, content.eval_id, content.kind, content.event_id)
            if moved is None:
                raise LookupError(f"{content.kind} of {content.eval_id!r} is not there any more") from None
            if (moved.store, moved.encoding) == before:
                raise
            content = moved


_READ: Final = """
SELECT substring(coalesce(e.{kind}, c.data), %(start)s, %(length)s)
FROM evaluation_events e
LEFT JOIN contents c ON c.eval_id = e.eval_id AND c.event_id = e.event_id AND c.kind = %(kind)s
WHERE e.eval_id = %(eval_id)s AND e.event_id = %(event_id)s
"""


def _pieces(connect: Connect, stores: Stores, content: Content, start: int, stop: int) -> Iterator[bytes]:
    """Read pieces from the current place. Raises ObjectMissing if the content is no longer there."""
    if content.store is not None:
        yield from object_store.read_range(stores[content.store], content.reference, start, stop)
        return
    for begin in range(start, stop, content.piece_bytes):
        length = min(stop - begin, content.piece_bytes)
        yield _piece(connect, content, begin, length)


def _piece(connect: Connect, content: Content, begin: int, length: int) -> bytes:
    values = {**content._asdict(), "start": begin + 1, "length": length}
    with connect() as conn, database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        row = cursor.execute(_READ.format(kind=content.kind).encode(), values).fetchone()
    if row is None or row[0] is None:
        raise ObjectMissing(f"{content.kind} of {content.eval_id!r} is not in the database any more")
    if len(row[0]) != length:
        raise ObjectDamaged(f"{content.kind} of {content.eval_id!r} is shorter than it was")
    return bytes(row[0])


_BYTES_BY_PLACE: Final = """
SELECT 'inline', sum(coalesce(octet_length(code), 0) + coalesce(octet_length(output), 0) + coalesce(octet_length(error), 0))
FROM evaluation_events WHERE eval_id = ANY(%(eval_ids)s)
UNION ALL
SELECT coalesce(store, 'inline'), sum(size) FROM contents WHERE eval_id = ANY(%(eval_ids)s) GROUP BY 1
"""


def bytes_by_place(conn: Connection, eval_ids: Sequence[str]) -> dict[str, int]:
    """Return the bytes of content of these evaluations: `inline`, in `objects`, and in the `archive`. Raises DatabaseOutage."""
    sizes: dict[str, int] = {}
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        for place, size in cursor.execute(_BYTES_BY_PLACE, {"eval_ids": list(eval_ids)}):
            sizes[place] = sizes.get(place, 0) + int(size or 0)
    return sizes
