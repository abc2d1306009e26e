"""Reading the outbox by cursor, in the order of ids, although ids become visible out of order.

An id that is missing below a visible one belongs to a transaction in progress, or to one that rolled back. Taking an id locks
the sequence until the end of the transaction (`nextval` takes RowExclusiveLock on it). So once all transactions have ended that
hold this lock after the gap was noticed, the gap is settled: its rows are visible, or never will be. Nothing is added to the
storing transaction. Transactions that take no id, the relay's among them, hold up nobody. docs/decisions/0037.
"""

import time
from collections import deque
from datetime import datetime
from typing import Final

import msgspec
from sqlalchemy import Connection

from evalstore.storage import database, sink_ranges
from evalstore.storage.sink_cursors import Lease, LeaseLost, Place

_ROWS_LIMIT: Final = 500
_EVENTS_LIMIT: Final = 4000
# A prepared transaction goes on under another name, so whichever holds the lock may have left the gap.
_PREPARED: Final = "-1/"

_HOLDERS: Final = """
SELECT virtualtransaction FROM pg_locks
WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
    AND relation = pg_get_serial_sequence('confirmations', 'id')::regclass
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
_ROWS: Final = """
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


class Item(msgspec.Struct, gc=False):
    """An event to pass on, or an erasure, and where a sink is that has confirmed it.

    Without an `eval_id` it is a place alone: what is before it belongs to other ranges of the sink.
    `version` is that of the evaluation with this event; `status` that after its commit.
    """

    is_erased: bool
    eval_id: str
    event_id: str
    version: int
    place: Place
    status: str | None = None


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
        return not self.holders and not any(holder.startswith(_PREPARED) for holder in held)


class OutboxReader:
    """The items behind a cursor, in their order. For one thread; keeps what it read ahead."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._range = sink_ranges.of_row(lease.name)
        self._read = lease.cursor.place
        self._settled = 0
        self._gap: _Gap | None = None
        self._ahead = deque[Item]()

    @property
    def gap_age_s(self) -> float:
        """For how long a transaction in progress has held up what is behind it."""
        return time.monotonic() - self._gap.since if self._gap else 0.0

    def take(self, conn: Connection, most: int) -> list[Item]:
        """The next items, none where there is nothing to pass on now. Does not wait.

        Raises LeaseLost where the sink was paused, moved, taken over, or has rows in the log alone; DatabaseOutage (retry).
        """
        if not self._ahead and not self._poll(conn) and self._gap and self._gap.holders is None:
            self._poll(conn)  # most gaps are settled by the time somebody looks
        return [self._ahead.popleft() for _ in range(min(most, len(self._ahead)))]

    def _poll(self, conn: Connection) -> bool:
        """Read ahead; returns whether there is something."""
        lease, raw = self._lease, database.driver(conn)
        with database.errors(), conn.begin(), database.pipelined(raw):
            # In this order: a row of a transaction that holds no lock any more is visible to the statement after.
            held = raw.execute(_HOLDERS) if self._gap else None
            rows = raw.execute(_ROWS, [self._read.id, _ROWS_LIMIT, _EVENTS_LIMIT])
            # Last: who deletes rows that a sink needs says so in the same transaction.
            control = raw.execute(_CONTROL, [lease.token, lease.cursor.generation, lease.name])
            if held and self._gap and self._gap.is_settled({name for (name,) in held.fetchall()}):
                self._settled, self._gap = self._gap.last, None
            found = rows.fetchall()
            if control.fetchone() != (True,):
                raise LeaseLost(f"sink {lease.name}: it was paused or moved, or another process works on it")
        for row_id, recorded_at, body in found:
            if self._read.id + 1 < row_id and self._settled < row_id - 1:
                if self._gap is None or self._gap.last < row_id:
                    self._gap = _Gap(found[-1][0])
                return bool(self._ahead)
            self._add(row_id, recorded_at, body)
        self._gap = None
        return bool(self._ahead)

    def _add(self, row_id: int, recorded_at: datetime, body: str) -> None:
        before, self._read = self._read, Place(row_id, 0, recorded_at)
        number, ahead, offset, is_mine = 0, self._ahead, before.offset, self._range.holds
        last = 0
        for line in _LINES.decode_lines(body):
            if not is_mine(line.eval_id):
                number += 1 if line.type == "storage:evaluation:erased" else len(line.event_ids)
                continue
            is_erased = line.type == "storage:evaluation:erased"
            version = line.version - len(line.event_ids)
            for at, event_id in enumerate([""] if is_erased else line.event_ids, 1):
                number += 1
                if number > offset:
                    if ahead and not ahead[-1].eval_id:
                        ahead.pop()
                    last = number
                    place = _new(Place, (before.id, number, before.recorded_at))
                    ahead.append(Item(is_erased, line.eval_id, event_id, version + at, place, line.status))
        if last == number > offset:
            ahead[-1].place = self._read
        elif number > offset:  # The rest of the row belongs to other ranges. One item after those of this range says so.
            if ahead and not ahead[-1].eval_id:
                ahead.pop()
            ahead.append(Item(False, "", "", 0, self._read))
