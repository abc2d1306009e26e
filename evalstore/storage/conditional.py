"""Writes with a condition: nothing is stored unless it holds at the moment of storing. All end in `evaluations.store`.

`evaluations.store` commits; what is locked here, before it, is locked in its transaction.
"""

import hashlib
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import psycopg
from sqlalchemy import Connection

from evalstore.storage import database, event_store
from evalstore.storage.event_store import Outcome
from models.errors import EvalstoreError
from models.events import Event
from models.record import EventRow


class WriteRequest(NamedTuple):
    """An event to store, and whether when it occurred stands: its sender said so, or nobody can repeat it. Else a repeat takes
    the time of the first."""

    event: Event | EventRow
    has_explicit_time: bool


class AlreadyQueued(EvalstoreError):
    """Another queued event of the evaluation is stored."""


class VersionChanged(EvalstoreError):
    """The record is not at a version that was asked for; `version` is the one it is at, None where there is none."""

    def __init__(self, version: int | None) -> None:
        self.version = version
        super().__init__("there is no such record" if version is None else f"the record is at version {version}")


_TIMES: Final = """
SELECT e.eval_id, e.event_id, e.occurred_at FROM unnest(%s::text[], %s::uuid[]) AS wanted (eval_id, event_id)
JOIN evaluation_events e ON e.eval_id = wanted.eval_id AND e.event_id = wanted.event_id
"""


def store(
    conn: Connection, given: Sequence[WriteRequest], traceparent: str | None = None
) -> tuple[list[Outcome], event_store.Stored]:
    """Store events in one transaction, which their confirmations trace back to. Commits. Raises DatabaseOutage (retry)."""
    stored = event_store.store(conn, [one.event for one in given], lambda positions: [traceparent or ""] * len(positions))
    outcomes = list(stored.outcomes)
    doubtful = [at for at, one in enumerate(given) if outcomes[at] == "reused" and not one.has_explicit_time]
    if doubtful:
        events = [given[at].event for at in doubtful]
        stored_times = times(conn, events)
        again = [at_time(event, stored_times.get((event.eval_id, event.event_id))) for event in events]
        for at, outcome in zip(doubtful, event_store.store(conn, again).outcomes, strict=True):
            outcomes[at] = outcome
    return outcomes, stored


def times(conn: Connection, events: Sequence[Event | EventRow]) -> dict[tuple[str, UUID | None], datetime]:
    """When those of `events` occurred that are stored, by (eval_id, event_id). Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        cursor.execute(_TIMES, [[event.eval_id for event in events], [event.event_id for event in events]])
        return {(eval_id, event_id): occurred_at for eval_id, event_id, occurred_at in cursor}


def at_time(event: Event | EventRow, occurred_at: datetime | None) -> Event | EventRow:
    """Return the event as of `occurred_at`; unchanged if that is None, or if the event is a row of the log."""
    if occurred_at is None or isinstance(event, EventRow):
        return event
    return event.model_copy(update={"occurred_at": occurred_at})


_ONE_AT_A_TIME: Final = "SELECT pg_advisory_xact_lock(%s)"
_QUEUED: Final = "SELECT event_id FROM evaluation_events WHERE eval_id = %s AND type = 'evaluation:queued'"


def create(conn: Connection, given: WriteRequest, traceparent: str | None = None) -> Outcome:
    """Store a queued event unless another one of its evaluation is stored. Commits.

    Of several callers at once, one does. Raises AlreadyQueued (nothing is stored), DatabaseOutage (retry).
    """
    event = given.event
    with database.errors():
        raw = database.driver(conn)
        raw.execute(_ONE_AT_A_TIME, [_lock_key(event.eval_id)])
        queued = {event_id for (event_id,) in raw.execute(_QUEUED, [event.eval_id]).fetchall()}
        if queued - {event.event_id} and event.event_id not in queued:
            raw.rollback()
            raise AlreadyQueued(f"evaluation {event.eval_id!r} was created before, by another event")
    return store(conn, [given], traceparent)[0][0]


def _lock_key(eval_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"evalstore:create:{eval_id}".encode()).digest()[:8], signed=True)


_LOCK: Final = "SELECT version, attempt FROM evaluations WHERE eval_id = %s FOR NO KEY UPDATE"
_ATTEMPT: Final = "SELECT attempt FROM evaluation_events WHERE eval_id = %s AND event_id = %s"


def update(
    conn: Connection,
    eval_id: str,
    make: Callable[[int], WriteRequest],
    versions: Sequence[int] | None,
    traceparent: str | None = None,
) -> tuple[WriteRequest, Outcome, event_store.Stored]:
    """Store what `make` gives for the record's attempt (1 where there is no record), if it is at one of `versions`. Commits.

    An event that is stored already is a duplicate whatever the version: the sender did not get the answer. Returns the event
    and what became of it. Raises VersionChanged (nothing is stored), DatabaseOutage (retry), and
    what `make` raises.
    """
    with database.errors():
        raw = database.driver(conn)
        found = raw.execute(_LOCK, [eval_id]).fetchone()
        version, attempt = found or (None, 1)
        try:
            given = make(attempt)
            holds = versions is None or (version is not None and version in versions)
            if (attempt > 1 or not holds) and (first := _attempt_of(raw, eval_id, given.event.event_id)):
                given = make(first)  # a repeat: another attempt may have begun since, of which this says nothing
                holds = True
        except BaseException:
            raw.rollback()
            raise
        if not holds:
            raw.rollback()
            raise VersionChanged(version)
    (outcome,), stored = store(conn, [given], traceparent)
    return given, outcome, stored


def _attempt_of(raw: psycopg.Connection[Any], eval_id: str, event_id: UUID | None) -> int | None:
    """That of an event which is stored."""
    found = raw.execute(_ATTEMPT, [eval_id, event_id]).fetchone()
    return None if found is None else int(found[0])
