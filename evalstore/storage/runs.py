"""Runs: sets of evaluations that belong together. evalstore/storage/rollups.py keeps their sums."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection

from evalstore.storage import database
from evalstore.storage.listing import Position
from evalstore.storage.rollups import is_finished
from evalstore.storage.summaries import COLUMNS, Summary
from evalstore.storage.visibility import EVERYTHING, Visibility

_COLUMNS: Final = f"run_id, expected, closed, first_at, last_at, finished_at, {', '.join(COLUMNS)}"


@dataclass(frozen=True)
class RunFilter:
    """A filter for lists of runs, the newest first. `since` is inclusive, `until` exclusive; both apply to `first_at`.

    A run is visible to a key for one submitter if all its evaluations are of that submitter.
    """

    run_id_prefix: str | None = None
    submitter: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    visibility: Visibility = EVERYTHING


def _row(row: Sequence[Any]) -> dict[str, Any]:
    run_id, expected, closed, first_at, last_at, finished_at, *columns = row
    summary = Summary()
    summary.add_row(columns)
    is_over = is_finished(expected, closed, summary)
    return {
        "run_id": run_id,
        "state": "finished" if is_over else "open",
        **summary.as_json(),
        "unfinished": summary.unfinished,
        "expected": expected,
        "closed": closed,
        "first_at": first_at,
        "last_at": last_at,
        "finished_at": finished_at if is_over else None,
    }


def _where(chosen: RunFilter, run_id: str | None = None, after: Position | None = None) -> tuple[str, list[Any]]:
    conditions, values = list[str](), list[Any]()

    def add(condition: str, *parameters: Any) -> None:
        conditions.append(condition)
        values.extend(parameters)

    if run_id is not None:
        add("run_id = %s", run_id)
    for prefix in filter(None, (chosen.run_id_prefix, chosen.visibility.run_prefix)):
        add("run_id >= %s AND run_id < %s", prefix, f"{prefix}\x7f")
    for submitter in (chosen.submitter, chosen.visibility.submitter):
        if submitter is not None:
            add("submitter = %s", submitter)
    if chosen.since is not None:
        add("first_at >= %s", chosen.since)
    if chosen.until is not None:
        add("first_at < %s", chosen.until)
    if after is not None:
        add("(first_at, run_id) < (%s, %s)", after.key, after.eval_id)
    return f" WHERE {' AND '.join(conditions)}" if conditions else "", values


def get(conn: Connection, run_id: str, visibility: Visibility = EVERYTHING) -> dict[str, Any] | None:
    """Return a run with its sums, or None if there is none. Raises DatabaseOutage (retry)."""
    where, values = _where(RunFilter(visibility=visibility), run_id)
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        row = cursor.execute(f"SELECT {_COLUMNS} FROM runs{where}".encode(), values).fetchone()
    return None if row is None else _row(row)


# Of a filter that matches few, a page looks at so many runs.
_SCAN: Final = 20_000


def page(
    conn: Connection, chosen: RunFilter, *, limit: int, after: Position | None = None
) -> tuple[list[dict[str, Any]], Position | None]:
    """Return the next runs, and the position of the next page, None at the end.

    A page may hold fewer than `limit`, as it looks at a bounded number. Raises DatabaseOutage (retry).
    """
    span, values = _where(RunFilter(since=chosen.since, until=chosen.until), after=after)
    where, filters = _where(RunFilter(chosen.run_id_prefix, chosen.submitter, visibility=chosen.visibility))
    order = "ORDER BY first_at DESC, run_id DESC"
    query = f"""
SELECT {_COLUMNS} FROM runs JOIN (
    SELECT run_id FROM (SELECT run_id, submitter, first_at FROM runs{span} {order} LIMIT {_SCAN}) s{where} {order} LIMIT %s
) found USING (run_id) {order}
"""
    bound = f"SELECT first_at, run_id FROM runs{span} {order} OFFSET {_SCAN - 1} LIMIT 1"
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        rows = cursor.execute(query.encode(), [*values, *filters, limit + 1]).fetchall()
        last = cursor.execute(bound.encode(), values).fetchone() if where and len(rows) <= limit else None
    runs = [_row(row) for row in rows[:limit]]
    if len(rows) > limit:
        return runs, Position(runs[-1]["first_at"], runs[-1]["run_id"])
    return runs, Position(*last) if last else None


_DECLARE: Final = """
INSERT INTO runs (run_id, expected, closed, changes) VALUES (%(run_id)s, %(expected)s, coalesce(%(closed)s, false), 1)
ON CONFLICT (run_id) DO UPDATE SET expected = CASE WHEN %(sets_expected)s THEN excluded.expected ELSE runs.expected END,
    closed = coalesce(%(closed)s, runs.closed), changes = greatest(runs.changes, 1::smallint)
"""


def declare(conn: Connection, run_id: str, declared: dict[str, Any]) -> None:
    """Declare how many evaluations a run has (`expected`, None for unknown), or that it gets no more (`closed`).

    A key that `declared` does not hold stays as it is. Commits. Raises DatabaseOutage (retry).
    """
    values = {
        "run_id": run_id,
        "expected": declared.get("expected"),
        "sets_expected": "expected" in declared,
        "closed": declared.get("closed"),
    }
    with database.errors(), conn.begin():
        database.driver(conn).execute(_DECLARE, values)
