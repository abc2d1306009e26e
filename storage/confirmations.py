"""The outbox: confirmations of what was committed, until they are relayed, and for a while after."""

from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import Connection

from storage import database

# Any constant will do that no other advisory lock of this database uses.
_ADVISORY_LOCK: Final = 0x65766372
_LOCK: Final = "SELECT pg_advisory_xact_lock(%s)"
_PENDING: Final = "SELECT id, body FROM confirmations WHERE relayed_at IS NULL ORDER BY id LIMIT %s"
_RELAYED: Final = "UPDATE confirmations SET relayed_at = now() WHERE id = ANY(%s)"
_FORGET: Final = "DELETE FROM confirmations WHERE relayed_at < now() - make_interval(secs => %s)"


def relay(conn: Connection, publish: Callable[[list[dict[str, Any]]], None], *, limit: int = 100) -> int:
    """Hand the oldest pending confirmations, of `limit` commits at most, to `publish`; returns how many there were.

    One caller at a time works, the others wait. An evaluation's confirmations come in the order of its versions: a commit takes
    its id while it holds the lock of each evaluation it confirms, so what is seen here includes every lower version. Where
    `publish` raises, or this dies before it commits, they stay pending and are handed over again: at least once.

    Raises DatabaseOutage (retry) and what `publish` raises.
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        cursor.execute(_LOCK, [_ADVISORY_LOCK])
        rows = cursor.execute(_PENDING, [limit]).fetchall()
        confirmations = [confirmation for _, body in rows for confirmation in body]
        if rows:
            publish(confirmations)
            cursor.execute(_RELAYED, [[row_id for row_id, _ in rows]])
    return len(confirmations)


def forget(conn: Connection, *, older_than_s: float = 600) -> int:
    """Delete what was relayed that long ago; returns how many commits' confirmations. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        return cursor.execute(_FORGET, [older_than_s]).rowcount
