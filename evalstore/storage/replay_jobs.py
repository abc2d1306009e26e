"""Replays in the background: jobs compare or repair records, each in its range of ids.

A range holds how far its job came. Each step commits. So a job whose process dies goes on at the last committed step, and a
record counts once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

import msgspec
import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from sqlalchemy import Connection

from evalstore.storage import database, operator_actions, replay
from evalstore.storage.operator_actions import Intent
from evalstore.storage.replay import CHUNK, MAX_DIFFERENCES, Difference, Selection

# The size of the differences that a step and a range keep. Differences above it are only counted.
_STEP_BYTES: Final = 256 * 1024
_RANGE_BYTES: Final = 1024 * 1024

Ended = Literal["done", "cancelled", "failed"]

_SAME: Final = """
SELECT id FROM replays WHERE state = 'running' AND filter = %s AND write = %s ORDER BY asked_at LIMIT 1
"""
# Statistics give the bounds: exact bounds would read every id. A table without statistics is one range.
_BOUNDS: Final = """
SELECT bounds[1 + cardinality(bounds) * n / %(ranges)s]
FROM (SELECT histogram_bounds::text::text[] AS bounds FROM pg_stats
    WHERE schemaname = current_schema() AND tablename = 'evaluations' AND attname = 'eval_id') AS found,
    generate_series(1, %(ranges)s - 1) AS n
WHERE cardinality(bounds) >= %(ranges)s ORDER BY n
"""
_NEW: Final = "INSERT INTO replays (id, actor, reason, filter, write, rate, total) VALUES (%s, %s, %s, %s, %s, %s, %s)"
_NEW_RANGE: Final = "INSERT INTO replay_ranges (replay, number, position, last) VALUES (%s, %s, %s, %s)"


def begin(
    conn: Connection, wanted: UUID, chosen: Selection, intent: Intent, *, total: int, write: bool, rate: float, ranges: int
) -> UUID:
    """Write a replay with up to `ranges` ranges under the id `wanted`, or find the running one of the same records and kind.

    `total` is how many records are chosen, roughly. Return the id of the replay. Commit. Raises DatabaseOutage (retry).
    """
    words = Jsonb(chosen.words())
    last = replay.last_id(conn)
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        cursor.execute("LOCK TABLE replays IN SHARE ROW EXCLUSIVE MODE")
        if running := cursor.execute(_SAME, [words, write]).fetchone():
            return UUID(str(running[0]))
        bounds = [str(bound) for (bound,) in cursor.execute(_BOUNDS, {"ranges": ranges})]
        cursor.execute(_NEW, [wanted, intent.actor, intent.reason, words, write, rate, total])
        rows = zip(["", *bounds], [*bounds, max([last, *bounds])], strict=True)
        cursor.executemany(_NEW_RANGE, [(wanted, number, *row) for number, row in enumerate(rows)])
        operator_actions.write(cursor, intent, total, details={"replay": str(wanted), "write": write})
    return wanted


_GET: Final = """
SELECT r.*, g.position, g.last FROM replays r JOIN replay_ranges g ON g.replay = r.id
WHERE r.id = %s AND g.number = %s AND r.state = 'running' AND NOT g.is_done
"""
_START: Final = "UPDATE replays SET started_at = clock_timestamp() WHERE id = %s AND started_at IS NULL"
# A chunk is a second of the rate at most. One job at a time takes a chunk, so the ranges together keep to the rate.
_PACE: Final = """
UPDATE replays SET paced_until = clock_timestamp() + make_interval(secs => %s)
WHERE id = %s AND (paced_until IS NULL OR paced_until <= clock_timestamp())
"""
_WAIT: Final = "SELECT extract(epoch FROM paced_until - clock_timestamp())::float8 AS wait_s FROM replays WHERE id = %s"


def step(conn: Connection, replay_id: UUID, number: int, progress: Callable[[], object] = lambda: None) -> float | None:
    """Compare the next records of a range, and repair them if the replay writes. Commit.

    Return the seconds until the next step, or None if no step remains. `progress` is called after each page of a log. Two
    processes may work on one range: a record still counts once. Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(_GET, [replay_id, number]).fetchone()
        if row is None:
            return None
        cursor.execute(_START, [replay_id])
        limit = max(1, min(CHUNK, int(row["rate"] or CHUNK)))
        if row["rate"] and not cursor.execute(_PACE, [limit / row["rate"], replay_id]).rowcount:
            wait_s: float = cursor.execute(_WAIT, [replay_id]).fetchall()[0]["wait_s"]
            return max(0.01, wait_s)
    chosen = Selection.of(row["filter"])._replace(last=row["last"])
    compared = replay.compare(conn, chosen, row["position"], limit, progress)
    if compared is None:
        _finish(conn, replay_id, number)
        return None
    counted = compared.different
    if row["write"]:
        counted = _repair(conn, row, number, compared.different, progress)
    _advance(conn, row, number, compared._replace(different=counted))
    return 0


def _repair(
    conn: Connection,
    row: Mapping[str, Any],
    number: int,
    different: Mapping[str, list[Difference]],
    progress: Callable[[], object],
) -> dict[str, list[Difference]]:
    """Repair records, each counted in the transaction that repairs it. Return those that cannot be repaired."""
    intent = Intent("replay", row["actor"], row["reason"], row["filter"])

    def count(raw: psycopg.Connection[Any], found: Sequence[Difference]) -> None:
        raw.execute(_COUNT, _counted(1, 0, found) | {"replay": row["id"], "number": number})

    return {
        eval_id: found
        for eval_id, found in different.items()
        if replay.repair(conn, eval_id, intent, in_transaction=count, progress=progress) is None
    }


