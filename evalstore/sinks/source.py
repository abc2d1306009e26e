"""Read what is to be passed on next: events of the log while it is replayed, then events and erasures of the outbox."""

from collections import deque
from typing import Any

import msgspec
from sqlalchemy import Connection

from evalstore.sinks.protocol import SinkEvent
from evalstore.storage import event_reader
from evalstore.storage.event_reader import LogReader, StoredEvent
from evalstore.storage.outbox_reader import Item, OutboxReader
from evalstore.storage.sink_cursors import Cursor, Lease, Place, ReplayKey
from models.logs import EventLogger

log = EventLogger("evalstore.sinks")


class Step(msgspec.Struct, frozen=True, eq=False, gc=False):
    """An event, the erasure of an evaluation, another confirmation, or nothing but a new place, behind `start` at `mark`."""

    eval_id: str
    event: SinkEvent | None
    start: Cursor
    mark: Place | ReplayKey
    is_erased: bool = False
    confirmation: dict[str, Any] | None = None

    @property
    def cursor(self) -> Cursor:
        """The cursor of a sink that has this step and all steps before it."""
        if isinstance(self.mark, Place):
            return self.start._replace(place=self.mark)
        return self.start._replace(replay_at=self.mark)


def to_json(cursor: Cursor) -> dict[str, Any]:
    """A cursor as a JSON object."""
    found: dict[str, Any] = msgspec.to_builtins(cursor._asdict())
    return found


def from_json(document: Any, current: Cursor) -> Cursor:
    """The cursor in a JSON object, or `current` where the object is of another timeline, or from before a rewind."""
    try:
        found = Cursor(**msgspec.convert(document, dict[str, Any]))
        found = msgspec.convert([*found], Cursor)
    except (msgspec.ValidationError, TypeError):
        return current
    return found if (found.generation, found.timeline) == (current.generation, current.timeline) else current


class Source:
    """For one thread. `lease.cursor` is where it begins."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self._events = deque[StoredEvent]()
        self._outbox = OutboxReader(lease)
        cursor = lease.cursor
        self._log = (
            LogReader(lease, cursor.replay_at, cursor.replay_until) if cursor.replay_until and cursor.replay_at else None
        )

    @property
    def gap_age_s(self) -> float:
        """For how long a transaction in progress has held up what is behind it."""
        return self._outbox.gap_age_s

    def take(self, conn: Connection, most: int) -> list[Step]:
        """The next steps, none where there is nothing to pass on now. Raises LeaseLost, DatabaseOutage (retry)."""
        return self._replayed(conn, self._log, most) if self._log else self._committed(conn, most)

    def _replayed(self, conn: Connection, reader: LogReader, most: int) -> list[Step]:
        cursor = self.lease.cursor
        if not self._events:
            page = reader.next_page(conn)
            if page is None:
                return [self._finish_replay()]
            self._events.extend(page)
        taken = [self._events.popleft() for _ in range(min(most, len(self._events)))]
        return [
            Step(key.eval_id, SinkEvent(key.eval_id, key.event_id, fields["type"], fields), cursor, key)
            for key, fields in ((event.key, event.fields) for event in taken)
        ]

    def _finish_replay(self) -> Step:
        cursor = self.lease.cursor
        until = cursor.replay_until or cursor.place.recorded_at
        after = cursor._replace(place=cursor.place._replace(recorded_at=until), replay_until=None, replay_at=None)
        self._log, self.lease = None, self.lease._replace(cursor=after)
        return Step("", None, after, after.place)

    def _committed(self, conn: Connection, most: int) -> list[Step]:
        items = self._outbox.take(conn, most)
        if not items:
            return []
        found = event_reader.by_key(conn, [(item.eval_id, item.event_id) for item in items if item.event_id])
        steps = [self._of(item, found.get((item.eval_id, item.event_id))) for item in items]
        if gone := sum(bool(item.event_id) and step.event is None for item, step in zip(items, steps, strict=True)):
            log.warning("sink_events_gone", sink=self.lease.name, events=gone)
        return steps

    def _of(self, item: Item, fields: dict[str, Any] | None) -> Step:
        eval_id, cursor = item.eval_id, self.lease.cursor
        if fields is None:
            return Step(eval_id, None, cursor, item.place, item.is_erased, item.confirmation)
        fields["version"] = item.version
        return Step(eval_id, SinkEvent(eval_id, item.event_id, fields["type"], fields, item.status), cursor, item.place)
