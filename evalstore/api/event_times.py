"""Find times for events whose requests have none: a repeated request must build the same event as the first request."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import redis
from sqlalchemy import Connection

from evalstore.storage import conditional
from evalstore.storage.conditional import WriteRequest
from models.errors import DatabaseOutage, RedisOutage
from models.events import Event
from models.logs import EventLogger
from models.record import EventRow
from tasks.keys import Names

log = EventLogger("evalstore.api")

Times = dict[tuple[str, UUID | None], datetime]

_PAUSE_AFTER_FAILURE_S: Final = 5.0
_REMEMBERED_S: Final = 86_400


class EventTimes:
    """Finds the time of an event's first request, in the event log and in Redis. For threads.

    `connect` opens a connection to PostgreSQL for a short query, and raises DatabaseOutage.
    """

    def __init__(self, client: redis.Redis, names: Names, connect: Callable[[], AbstractContextManager[Connection]]) -> None:
        self._redis, self._names, self._connect = client, names, connect
        self._log_paused_until = self._redis_paused_until = 0.0

    def for_queue(self, requests: Sequence[WriteRequest]) -> list[Event]:
        """Return the events of `requests` for the queue, each with the time of its first request. Raises RedisOutage.

        The event log has the times of stored events. Redis has the times of events that may still be in the queue.
        """
        stored = self._stored([request.event for request in requests if not request.has_explicit_time])
        events = []
        for request in requests:
            event = request.event
            if isinstance(event, EventRow):
                raise TypeError("the queue takes events, not rows of the log")
            if not request.has_explicit_time and event.occurred_at is not None:
                first = stored.get((event.eval_id, event.event_id))
                first = first or self._remember(event.eval_id, str(event.event_id), event.occurred_at)
                event = event.model_copy(update={"occurred_at": first})
            events.append(event)
        return events

    def for_database(self, requests: Sequence[WriteRequest]) -> list[WriteRequest]:
        """Return `requests` with the times of events that were queued before.

        With another time, the queued event would become a dead letter (EventIdReused).
        """
        queued = self._queued([request.event for request in requests if not request.has_explicit_time])
        return [
            request
            if request.has_explicit_time
            else request._replace(
                event=conditional.at_time(request.event, queued.get((request.event.eval_id, request.event.event_id)))
            )
            for request in requests
        ]

    def _remember(self, eval_id: str, event_id: str, now: datetime) -> datetime:
        key = self._names.given_time(eval_id, event_id)
        try:
            pipeline: Any = self._redis.pipeline(transaction=True)
            pipeline.set(key, now.isoformat(), nx=True, ex=_REMEMBERED_S)
            pipeline.get(key)
            _, first = pipeline.execute()
        except redis.RedisError as error:
            raise RedisOutage(str(error)) from error
        return datetime.fromisoformat(first.decode())

    def _queued(self, events: Sequence[Event | EventRow]) -> Times:
        """Return the times that `_remember` wrote. During an outage of Redis, return none without waiting."""
        if not events or time.monotonic() < self._redis_paused_until:
            return {}
        try:
            times: Any = self._redis.mget([self._names.given_time(event.eval_id, str(event.event_id)) for event in events])
        except redis.RedisError as error:
            self._redis_paused_until = time.monotonic() + _PAUSE_AFTER_FAILURE_S
            log.warning("queue_skipped", error=error)
            return {}
        pairs = zip(events, times, strict=True)
        return {(event.eval_id, event.event_id): datetime.fromisoformat(at.decode()) for event, at in pairs if at is not None}

    def _stored(self, events: Sequence[Event | EventRow]) -> Times:
        """Return the times of stored events. During an outage of PostgreSQL, return none without waiting."""
        if not events or time.monotonic() < self._log_paused_until:
            return {}
        try:
            with self._connect() as conn:
                return conditional.times(conn, events)
        except DatabaseOutage as error:
            self._log_paused_until = time.monotonic() + _PAUSE_AFTER_FAILURE_S
            log.warning("event_log_skipped", error=error)
            return {}
