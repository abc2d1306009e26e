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

from evalstore.storage import database, event_store, tombstones
from evalstore.storage.event_store import Outcome
from evalstore.storage.event_writer import Restart
from models.errors import DatabaseOutage, EvalstoreError
from models.events import Event
from models.record import EventRow


class WriteRequest(NamedTuple):
    """An event to store, and whether when it occurred stands: its sender said so, or nobody can repeat it. Else a repeat takes
    the time of the first."""

    event: Event | EventRow
    has_explicit_time: bool


class AlreadyQueued(EvalstoreError):
    """Another queued event of the evaluation is stored."""


class EvaluationErased(EvalstoreError):
    """The evaluation was erased: no event of it is stored any more."""

    def __init__(self, eval_id: str) -> None:
        super().__init__(f"evaluation {eval_id!r} was erased")


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
    stored = event_store.store(conn, [one.event for one in given], _traces_of(traceparent))
    return _at_first_times(conn, given, stored.outcomes), stored


def _store_once(conn: Connection, given: WriteRequest, traceparent: str | None) -> tuple[Outcome, event_store.Stored]:
    """As `store`, in a transaction that has begun. Raises Restart after it rolled that back."""
    stored = event_store.store_once(conn, [given.event], _traces_of(traceparent))
    (outcome,) = _at_first_times(conn, [given], stored.outcomes)
    return outcome, stored


def _traces_of(traceparent: str | None) -> Callable[[Sequence[int]], list[str]]:
    return lambda positions: [traceparent or ""] * len(positions)


def _at_first_times(conn: Connection, given: Sequence[WriteRequest], stored: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes of events that were stored, where a repeat without a time of its own has that of the first."""
    outcomes = list(stored)
    doubtful = [at for at, one in enumerate(given) if outcomes[at] == "reused" and not one.has_explicit_time]
    if doubtful:
        events = [given[at].event for at in doubtful]
        stored_times = times(conn, events)
        again = [at_time(event, stored_times.get((event.eval_id, event.event_id))) for event in events]
        for at, outcome in zip(doubtful, event_store.store(conn, again).outcomes, strict=True):
            outcomes[at] = outcome
    return outcomes


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
# The record names a queued event where there is one. So the log of a long evaluation is not read.
_QUEUED: Final = """
SELECT EXISTS (SELECT FROM evaluations WHERE eval_id = %(eval_id)s AND code_event_id <> %(event_id)s) AND NOT EXISTS (
    SELECT FROM evaluation_events WHERE eval_id = %(eval_id)s AND event_id = %(event_id)s AND type = 'evaluation:queued')
"""


def create(conn: Connection, given: WriteRequest, traceparent: str | None = None) -> Outcome:
    """Store a queued event unless another one of its evaluation is stored. Commits.

    Of several callers at once, one does. Raises AlreadyQueued (nothing is stored), DatabaseOutage (retry).
    """
    event = given.event
    for _ in range(event_store.TRIES):
        with database.errors():
            raw = database.driver(conn)
            raw.execute(_ONE_AT_A_TIME, [_lock_key(event.eval_id)])
            ((is_queued,),) = raw.execute(_QUEUED, {"eval_id": event.eval_id, "event_id": event.event_id}).fetchall()
            if is_queued:
                raw.rollback()
                raise AlreadyQueued(f"evaluation {event.eval_id!r} was created before, by another event")
        try:
            return _store_once(conn, given, traceparent)[0]
        except Restart as restart:
            event_store.after_restart(conn, restart)
    raise DatabaseOutage(event_store.RESTARTED_TOO_OFTEN)


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
    and what became of it. Raises VersionChanged, EvaluationErased (nothing is stored), DatabaseOutage (retry), and
    what `make` raises.
    """
    for _ in range(event_store.TRIES):
        given = _checked(conn, eval_id, make, versions)
        try:
            outcome, stored = _store_once(conn, given, traceparent)
        except Restart as restart:
            event_store.after_restart(conn, restart)
        else:
            return given, outcome, stored
    raise DatabaseOutage(event_store.RESTARTED_TOO_OFTEN)


def _checked(
    conn: Connection, eval_id: str, make: Callable[[int], WriteRequest], versions: Sequence[int] | None
) -> WriteRequest:
    """The event to store, in a transaction that holds the record's lock. Raises VersionChanged and what `make` raises."""
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
            is_erased = found is None and bool(tombstones.ask(raw, [eval_id]).fetchall())
            raw.rollback()
            if is_erased:
                raise EvaluationErased(eval_id)
            raise VersionChanged(version)
    return given


def _attempt_of(raw: psycopg.Connection[Any], eval_id: str, event_id: UUID | None) -> int | None:
    """That of an event which is stored."""
    found = raw.execute(_ATTEMPT, [eval_id, event_id]).fetchone()
    return None if found is None else int(found[0])
