"""Keep `runs` and `statistics` equal to the evaluations, off the storing path.

The table `counted_evaluations` holds what each evaluation adds now. A changed evaluation takes its old part away and adds its
new one, in the transaction that moves the cursor. So the cost is that of the changes, however large a run or an hour is. How
often or in which order changes are told makes no difference. docs/decisions/0044
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final, NamedTuple

import msgspec
import psycopg
from sqlalchemy import Connection

from evalstore.storage import database, event_writer, sink_cursors, tombstones
from evalstore.storage.sink_cursors import Cursor, Lease
from evalstore.storage.summaries import COLUMNS, Fact, Summary
from evalstore.storage.tombstones import text_array
from models.record import rfc3339

NAME: Final = "statistics"
DIMENSIONS: Final = {
    "status": "status",
    "language": "language",
    "submitter": "submitter",
    "executor": "executor_id",
    "run": "run_id",
}
_FACT: Final = ", ".join(Fact._fields)

# An evaluation that adds to nothing, unfinished and without a run, has no row.
_NOW: Final = """
SELECT eval_id, updated_at, created_at, run_id, submitter, language, executor_id, status,
    date_bin('1 hour', finished_at, '2000-01-01 00:00:00Z'), coalesce(status = 'completed' AND exit_code = 0, false),
    score, duration_ms, memory_bytes
FROM evaluations WHERE eval_id = ANY(%s::text[])
"""
_BEFORE: Final = f"SELECT eval_id, {_FACT} FROM counted_evaluations WHERE eval_id = ANY(%s::text[])"
_TAKE_AWAY: Final = "DELETE FROM counted_evaluations WHERE eval_id = ANY(%s::text[])"
_PUT: Final = f"COPY counted_evaluations (eval_id, {_FACT}) FROM STDIN (FORMAT BINARY)"
_TYPES: Final = ["text", *["text"] * 5, "timestamptz", "bool", "float8", "float8", "int8"]
_BY_INDEX: Final = "SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off"


class _Change(NamedTuple):
    """The part of an evaluation before and after, and the times of a record that is there."""

    before: Fact | None
    after: Fact | None
    created_at: datetime | None
    updated_at: datetime | None


def apply(conn: Connection, lease: Lease, cursor: Cursor, eval_ids: Collection[str], erased: Collection[str]) -> int:
    """Count what these evaluations are now, and move the cursor, in one transaction. Return how many changed their part.

    A missing record takes its part away only if the evaluation was `erased`. Raises LeaseLost, DatabaseOutage (call again).
    """
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        # First: it locks the cursor, so two processes never count at the same time.
        sink_cursors.move(raw, lease, cursor, delivered=len(eval_ids))
        if not eval_ids:
            return 0
        raw.execute(_BY_INDEX)
        changes = _changes(raw, list(eval_ids), erased)
        if changes:
            _write(raw, changes)
    return len(changes)


def _changes(raw: psycopg.Connection[Any], eval_ids: list[str], erased: Collection[str]) -> dict[str, _Change]:
    wanted = [text_array(eval_ids)]
    before = {row[0]: row[1:] for row in raw.cursor(binary=True).execute(_BEFORE, wanted).fetchall()}
    changes: dict[str, _Change] = {}
    present: set[str] = set()
    for eval_id, updated_at, created_at, *columns in raw.cursor(binary=True).execute(_NOW, wanted).fetchall():
        fact = Fact(*columns)
        after = fact if fact.hour is not None or fact.run_id is not None else None
        old = before.get(eval_id)
        present.add(eval_id)
        if old != after:
            changes[eval_id] = _Change(old and Fact(*old), after, created_at, updated_at)
    for eval_id in before.keys() & set(erased) - present:
        changes[eval_id] = _Change(Fact(*before[eval_id]), None, None, None)
    return changes


def _write(raw: psycopg.Connection[Any], changes: dict[str, _Change]) -> None:
    if gone := [eval_id for eval_id, change in changes.items() if change.before is not None]:
        raw.execute(_TAKE_AWAY, [text_array(gone)])
    with raw.cursor().copy(_PUT) as copy:
        copy.set_types(_TYPES)
        for eval_id, change in changes.items():
            if change.after is not None:
                copy.write_row((eval_id, *change.after))
    cells: defaultdict[tuple[Any, ...], Summary] = defaultdict(Summary)
    for change in changes.values():
        for fact, sign in ((change.before, -1), (change.after, 1)):
            if fact is not None:
                cells[fact[:6]].count(fact, sign)
    _write_statistics(raw, cells)
    _write_runs(raw, cells, changes.values())


def value_key(value: str | None) -> bytes:
    """Return the hash of a value of a dimension, empty for none."""
    return b"" if value is None else blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).digest()


_Key = tuple[str, bytes, datetime]
_SUMMARY: Final = ", ".join(COLUMNS)
_LOCK_STATISTICS: Final = f"""
SELECT dimension, value_key, hour, {_SUMMARY} FROM statistics
JOIN unnest(%s::text[], %s::bytea[], %s::timestamptz[]) AS wanted (dimension, value_key, hour)
    USING (dimension, value_key, hour)