_COUNT: Final = f"""
UPDATE replay_ranges SET different = different + %(different)s, unrepairable = unrepairable + %(unrepairable)s,
    differences = CASE WHEN jsonb_array_length(differences) < {MAX_DIFFERENCES} AND pg_column_size(differences) < {_RANGE_BYTES}
        THEN differences || %(differences)s ELSE differences END
WHERE replay = %(replay)s AND number = %(number)s
"""
_ADVANCE: Final = """
UPDATE replay_ranges SET position = %s, evaluations = evaluations + %s WHERE replay = %s AND number = %s AND position = %s
"""


def _advance(conn: Connection, row: Mapping[str, Any], number: int, compared: replay.Compared) -> None:
    """Count the compared records, unless another process has done so."""
    given = [compared.last, compared.evaluations, row["id"], number, row["position"]]
    found = [one for of_one in compared.different.values() for one in of_one]
    unrepairable = len(compared.different) if row["write"] else 0
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        if cursor.execute(_ADVANCE, given).rowcount and found:
            counted = _counted(len(compared.different), unrepairable, found)
            cursor.execute(_COUNT, counted | {"replay": row["id"], "number": number})


def _counted(different: int, unrepairable: int, found: Sequence[Difference]) -> dict[str, Any]:
    kept: list[Any] = []
    left = _STEP_BYTES
    for one in found[:MAX_DIFFERENCES]:
        left -= len(msgspec.json.encode(given := msgspec.to_builtins(one._asdict())))
        if kept and left < 0:
            break
        kept.append(given)
    return {"different": different, "unrepairable": unrepairable, "differences": Jsonb(kept)}


_RANGE_DONE: Final = "UPDATE replay_ranges SET is_done = true WHERE replay = %s AND number = %s"
_ALL_DONE: Final = """
UPDATE replays r SET state = 'done', finished_at = clock_timestamp() WHERE id = %s AND state = 'running'
    AND NOT EXISTS (SELECT FROM replay_ranges g WHERE g.replay = r.id AND NOT g.is_done)
"""


def _finish(conn: Connection, replay_id: UUID, number: int) -> None:
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        # The jobs of the last two ranges must not overlook each other.
        cursor.execute("SELECT FROM replays WHERE id = %s FOR UPDATE", [replay_id])
        cursor.execute(_RANGE_DONE, [replay_id, number])
        cursor.execute(_ALL_DONE, [replay_id])


_END: Final = """
UPDATE replays SET state = %s, error = %s, finished_at = clock_timestamp() WHERE id = %s AND state = 'running'
"""


def end(conn: Connection, replay_id: UUID, state: Ended, error: str | None = None, intent: Intent | None = None) -> bool:
    """End a replay before its last range. Return whether it was running. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        is_ended = cursor.execute(_END, [state, error, replay_id]).rowcount == 1
        if is_ended and intent:
            operator_actions.write(cursor, intent, 0, details={"replay": str(replay_id)})
        return is_ended


_UNFINISHED: Final = """
SELECT g.replay, g.number FROM replays r JOIN replay_ranges g ON g.replay = r.id
WHERE r.state = 'running' AND NOT g.is_done ORDER BY g.replay, g.number
"""


class Range(NamedTuple):
    """A range of a running replay."""

    replay: UUID
    number: int


def unfinished(conn: Connection, replay_id: UUID | None = None) -> list[Range]:
    """Return the ranges of running replays, or of one of them, that have records left. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        found = [Range(*row) for row in cursor.execute(_UNFINISHED)]
    return [one for one in found if replay_id in {None, one.replay}]


_SHOWN: Final = "id, state, write, filter, actor, reason, rate, error, total, asked_at, started_at, finished_at"
_PROGRESS: Final = f"""
SELECT {", ".join(f"r.{name}" for name in _SHOWN.split(", "))}, counted.* FROM replays r CROSS JOIN LATERAL (
    SELECT sum(evaluations)::bigint AS evaluations, sum(different)::bigint AS different,
        sum(unrepairable)::bigint AS unrepairable, count(*) AS ranges, count(*) FILTER (WHERE is_done) AS ranges_done
    FROM replay_ranges g WHERE g.replay = r.id
) counted
"""


def latest(conn: Connection, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the newest replays first, each with its counts. Raises DatabaseOutage (retry)."""
    return _rows(conn, f"{_PROGRESS} ORDER BY r.asked_at DESC, r.id LIMIT %s", [limit])


def running(conn: Connection) -> list[dict[str, Any]]:
    """Return the running replays. Raises DatabaseOutage (retry)."""
    return _rows(conn, f"{_PROGRESS} WHERE r.state = 'running' ORDER BY r.asked_at, r.id", [])


def between(conn: Connection, first: UUID, last: UUID) -> list[dict[str, Any]]:
    """Return up to two replays whose ids lie between these two. Raises DatabaseOutage (retry)."""
    return _rows(conn, f"{_PROGRESS} WHERE r.id BETWEEN %s AND %s LIMIT 2", [first, last])


def _rows(conn: Connection, query: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        found: list[dict[str, Any]] = cursor.execute(query.encode(), values).fetchall()
        return found


_DIFFERENCES: Final = "SELECT differences FROM replay_ranges WHERE replay = %s ORDER BY number"


def differences(conn: Connection, replay_id: UUID) -> list[dict[str, Any]]:
    """Return the first differences that a replay found, at most MAX_DIFFERENCES. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        found = [one for (of_range,) in cursor.execute(_DIFFERENCES, [replay_id]) for one in of_range]
    return found[:MAX_DIFFERENCES]
