"""The outbox: confirmations of what was committed, until they are relayed, and for a while after."""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from sqlalchemy import Connection

from evalstore.storage import database


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


class Commit(NamedTuple):
    """The confirmations of a commit: how many, a line of JSON each, and a `traceparent` each, empty where one has no trace.

    Without `traceparents` none has.
    """

    number: int
    body: str
    traceparents: str | None = None


Publish = Callable[[StreamId, Sequence[Commit]], Relayed]

# Losing this transaction only makes confirmations be relayed twice, so nobody waits for the disk.
_POSITION: Final = """
SELECT stream_ms, stream_seq, set_config('synchronous_commit', 'off', true) FROM confirmation_position FOR UPDATE
"""
_PENDING: Final = "SELECT id, count, body, traceparents FROM confirmations WHERE relayed_at IS NULL ORDER BY id LIMIT %s"
_RELAYED: Final = "UPDATE confirmations SET relayed_at = now(), stream_ms = %s, stream_seq = %s WHERE id = ANY(%s)"
_LOST: Final = """
UPDATE confirmations SET relayed_at = NULL, stream_ms = NULL, stream_seq = NULL WHERE (stream_ms, stream_seq) > (%s, %s)
"""
_ADVANCE: Final = "UPDATE confirmation_position SET stream_ms = %s, stream_seq = %s"
# A row stays while a running sink needs it, up to a bound. A sink that loses a row finds its events in the log.
_FORGET: Final = """
WITH gone AS (
    DELETE FROM confirmations
    WHERE relayed_at < now() - make_interval(secs => %(older_than_s)s)
        AND (id <= (SELECT coalesce(min(position), 9223372036854775807) FROM sinks WHERE state = 'running')
            OR recorded_at < now() - make_interval(secs => %(max_age_s)s))
    RETURNING id, count
), missed AS (
    UPDATE sinks SET missed = missed + (SELECT sum(count) FROM gone WHERE id > position)
    WHERE position < (SELECT max(id) FROM gone)
)
SELECT count(*) FROM gone
"""
_COMMITS: Final = 20


def relay(conn: Connection, publish: Publish, *, go_on: Callable[[], bool] = lambda: True) -> int:
    """Hand all pending confirmations to `publish`, those of some commits at a time, until `go_on` says no; returns how many.

    One caller at a time works, the others wait. An evaluation's confirmations come in the order of its versions: a commit takes
    its id while it holds the lock of each evaluation it confirms, so what is seen here includes every lower version. Where
    `publish` raises, or this dies before it commits, they stay pending and are handed over again. Where the server lost what it
    had confirmed, all that was lost is handed over again, as long as it was not forgotten here.

    Raises DatabaseOutage (retry) and what `publish` raises.
    """
    handed = 0
    while True:
        with database.errors(), conn.begin(), database.pipelined(database.driver(conn)):
            position, pending, after = (database.driver(conn).cursor(binary=True) for _ in range(3))
            # What is pending is read once the position is locked, though it is asked for before that is known.
            position.execute(_POSITION)
            pending.execute(_PENDING, [_COMMITS])
            ((ms, seq, _),), rows = position.fetchall(), pending.fetchall()
            last, done = publish(StreamId(ms, seq), [Commit(*row) for _, *row in rows])
            if not done:
                after.execute(_LOST, [*last])
            elif rows:
                after.execute(_RELAYED, [*last, [row_id for row_id, *_ in rows]])
                handed += sum(number for _, number, *_ in rows)
            if (ms, seq) != last:
                after.execute(_ADVANCE, [*last])
        if (done and len(rows) < _COMMITS) or not go_on():
            return handed


def forget(conn: Connection, *, older_than_s: float = 600, max_age_s: float = 259_200) -> int:
    """Delete what was relayed `older_than_s` ago and no running sink needs, and all that is older than `max_age_s`.

    Returns how many commits' confirmations. A sink that loses some of them, as it is paused or too slow, is told so in its row.
    Raises DatabaseOutage (retry).
    """
    values = {"older_than_s": older_than_s, "max_age_s": max(older_than_s, max_age_s)}
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        ((deleted,),) = cursor.execute(_FORGET, values).fetchall()
    return int(deleted)
