"""Store events only if a condition holds at that moment. All writes end in `event_store.store_once`.

The condition's lock is taken in the transaction that `store_once` commits.
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
from evalstore.storage.visibility import EVERYTHING, Hidden, Visibility
from models.errors import DatabaseOutage, EvalstoreError
from models.events import Event
from models.record import EventRow


class WriteRequest(NamedTuple):
    """An event to store, and what enrichers gave for it.

    `has_explicit_time`: keep its `occurred_at` even if the event is already stored with another time. The time is explicit if
    the sender gave it, or if nobody can send the event again. Otherwise the first stored time counts.
    """

    event: Event | EventRow
    has_explicit_time: bool
    enrichment: dict[str, Any] | None = None


class AlreadyQueued(EvalstoreError):
    """Another queued event of the evaluation is stored."""


class EvaluationErased(EvalstoreError):
    """The evaluation was erased: no event of it is stored any more."""

    def __init__(self, eval_id: str) -> None:
        super().__init__(f"evaluation {eval_id!r} was erased")


class VersionChanged(EvalstoreError):
    """The record is not at a requested version. `version` is its current version, or None if there is no record."""

    def __init__(self, version: int | None) -> None:
        self.version = version
        super().__init__("there is no such record" if version is None else f"the record is at version {version}")


_TIMES: Final = """
SELECT e.eval_id, e.event_id, e.occurred_at FROM unnest(%s::text[], %s::uuid[]) AS wanted (eval_id, event_id)
JOIN evaluation_events e ON e.eval_id = wanted.eval_id AND e.event_id = wanted.event_id
"""


def store(
    conn: Connection,
    requests: Sequence[WriteRequest],
    traceparent: str | None = None,
    visibility: Visibility = EVERYTHING,
) -> tuple[list[Outcome], event_store.Stored]:
    """Store events in one transaction. Their confirmations continue the trace of `traceparent`. Commit.

    Raises Hidden (nothing is stored), DatabaseOutage (retry).
    """
    events = [request.event for request in requests]
    stored = event_store.store(conn, events, _traces_of(traceparent), visibility=visibility, enrichments=_enrichments(requests))
    return _at_first_times(conn, requests, stored.outcomes), stored


def _store_once(
    conn: Connection, request: WriteRequest, traceparent: str | None, visibility: Visibility
) -> tuple[Outcome, event_store.Stored]:
    """Do as `store` does for one event, in a transaction that has begun. Raises Restart, Hidden after a rollback."""
    stored = event_store.store_once(conn, [request.event], _traces_of(traceparent), visibility, _enrichments([request]))
    (outcome,) = _at_first_times(conn, [request], stored.outcomes)
    return outcome, stored


def _enrichments(requests: Sequence[WriteRequest]) -> dict[int, dict[str, Any]]:
    return {at: request.enrichment for at, request in enumerate(requests) if request.enrichment}


def _traces_of(traceparent: str | None) -> Callable[[Sequence[int]], list[str]]:
    return lambda positions: [traceparent or ""] * len(positions)


def _at_first_times(conn: Connection, requests: Sequence[WriteRequest], stored: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes, after comparing repeats without an explicit time again with the first stored time."""
    outcomes = list(stored)
    doubtful = [at for at, request in enumerate(requests) if outcomes[at] == "reused" and not request.has_explicit_time]
    if doubtful:
        events = [requests[at].event for at in doubtful]
        stored_times = times(conn, events)
        again = [at_time(event, stored_times.get((event.eval_id, event.event_id))) for event in events]
        for at, outcome in zip(doubtful, event_store.store(conn, again).outcomes, strict=True):
            outcomes[at] = outcome
    return outcomes


def times(conn: Connection, events: Sequence[Event | EventRow]) -> dict[tuple[str, UUID | None], datetime]:
    """Return the stored `occurred_at` of those `events` that are stored, by (eval_id, event_id).

    Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        cursor.execute(_TIMES, [[event.eval_id for event in events], [event.event_id for event in events]])
        return {(eval_id, event_id): occurred_at for eval_id, event_id, occurred_at in cursor}


def at_time(event: Event | EventRow, occurred_at: datetime | None) -> Event | EventRow:
    """Return the event with this `occurred_at`. Return it unchanged if the time is None or if the event is a row of the log."""
    if occurred_at is None or isinstance(event, EventRow):
        return event
    return event.model_copy(update={"occurred_at": occurred_at})


_ONE_AT_A_TIME: Final = "SELECT pg_advisory_xact_lock(%s)"
# The record names a queued event if there is one. So this query need not read a long event log.
_QUEUED: Final = """
SELECT EXISTS (SELECT FROM evaluations WHERE eval_id = %(eval_id)s AND code_event_id <> %(event_id)s) AND NOT EXISTS (
    SELECT FROM evaluation_events WHERE eval_id = %(eval_id)s AND event_id = %(event_id)s AND type = 'evaluation:queued')
