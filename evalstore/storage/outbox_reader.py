"""Reading the outbox by cursor, in the order of ids, although ids become visible out of order.

An id that is missing below a visible one belongs to a transaction in progress, or to one that rolled back. Taking an id locks
the sequence until the end of the transaction (`nextval` takes RowExclusiveLock on it). So once all transactions have ended that
hold this lock after the gap was noticed, the gap is settled: its rows are visible, or never will be. Nothing is added to the
storing transaction. Transactions that take no id, the relay's among them, hold up nobody. docs/decisions/0037.
"""

import time
from collections import deque
from datetime import datetime
from typing import Any, Final

import msgspec
from sqlalchemy import Connection

from evalstore.storage import database, sink_ranges
from evalstore.storage.sink_cursors import Lease, LeaseLost, Place
from models.confirmations import ERASED

ROWS_LIMIT: Final = 500
EVENTS_LIMIT: Final = 4000
# A prepared transaction goes on under another name, so whichever holds the lock may have left the gap.
PREPARED: Final = "-1/"

HOLDERS: Final = """
SELECT virtualtransaction FROM pg_locks
WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
    AND relation = pg_get_serial_sequence('confirmations', 'id')::regclass
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
ROWS: Final = """
SELECT id, recorded_at, body FROM (
    SELECT id, recorded_at, body, sum(count) OVER (ORDER BY id) - count AS before
    FROM (SELECT id, recorded_at, body, count FROM confirmations WHERE id > %s ORDER BY id LIMIT %s) first
) counted WHERE before < %s ORDER BY id
"""
_CONTROL: Final = """
SELECT state = 'running' AND lease_token = %s AND generation = %s AND (missed = 0 OR replay_until IS NOT NULL)
FROM sinks WHERE name = %s
"""


class _Confirmation(msgspec.Struct, gc=False):
    type: str
    eval_id: str = ""
    version: int = 0
    status: str | None = None
    event_ids: list[str] = []  # of confirmations of other kinds there are none


_new = tuple.__new__  # A named tuple's own constructor is several times slower.
_LINES: Final = msgspec.json.Decoder(_Confirmation)


def changed(body: str) -> tuple[set[str], set[str]]:
    """Return the evaluations that the lines of a row name, and those of them that were erased."""
    lines = _LINES.decode_lines(body)
    erased = {line.eval_id for line in lines if line.type == ERASED}
    return {line.eval_id for line in lines} - {""}, erased


class Item(msgspec.Struct, gc=False):
    """An event to pass on, or an erasure, or another confirmation without events, and where a sink is that has confirmed it.

    Without an `eval_id` and a confirmation it is a place alone: what is before it belongs to other ranges of the sink.
    `version` is that of the evaluation with this event; `status` that after its commit.
    """

    is_erased: bool
    eval_id: str
    event_id: str
    version: int
    place: Place
    status: str | None = None
    confirmation: dict[str, Any] | None = None

    @property
    def is_place(self) -> bool:
        """Whether it is a place alone."""
        return not self.eval_id and self.confirmation is None


class _Gap:
    """Missing ids below `last`. `holders`: transactions that may bring it; unknown until they were asked for."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.holders: set[str] | None = None
        self.since = time.monotonic()

    def is_settled(self, held: set[str]) -> bool:
        """Whether all transactions that may still commit the missing ids have ended."""
        if self.holders is None:
            self.holders = held
        self.holders &= held
        return not self.holders and not any(holder.startswith(PREPARED) for holder in held)