"""
_PUT_STATISTICS: Final = f"""
INSERT INTO statistics (dimension, value_key, hour, value, {_SUMMARY}) VALUES (%s, %s, %s, %s{", %s" * len(COLUMNS)})
ON CONFLICT (dimension, value_key, hour) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in COLUMNS)}
"""
_DROP_STATISTICS: Final = "DELETE FROM statistics WHERE dimension = %s AND value_key = %s AND hour = %s"


def _write_statistics(raw: psycopg.Connection[Any], cells: dict[tuple[Any, ...], Summary]) -> None:
    sums: defaultdict[_Key, Summary] = defaultdict(Summary)
    values: dict[_Key, str | None] = {}
    at = {name: Fact._fields.index(column) for name, column in DIMENSIONS.items()}
    for cell, summary in cells.items():
        hour = cell[5]
        if hour is None:
            continue
        for dimension, value in [("", None), *((name, cell[column]) for name, column in at.items())]:
            key = (dimension, value_key(value), hour)
            values[key] = value
            sums[key].add(summary)
    if not sums:
        return
    keys = [list(column) for column in zip(*sums, strict=True)]
    for dimension, key_of_value, hour, *columns in raw.cursor(binary=True).execute(_LOCK_STATISTICS, keys):
        sums[dimension, bytes(key_of_value), hour].add_row(columns)
    kept = {key: summary for key, summary in sums.items() if summary.evaluations}
    with raw.cursor() as cursor:
        if kept:
            cursor.executemany(_PUT_STATISTICS, [(*key, values[key], *summary.row()) for key, summary in kept.items()])
        if gone := sums.keys() - kept.keys():
            cursor.executemany(_DROP_STATISTICS, list(gone))


_LOCK_RUNS: Final = f"""
SELECT run_id, submitter, is_mixed, first_at, last_at, {_SUMMARY} FROM runs WHERE run_id = ANY(%s::text[])
ORDER BY run_id FOR UPDATE
"""
_PUT_RUN: Final = f"""
INSERT INTO runs (run_id, submitter, is_mixed, first_at, last_at, {_SUMMARY}, changes)
VALUES (%s, %s, %s, %s, %s{", %s" * len(COLUMNS)}, 2)
ON CONFLICT (run_id) DO UPDATE SET changes = 2,
    {", ".join(f"{name} = excluded.{name}" for name in ("submitter", "is_mixed", "first_at", "last_at", *COLUMNS))}
"""


class _Seen(NamedTuple):
    """The times and submitters of the changed evaluations of a run."""

    times: list[datetime]
    submitters: set[str | None]


def _write_runs(raw: psycopg.Connection[Any], cells: dict[tuple[Any, ...], Summary], changes: Iterable[_Change]) -> None:
    sums: defaultdict[str, Summary] = defaultdict(Summary)
    for (run_id, *_), summary in cells.items():
        if run_id is not None:
            sums[run_id].add(summary)
    if not sums:
        return
    seen: defaultdict[str, _Seen] = defaultdict(lambda: _Seen([], set()))
    for change in changes:
        if change.after is not None and change.after.run_id is not None and change.created_at and change.updated_at:
            seen[change.after.run_id].times.extend((change.created_at, change.updated_at))
            seen[change.after.run_id].submitters.add(change.after.submitter)
    rows = []
    stored = {row[0]: row[1:] for row in raw.cursor(binary=True).execute(_LOCK_RUNS, [sorted(sums)])}
    ((now,),) = raw.cursor(binary=True).execute("SELECT now()").fetchall()
    for run_id in sorted(sums):
        submitter, is_mixed, first_at, last_at, *columns = stored.get(run_id) or (None, False, None, None)
        before = Summary()
        if columns:
            before.add_row(columns)
        submitters = seen[run_id].submitters | ({submitter} if before.evaluations else set())
        times = [*seen[run_id].times, *(at for at in (first_at, last_at) if at and before.evaluations)] or [now]
        before.add(sums[run_id])
        is_mixed = is_mixed or len(submitters) > 1
        submitter = None if is_mixed else next(iter(submitters), None)
        rows.append((run_id, submitter, is_mixed, min(times), max(times), *before.row()))
    with raw.cursor() as cursor:
        cursor.executemany(_PUT_RUN, rows)


_DUE: Final = "SELECT run_id FROM runs WHERE changes > 0 ORDER BY run_id LIMIT %s"


def due(conn: Connection, limit: int = 1000) -> list[str]:
    """Return runs that were declared or counted since they were last checked for their end. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        return [run_id for (run_id,) in database.driver(conn).execute(_DUE, [limit]).fetchall()]


