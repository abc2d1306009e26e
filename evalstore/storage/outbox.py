"""The outbox: confirmations of commits. They stay until they are relayed, and for a while after."""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from sqlalchemy import Connection

from evalstore.storage import database


class StreamId(NamedTuple):
    """The id of an entry of a Redis stream. Ids ascend."""

    ms: int
    seq: int


class Relayed(NamedTuple):
    """The result of `publish`: the last entry of the stream, and whether the confirmations were appended.

    `done` is false if the stream ends before its recorded position: Redis has lost entries, and they must be relayed again.
    """

    last: StreamId
    done: bool


class Commit(NamedTuple):
    """The confirmations of one commit: their number, a line of JSON for each, and a line with a `traceparent` for each.

    The line is empty for a confirmation without a trace. `traceparents` is None if no confirmation has a trace.
    """

    number: int
    body: str
    traceparents: str | None = None


Publish = Callable[[StreamId, Sequence[Commit]], Relayed]

# If this transaction is lost, confirmations are only relayed twice. So the commit does not wait for the disk.
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
    """Hand all pending confirmations to `publish`, a few commits at a time, until `go_on` returns false. Return their number.

    A row lock lets one caller work at a time. The confirmations of an evaluation come in the order of its versions: a commit
    takes its id while it holds the lock of each evaluation that it confirms.

    If `publish` raises, or the process dies before the commit, the confirmations stay pending and are handed over again. If
    Redis lost entries, all lost confirmations that `forget` has not deleted are handed over again.

    Raises DatabaseOutage (retry) and the errors of `publish`.
    """
    handed = 0
    while True:
        with database.errors(), conn.begin(), database.pipelined(database.driver(conn)):
            position, pending, after = (database.driver(conn).cursor(binary=True) for _ in range(3))
            # The server runs the second query after the first has the lock, although both are sent at once.
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
    """Delete confirmations relayed more than `older_than_s` ago that no running sink needs, and all older than `max_age_s`.

    Return the number of commits. The row of a sink that loses some of them says so. Raises DatabaseOutage (retry).
    """
    values = {"older_than_s": older_than_s, "max_age_s": max(older_than_s, max_age_s)}
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        ((deleted,),) = cursor.execute(_FORGET, values).fetchall()
    return int(deleted)
