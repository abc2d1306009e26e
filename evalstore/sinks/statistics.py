"""The part of `evalstore sinks run` that keeps runs and statistics, with a cursor of its own in the outbox. Always on."""

import threading
import time
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, Engine

from evalstore.sinks.leased_worker import LeasedWorker
from evalstore.storage import outbox_reader, rollups, sink_cursors
from evalstore.storage.outbox_reader import OutboxRows
from evalstore.storage.sink_cursors import Cursor, Lease, Place, ReplayKey

# An evaluation that changes several times within this time is counted once. Statistics are late by little more.
INTERVAL_S: Final = 5.0
_IDLE_S: Final = 0.5
_TIMEOUT_S: Final = 120.0
_ROWS: Final = 5_000
_CONFIRMATIONS: Final = 20_000
_PAGE: Final = 20_000


class StatisticsWorker(LeasedWorker):
    """Counts changed evaluations, and announces runs that finished, until `stopping`."""

    def __init__(self, engine: Engine, owner: str, stopping: threading.Event) -> None:
        super().__init__(rollups.NAME, rollups.NAME, _TIMEOUT_S, engine, owner, stopping)

    def create(self, conn: Connection) -> bool:
        """A new cursor begins with a sweep of all evaluations."""
        self.database(conn, lambda conn: sink_cursors.create(conn, rollups.NAME, rollups.NAME, replay=True))
        return True

    def open_turns(self, conn: Connection, lease: Lease) -> "_Turns":
        """Return the work under a lease."""
        return _Turns(self, conn, lease)


class _Turns:
    """The work under one lease."""

    def __init__(self, worker: StatisticsWorker, conn: Connection, lease: Lease) -> None:
        self._worker, self._conn, self._lease = worker, conn, lease
        self._cursor = lease.cursor
        self._round = Round(lease)

    def take_one(self) -> None:
        """Count what changed, and wait. Raises LeaseLost, DatabaseOutage."""
        if self._cursor.replay_until is not None:
            self._cursor = self._worker.database(self._conn, sweep_on, self._lease, self._cursor)
            return
        began = time.monotonic()
        self._cursor, changes = self._worker.database(self._conn, self._round.run, self._cursor)
        self._worker.wait(max(0.0, began + INTERVAL_S - time.monotonic()) if changes else _IDLE_S)

    def close(self) -> None:
        """Nothing is open."""


class Round:
    """Counts all that was committed, under one lease."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._rows = OutboxRows(lease, _ROWS, _CONFIRMATIONS)

    def run(self, conn: Connection, cursor: Cursor) -> tuple[Cursor, int]:
        """Return the cursor after it, and how many changes were read.

        Raises LeaseLost, DatabaseOutage (begin again with a new lease).
        """
        due = rollups.due(conn)
        told = 0
        while rows := self._rows.take(conn):
            eval_ids, erased = set[str](), set[str]()
            for _, _, body in rows:
                changed, gone = outbox_reader.changed(body)
                eval_ids |= changed
                erased |= gone
            cursor = cursor._replace(place=Place(rows[-1][0], 0, rows[-1][1]))
            rollups.apply(conn, self._lease, cursor, sorted(eval_ids), erased)
            told += len(eval_ids)
        if due and not self._rows.has_gap:
            rollups.settle(conn, self._lease, due)
        return cursor, told


# A sweep goes through the stored evaluations, and then through the counted ones for those that were erased meanwhile.
_STORED, _COUNTED = str(UUID(int=0)), str(UUID(int=1))
_FIRST: Final = datetime(1970, 1, 1, tzinfo=UTC)


def sweep_on(conn: Connection, lease: Lease, cursor: Cursor) -> Cursor:
    """Count the next evaluations, whatever the outbox says. Return the cursor after them. Raises LeaseLost, DatabaseOutage."""
    key = cursor.replay_at
    if key is None or not key.eval_id:
        key = ReplayKey(_FIRST, "", _FIRST, _STORED)
    eval_ids, erased = list[str](), set[str]()
    if key.event_id == _STORED:
        page = rollups.stored_page(conn, (key.recorded_at, key.eval_id), _PAGE)
        eval_ids = sorted(eval_id for _, eval_id in page)
        # Every id is greater than "!".
        following = ReplayKey(*page[-1], page[-1][0], _STORED) if page else ReplayKey(_FIRST, "!", _FIRST, _COUNTED)
        after = cursor._replace(replay_at=following)
    else:
        last, erased = rollups.erased_page(conn, key.eval_id, _PAGE)
        eval_ids = sorted(erased)
        after = cursor._replace(replay_at=key._replace(eval_id=last))
        if not last:
            after = cursor._replace(replay_until=None, replay_at=None)
    rollups.apply(conn, lease, after, eval_ids, erased)
    return after


def catch_up(conn: Connection) -> None:
    """Count all that was committed, in a process that is alone: for tests and benchmarks. Raises LeaseLost, DatabaseOutage."""
    sink_cursors.create(conn, rollups.NAME, rollups.NAME, replay=True)
    lease = sink_cursors.claim(conn, rollups.NAME, "catch-up")
    if lease is None:
        raise sink_cursors.LeaseLost("another process counts")
    cursor = lease.cursor
    while cursor.replay_until is not None:
        cursor = sweep_on(conn, lease, cursor)
    reader = Round(lease)
    reader.run(conn, cursor)
    reader.run(conn, cursor)
    sink_cursors.release(conn, lease)
