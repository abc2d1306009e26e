"""The hash ranges of a sink. Each has a row in `sinks`, with a cursor and a lease of its own.

A range holds the evaluations whose hash falls into it, so an evaluation's events stay in order. The row of a sink with one
range has the sink's name; rows of several have NAME#NUMBER-of-TOTAL.
"""

from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from zlib import crc32

from psycopg.rows import dict_row
from sqlalchemy import Connection

from evalstore.storage import database

_SEPARATOR: Final = "#"
# The row of a sink's range, or of the sink.
OF_SINK: Final = "split_part(name, '#', 1)"


class Range(NamedTuple):
    """A range of a sink, of `total`; numbers begin at 0."""

    sink: str
    number: int = 0
    total: int = 1

    @property
    def name(self) -> str:
        """The name of its row."""
        return self.sink if self.total == 1 else f"{self.sink}{_SEPARATOR}{self.number}-of-{self.total}"

    def holds(self, eval_id: str) -> bool:
        """Tell whether an evaluation belongs to this range."""
        return self.total == 1 or crc32(eval_id.encode()) * self.total >> 32 == self.number


def of_row(name: str) -> Range:
    """Return the range whose row has this name."""
    sink, _, rest = name.partition(_SEPARATOR)
    number, _, total = rest.partition("-of-")
    return Range(sink, int(number), int(total)) if total else Range(sink)


_LOCK: Final = "SELECT pg_advisory_xact_lock(hashtextextended('evalstore:sink:' || %s, 0))"
_ROWS: Final = f"""
SELECT *, lease_until > clock_timestamp() AS is_leased FROM sinks
WHERE {OF_SINK} = %s ORDER BY position, position_offset FOR UPDATE
"""
_COLUMNS: Final = (
    *("type", "state", "position", "position_offset", "recorded_at", "timeline", "generation", "replay_until", "replay_at"),
    *(
        "replayed_until",
        "replay_eval_id",
        "replay_occurred_at",
        "replay_event_id",
        "lease_token",
        "delivered",
        "dead",
        "missed",
        "last_error",
    ),
)
_INSERT: Final = f"INSERT INTO sinks (name, {', '.join(_COLUMNS)}) VALUES ({', '.join(['%s'] * (len(_COLUMNS) + 1))})"


def repartition(conn: Connection, sink: str, count: int) -> bool:
    """Give a sink rows for `count` ranges, if it has rows of another number. They begin at the least cursor of those. Commits.

    Return False while another process works on a row of the other number: try again later. Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        cursor.execute(_LOCK, [sink])
        rows = cursor.execute(_ROWS.encode(), [sink]).fetchall()
        wanted = [Range(sink, number, count).name for number in range(count)]
        if all(row["name"] in wanted for row in rows):
            return True
        if any(row["is_leased"] for row in rows):
            return False
        least = _least(rows)
        cursor.execute("DELETE FROM sinks WHERE name = ANY(%s)", [[row["name"] for row in rows]])
        for number, name in enumerate(wanted):
            counts = {"delivered": 0, "dead": 0} if number else {}
            cursor.execute(_INSERT.encode(), [name, *((least | counts)[column] for column in _COLUMNS)])
    return True


def _least(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row from which all events are passed on that any of `rows` still has to pass on."""
    least = dict(rows[0])
    replaying = [row for row in rows if row["replay_until"] is not None]
    if replaying:
        first = min(replaying, key=lambda row: row["replay_at"])
        least |= {name: first[name] for name in ("replay_at", "replay_eval_id", "replay_occurred_at", "replay_event_id")}
        least["replay_until"] = max(row["replay_until"] for row in replaying)
    least["state"] = "paused" if any(row["state"] == "paused" for row in rows) else "running"
    least["timeline"] = min(row["timeline"] for row in rows)
    for name in ("generation", "lease_token", "missed"):
        least[name] = max(row[name] for row in rows)
    least["generation"] += 1
    least["replayed_until"] = datetime.now(UTC) + timedelta(seconds=1)  # events after the least cursor may come again
    for name in ("delivered", "dead"):
        least[name] = sum(row[name] for row in rows)
    return least