class OutboxRows:
    """The rows of the outbox behind a cursor, in their order. For one thread."""

    def __init__(self, lease: Lease, rows_limit: int = ROWS_LIMIT, confirmations_limit: int = EVENTS_LIMIT) -> None:
        self._lease, self._limits = lease, [rows_limit, confirmations_limit]
        self._read_id = lease.cursor.place.id
        self._settled = 0
        self._gap: _Gap | None = None

    @property
    def gap_age_s(self) -> float:
        """For how long a transaction in progress has held up what is behind it."""
        return time.monotonic() - self._gap.since if self._gap else 0.0

    @property
    def has_gap(self) -> bool:
        """Whether a transaction in progress may still add rows before those that were not returned yet."""
        return self._gap is not None

    def take(self, conn: Connection) -> list[tuple[int, datetime, str]]:
        """Return the next rows: id, time and lines. None where there is nothing now. Does not wait.

        Raises LeaseLost where the sink was paused, moved, taken over, or has rows in the log alone; DatabaseOutage (retry).
        """
        rows = self._poll(conn)
        if not rows and self._gap and self._gap.holders is None:
            rows = self._poll(conn)  # most gaps are settled by the time somebody looks
        return rows

    def _poll(self, conn: Connection) -> list[tuple[int, datetime, str]]:
        lease, raw = self._lease, database.driver(conn)
        with database.errors(), conn.begin(), database.pipelined(raw):
            # In this order: a row of a transaction that holds no lock any more is visible to the statement after.
            held = raw.execute(HOLDERS) if self._gap else None
            rows = raw.execute(ROWS, [self._read_id, *self._limits])
            # Last: who deletes rows that a sink needs says so in the same transaction.
            control = raw.execute(_CONTROL, [lease.token, lease.cursor.generation, lease.name])
            if held and self._gap and self._gap.is_settled({name for (name,) in held.fetchall()}):
                self._settled, self._gap = self._gap.last, None
            found = rows.fetchall()
            if control.fetchone() != (True,):
                raise LeaseLost(f"sink {lease.name}: it was paused or moved, or another process works on it")
        for number, (row_id, *_) in enumerate(found):
            if self._read_id + 1 < row_id and self._settled < row_id - 1:
                if self._gap is None or self._gap.last < row_id:
                    self._gap = _Gap(found[-1][0])
                return found[:number]
            self._read_id = row_id
        self._gap = None
        return found


class OutboxReader:
    """The items behind a cursor, in their order. For one thread; keeps what it read ahead."""

    def __init__(self, lease: Lease) -> None:
        self._rows = OutboxRows(lease)
        self._range = sink_ranges.of_row(lease.name)
        self._read = lease.cursor.place
        self._ahead = deque[Item]()

    @property
    def gap_age_s(self) -> float:
        """For how long a transaction in progress has held up what is behind it."""
        return self._rows.gap_age_s

    def take(self, conn: Connection, most: int) -> list[Item]:
        """Return the next items, none where there is nothing to pass on now. Raises as `OutboxRows.take` does."""
        if not self._ahead:
            for row in self._rows.take(conn):
                self._add(*row)
        return [self._ahead.popleft() for _ in range(min(most, len(self._ahead)))]

    def _add(self, row_id: int, recorded_at: datetime, body: str) -> None:
        before, self._read = self._read, Place(row_id, 0, recorded_at)
        number, last, ahead, offset, is_mine = 0, 0, self._ahead, before.offset, self._range.holds
        for at_line, line in enumerate(_LINES.decode_lines(body)):
            if not is_mine(line.eval_id):
                number += len(line.event_ids) or 1
                continue
            is_erased = line.type == ERASED
            other = None if line.event_ids or is_erased else msgspec.json.decode(body.split("\n")[at_line], type=dict[str, Any])
            version = line.version - len(line.event_ids)
            for at, event_id in enumerate(line.event_ids or [""], 1):
                number += 1
                if number > offset:
                    if ahead and ahead[-1].is_place:
                        ahead.pop()
                    last = number
                    place = _new(Place, (before.id, number, before.recorded_at))
                    ahead.append(Item(is_erased, line.eval_id, event_id, version + at, place, line.status, other))
        if last == number > offset:
            ahead[-1].place = self._read
        elif number > offset:  # The rest of the row belongs to other ranges. One item after those of this range says so.
            if ahead and ahead[-1].is_place:
                ahead.pop()
            ahead.append(Item(False, "", "", 0, self._read))