"""


_OWNER: Final = "SELECT submitter, run_id FROM evaluations WHERE eval_id = %s"


def create(
    conn: Connection, request: WriteRequest, traceparent: str | None = None, visibility: Visibility = EVERYTHING
) -> Outcome:
    """Store a queued event unless another queued event of its evaluation is stored. Commit.

    Of several concurrent callers, one succeeds. Raises AlreadyQueued, Hidden (nothing is stored), DatabaseOutage (retry).
    """
    event = request.event
    for _ in range(event_store.TRIES):
        with database.errors():
            raw = database.driver(conn)
            raw.execute(_ONE_AT_A_TIME, [_lock_key(event.eval_id)])
            ((is_queued,),) = raw.execute(_QUEUED, {"eval_id": event.eval_id, "event_id": event.event_id}).fetchall()
            if is_queued:
                owner = raw.execute(_OWNER, [event.eval_id]).fetchone() or (None, None)
                raw.rollback()
                _check_visible(event.eval_id, owner, visibility)
                raise AlreadyQueued(f"evaluation {event.eval_id!r} was created before, by another event")
        try:
            return _store_once(conn, request, traceparent, visibility)[0]
        except Restart as restart:
            event_store.after_restart(conn, restart)
    raise DatabaseOutage(event_store.RESTARTED_TOO_OFTEN)


def _check_visible(eval_id: str, owner: Sequence[Any], visibility: Visibility) -> None:
    """Raise Hidden if an evaluation with this submitter and run is not visible."""
    if not visibility.allows(*owner):
        raise Hidden(frozenset({eval_id}))


def _lock_key(eval_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"evalstore:create:{eval_id}".encode()).digest()[:8], signed=True)


_LOCK: Final = "SELECT version, attempt, submitter, run_id FROM evaluations WHERE eval_id = %s FOR NO KEY UPDATE"
_ATTEMPT: Final = "SELECT attempt FROM evaluation_events WHERE eval_id = %s AND event_id = %s"


def update(
    conn: Connection,
    eval_id: str,
    make: Callable[[int], WriteRequest],
    versions: Sequence[int] | None,
    traceparent: str | None = None,
    visibility: Visibility = EVERYTHING,
) -> tuple[WriteRequest, Outcome, event_store.Stored]:
    """Store the event that `make` builds for the record's attempt, if the record is at one of `versions`. Commit.

    The attempt is 1 if there is no record. An event that is already stored is a duplicate at any version, because its sender
    may have missed the reply. Return the event and its outcome.

    Raises VersionChanged, EvaluationErased, Hidden (nothing is stored), DatabaseOutage (retry), and the errors of `make`.
    """
    for _ in range(event_store.TRIES):
        request = _checked(conn, eval_id, make, versions, visibility)
        try:
            outcome, stored = _store_once(conn, request, traceparent, visibility)
        except Restart as restart:
            event_store.after_restart(conn, restart)
        else:
            return request, outcome, stored
    raise DatabaseOutage(event_store.RESTARTED_TOO_OFTEN)


def _checked(
    conn: Connection,
    eval_id: str,
    make: Callable[[int], WriteRequest],
    versions: Sequence[int] | None,
    visibility: Visibility,
) -> WriteRequest:
    """Build the event to store, in a transaction that holds the record's lock.

    Raises VersionChanged, Hidden, and the errors of `make`.
    """
    with database.errors():
        raw = database.driver(conn)
        row = raw.execute(_LOCK, [eval_id]).fetchone()
        version, attempt, *owner = row or (None, 1, None, None)
        try:
            if row is not None or versions is not None:
                _check_visible(eval_id, owner, visibility)
            request = make(attempt)
            holds = versions is None or (version is not None and version in versions)
            if (attempt > 1 or not holds) and (first := _attempt_of(raw, eval_id, request.event.event_id)):
                # This is a repeat: keep the attempt of the stored event, even if a later attempt has begun.
                request = make(first)
                holds = True
        except BaseException:
            raw.rollback()
            raise
        if not holds:
            is_erased = row is None and bool(tombstones.ask(raw, [eval_id]).fetchall())
            raw.rollback()
            if is_erased:
                raise EvaluationErased(eval_id)
            raise VersionChanged(version)
    return request


def _attempt_of(raw: psycopg.Connection[Any], eval_id: str, event_id: UUID | None) -> int | None:
    """Return the attempt of an event, or None if the event is not stored."""
    row = raw.execute(_ATTEMPT, [eval_id, event_id]).fetchone()
    return None if row is None else int(row[0])
