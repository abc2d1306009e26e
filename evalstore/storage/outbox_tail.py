"""Following the newest rows of the outbox without waiting for transactions in progress.

Unlike `outbox_reader`, which keeps the order of ids, a gap does not hold up the rows behind it: a row that becomes visible
later is returned later. A commit takes its id while it holds the lock of each evaluation that it confirms. So the rows of an
evaluation still come in the order of its versions. `outbox_reader` says how a gap is settled.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import psycopg
from sqlalchemy import Connection

from evalstore.storage import database
from evalstore.storage.outbox_reader import EVENTS_LIMIT, HOLDERS, PREPARED, ROWS, ROWS_LIMIT
from models.errors import EvalstoreError

# A relayed row is deleted after 600 s at the earliest (`outbox.forget`). A reader that is this far behind may miss rows.
RESUMABLE_S: Final = 540.0
# Gaps this number of ids ago are taken for rolled back at the start.
_LOOK_BACK: Final = 100_000

_NOW: Final = """
SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('confirmations', 'id')::regclass), 0),
    extract(epoch FROM clock_timestamp())::float8
"""
_GAPS_AT_START: Final = """
SELECT before + 1, id - 1 FROM (
    SELECT id, lag(id, 1, %s::bigint) OVER (ORDER BY id) AS before FROM confirmations WHERE id > %s
) ids WHERE id > before + 1 ORDER BY id
"""
_NEWEST: Final = "SELECT max(id) FROM confirmations"
_IN_GAPS: Final = """
SELECT c.id, c.body FROM unnest(%s::bigint[], %s::bigint[]) AS gap (first, last)
JOIN confirmations c ON c.id BETWEEN gap.first AND gap.last ORDER BY c.id LIMIT %s
"""
# strpos finds most rows that do not match before they are sent. The caller checks each line.
_MISSED: Final = """
SELECT id, body FROM confirmations WHERE id BETWEEN %s AND %s AND (%s::text IS NULL OR strpos(body, %s) > 0)
ORDER BY id LIMIT %s
"""
_PAGE: Final = 200


class ChangesLost(EvalstoreError):
    """Rows may have been deleted before they were read, or the database lost rows that were read. Begin again."""


class Position(NamedTuple):
    """A place in the outbox: all rows before `row_id` are read, and `offset` confirmations of that row.

    `at` is the time of the database, in seconds since 1970, at which that was so.
    """

    row_id: int
    offset: int
    at: float


class TailRow(NamedTuple):
    """A commit: its confirmations as lines of JSON. A reader that has them all resumes at `resume`.

    `resume` is None if it resumes within this row.
    """

    row_id: int
    body: str
    resume: int | None


@dataclass(frozen=True)
class _Gap:
    """Missing ids. `holders`: transactions that may still commit them; unknown until they were asked for."""

    first: int
    last: int
    holders: frozenset[str] | None = None


class OutboxTail:
    """A reader of new rows. For one thread at a time."""

    def __init__(self) -> None:
        self._high = 0
        self._gaps: list[_Gap] = []
        self._now = 0.0

    @property
    def position(self) -> Position:
        """Where a reader resumes that has all that was returned."""
        return Position(self._gaps[0].first if self._gaps else self._high + 1, 0, self._now)

    @property
    def high(self) -> int:
        """The highest id that was read."""
        return self._high

    def start(self, conn: Connection) -> None:
        """Begin at the newest row. Raises DatabaseOutage (retry)."""
        with database.errors(), conn.begin():
            raw = database.driver(conn)
            ((last, self._now),) = raw.execute(_NOW).fetchall()
            ((newest,),) = raw.execute(_NEWEST).fetchall()
            lowest = max(0, last - _LOOK_BACK)
            # Without a row, transactions in progress may hold any id up to the last.
            self._high = lowest if newest is None else newest
            self._gaps = [_Gap(*gap) for gap in raw.execute(_GAPS_AT_START, [lowest, lowest]).fetchall()]

    def poll(self, conn: Connection) -> tuple[list[TailRow], bool]:
        """Return the rows that became visible, and whether there may be more at once.

        Raises ChangesLost (start again), DatabaseOutage (retry).
        """
        before = self._now
        with database.errors(), conn.begin():
            raw = database.driver(conn)
            with database.pipelined(raw):
                now = raw.execute(_NOW)
                # In this order: a row of a transaction that holds no lock any more is visible to the statements after.
                held = raw.execute(HOLDERS) if self._gaps else None
                late = self._read_gaps(raw) if self._gaps else None
                new = raw.execute(ROWS, [self._high, ROWS_LIMIT, EVENTS_LIMIT])
                ((last, self._now),) = now.fetchall()
                holders = frozenset(name for (name,) in held.fetchall()) if held else frozenset[str]()
                found_late = late.fetchall() if late else []
                found_new = [(row_id, body) for row_id, _, body in new.fetchall()]
        if last < self._high or self._now - before > RESUMABLE_S:
            raise ChangesLost("the outbox was restored, or was not read for long")
        if len(found_late) < ROWS_LIMIT:
            self._settle(holders)
        for row_id, _ in found_late:
            self._gaps = [rest for gap in self._gaps for rest in _without(gap, row_id)]
        for row_id, _ in found_new:
            if row_id > self._high + 1:
                self._gaps.append(_Gap(self._high + 1, row_id - 1))
            self._high = row_id
        first = self._gaps[0].first if self._gaps else self._high + 1
        rows = [TailRow(row_id, body, first if first < row_id else None) for row_id, body in (*found_late, *found_new)]
        return rows, max(len(found_late), len(found_new)) >= ROWS_LIMIT or sum(
            body.count("\n") + 1 for _, body in found_new
        ) >= EVENTS_LIMIT

    def _read_gaps(self, raw: psycopg.Connection[Any]) -> psycopg.Cursor[Any]:
        bounds = [[gap.first for gap in self._gaps], [gap.last for gap in self._gaps]]
        return raw.execute(_IN_GAPS, [*bounds, ROWS_LIMIT])

    def _settle(self, held: frozenset[str]) -> None:
        """Forget the gaps whose transactions have all ended: their rows were read now, or never come."""
        remaining = [replace(gap, holders=held if gap.holders is None else gap.holders & held) for gap in self._gaps]
        is_prepared = any(holder.startswith(PREPARED) for holder in held)
        self._gaps = [gap for gap in remaining if gap.holders or is_prepared]


def _without(gap: _Gap, row_id: int) -> Iterator[_Gap]:
    if not gap.first <= row_id <= gap.last:
        yield gap
        return
    if gap.first < row_id:
        yield replace(gap, last=row_id - 1)
    if row_id < gap.last:
        yield replace(gap, first=row_id + 1)


def can_resume(conn: Connection, position: Position) -> bool:
    """Tell whether all rows from `position` on still exist. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        ((last, now),) = database.driver(conn).execute(_NOW).fetchall()
    return bool(position.row_id <= last + 1 and now - position.at < RESUMABLE_S)


def missed(conn: Connection, first: int, last: int, needle: str | None) -> list[tuple[int, str]]:
    """Return the next rows from `first` to `last` whose body contains `needle`. None: there are no more.

    Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin():
        return list(database.driver(conn).execute(_MISSED, [first, last, needle, needle, _PAGE]).fetchall())