_CHECK: Final = f"""
SELECT run_id, expected, closed, finished_at, changes, {_SUMMARY} FROM runs
WHERE run_id = ANY(%s::text[]) ORDER BY run_id FOR UPDATE
"""
_FORGET: Final = "DELETE FROM runs WHERE run_id = ANY(%s::text[])"
_CHECKED: Final = """
UPDATE runs SET changes = 0, finished_at = CASE WHEN run_id = ANY(%(over)s::text[]) THEN coalesce(finished_at, now()) END
WHERE run_id = ANY(%(checked)s::text[])
"""


class RunConfirmation(msgspec.Struct, gc=False):
    """The notice that a run finished, or that a finished run changed."""

    type: str
    run_id: str
    state: str
    evaluations: int
    by_status: dict[str, int]
    recorded_at: str


_ENCODER: Final = msgspec.json.Encoder()


def settle(conn: Connection, lease: Lease, run_ids: Sequence[str]) -> int:
    """Announce which of these runs finished, or changed after that. Return how many were announced. Commits.

    The caller has counted all that was committed before it read `run_ids` from `due`. Raises LeaseLost, DatabaseOutage (retry).
    """
    lines: list[str] = []
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        sink_cursors.hold(raw, lease)
        ((now,),) = raw.cursor(binary=True).execute("SELECT now()").fetchall()
        over, gone, checked = [], [], []
        for run_id, expected, closed, finished_at, changes, *columns in raw.cursor(binary=True).execute(
            _CHECK, [list(run_ids)]
        ):
            summary = Summary()
            summary.add_row(columns)
            if not summary.evaluations and not closed and expected is None:
                gone.append(run_id)
                continue
            checked.append(run_id)
            is_over = is_finished(expected, closed, summary)
            if is_over:
                over.append(run_id)
            if is_over and finished_at is None:
                type_ = "storage:run:finished"
            elif finished_at is not None and (changes > 1 or not is_over):
                type_ = "storage:run:updated"
            else:
                continue
            state = "finished" if is_over else "open"
            by_status = {status: n for status, n in summary.counts.items() if n}
            notice = RunConfirmation(type_, run_id, state, summary.evaluations, by_status, rfc3339(now))
            lines.append(_ENCODER.encode(notice).decode())
        raw.execute(_FORGET, [gone])
        raw.execute(_CHECKED, {"over": over, "checked": checked})
        if lines:
            event_writer.confirm(raw, [len(lines), "\n".join(lines), None])
    return len(lines)


def is_finished(expected: int | None, closed: bool, summary: Summary) -> bool:
    """Whether a run was declared complete, and none of its evaluations is unfinished."""
    return (closed or (expected is not None and summary.evaluations >= expected)) and not summary.unfinished


_STORED: Final = """
SELECT created_at, eval_id FROM evaluations WHERE (created_at, eval_id) > (%s, %s) ORDER BY created_at, eval_id LIMIT %s
"""
_COUNTED_ALONE: Final = """
SELECT eval_id, EXISTS (SELECT FROM evaluations e WHERE e.eval_id = c.eval_id)
FROM (SELECT eval_id FROM counted_evaluations WHERE eval_id > %s ORDER BY eval_id LIMIT %s) c ORDER BY eval_id
"""


def stored_page(conn: Connection, after: tuple[datetime, str], limit: int) -> list[tuple[datetime, str]]:
    """Return the next stored evaluations by time, so that a page holds few hours. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        return cursor.execute(_STORED, [*after, limit]).fetchall()


def erased_page(conn: Connection, after: str, limit: int) -> tuple[str, set[str]]:
    """Return the last of the next counted evaluations, "" at the end, and those of them that were erased.

    Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin():
        found = database.driver(conn).execute(_COUNTED_ALONE, [after, limit]).fetchall()
    missing = [eval_id for eval_id, is_stored in found if not is_stored]
    return (found[-1][0] if found else ""), tombstones.erased(conn, missing) if missing else set()
