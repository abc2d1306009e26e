"""The outbox: confirmations of what was committed, until they are relayed, and for a while after."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from sqlalchemy import Connection

from storage import database


class StreamId(NamedTuple):
    """The id of an entry of a Redis stream; they ascend."""

    ms: int
    seq: int


class Relayed(NamedTuple):
    """What `publish` did: the stream's last entry, and whether the confirmations are in it.

    They are not where the stream does not reach to where it was before: then the server lost entries it had.
    """

    last: StreamId
    done: bool


class Line(NamedTuple):
    """A confirmation as JSON, and the trace it goes on in as a `traceparent`, empty where there is none."""

    body: str
    traceparent: str = ""


Publish = Callable[[StreamId, Sequence[Line]], Relayed]

# Losing this transaction only makes confirmations be relayed twice, so nobody waits for the disk.
_POSITION: Final = "SELECT stream_ms, stream_seq FROM confirmation_position FOR UPDATE"
_PENDING: Final = "SELECT id, body, traceparents FROM confirmations WHERE relayed_at IS NULL ORDER BY id LIMIT %s"
_RELAYED: Final = "UPDATE confirmations SET relayed_at = now(), stream_ms = %s, stream_seq = %s WHERE id = ANY(%s)"
_LOST: Final = """
UPDATE confirmations SET relayed_at = NULL, stream_ms = NULL, stream_seq = NULL WHERE (stream_ms, stream_seq) > (%s, %s)
"""
_ADVANCE: Final = "UPDATE confirmation_position SET stream_ms = %s, stream_seq = %s"
_FORGET: Final = "DELETE FROM confirmations WHERE relayed_at < now() - make_interval(secs => %s)"
_COMMITS: Final = 20


def relay(conn: Connection, publish: Publish) -> int:
    """Hand all pending confirmations to `publish`; returns how many there were.

    One caller at a time works, the others wait. An evaluation's confirmations come in the order of its versions: a commit takes
    its id while it holds the lock of each evaluation it confirms, so what is seen here includes every lower version. Where
    `publish` raises, or this dies before it commits, they stay pending and are handed over again. Where the server lost what it
    had confirmed, all that was lost is handed over again, as long as it was not forgotten here.

    Raises DatabaseOutage (retry) and what `publish` raises.
    """
    handed = 0
    while True:
        with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
            cursor.execute("SET LOCAL synchronous_commit = off")
            ((ms, seq),) = cursor.execute(_POSITION).fetchall()
            rows = cursor.execute(_PENDING, [_COMMITS]).fetchall()
            lines = [line for _, body, traces in rows for line in _lines(body, traces)]
            last, done = publish(StreamId(ms, seq), lines)
            if not done:
                cursor.execute(_LOST, [*last])
            elif rows:
                cursor.execute(_RELAYED, [*last, [row_id for row_id, *_ in rows]])
                handed += len(lines)
            if (ms, seq) != last:
                cursor.execute(_ADVANCE, [*last])
        if done and len(rows) < _COMMITS:
            return handed


def _lines(body: str, traces: str | None) -> Iterator[Line]:
    bodies = body.split("\n")
    return map(Line, bodies) if traces is None else map(Line, bodies, traces.split("\n"))


def forget(conn: Connection, *, older_than_s: float = 600) -> int:
    """Delete what was relayed that long ago; returns how many commits' confirmations. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        return cursor.execute(_FORGET, [older_than_s]).rowcount
