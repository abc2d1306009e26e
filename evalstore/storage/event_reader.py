"""Events as sinks receive them: by their keys, or in the order in which they were stored."""

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import msgspec
import psycopg
from sqlalchemy import Connection

from evalstore.storage import database, sink_ranges
from evalstore.storage.sink_cursors import Lease, LeaseLost, ReplayKey
from evalstore.storage.tables import evaluation_events
from evalstore.storage.tombstones import text_array
from models import content
from models.record import rfc3339

INLINE_BYTES: Final = 64 * 1024
CONTENTS: Final = ("code", "output", "error")
_PAGE: Final = 2000
_SHORTEST: Final = timedelta(microseconds=1)
_LONGEST: Final = timedelta(days=365)

# A new column of the log is a field of the event as well.
_FIELDS: Final = [
    column.name
    for column in evaluation_events.columns
    if column.name not in {*CONTENTS, "event_id", "occurred_at", "extra", "metadata", "recorded_at"}
]
_COLUMNS: Final = (*_FIELDS, "recorded_at", "occurred_at", "event_id::text", "metadata::text", "extra", *CONTENTS)
_SELECT: Final = f"SELECT {', '.join(f'e.{name}' for name in _COLUMNS)}"
_EVAL_ID: Final = _FIELDS.index("eval_id")
_AFTER_FIELDS: Final = len(_FIELDS)


class StoredEvent(msgspec.Struct, gc=False):
    """An event as a JSON object, without `version`, and its place in the order of a replay."""

    key: ReplayKey
    fields: dict[str, Any]


_WANTED: Final = "unnest(%s::text[], %s::uuid[]) AS wanted (eval_id, event_id)"
_BY_KEY: Final = f"""
{_SELECT} FROM {_WANTED} JOIN evaluation_events e ON e.eval_id = wanted.eval_id AND e.event_id = wanted.event_id
"""
# Few events have content that is not in their row. One look-up for each event finds all kinds.
_CONTENTS_OF: Final = f"""
SELECT c.eval_id, c.event_id::text, c.kind, CASE WHEN c.size <= {INLINE_BYTES} THEN c.data END, c.size, c.sha256, c.encoding
FROM {_WANTED} JOIN contents c ON c.eval_id = wanted.eval_id AND c.event_id = wanted.event_id
"""


def by_key(conn: Connection, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return those of these events that are in the log, by (eval_id, event_id), without `version`.

    Raises DatabaseOutage (retry).
    """
    raw, wanted = database.driver(conn), _arrays(keys)
    with database.errors(), conn.begin(), database.pipelined(raw):
        rows = raw.cursor(binary=True).execute(_BY_KEY.encode(), wanted)
        contents = raw.cursor(binary=True).execute(_CONTENTS_OF.encode(), wanted)
        found = {(row[_EVAL_ID], row[_AFTER_FIELDS + 2]): _fields(row) for row in rows.fetchall()}
        _add_contents(found, contents.fetchall())
    return found


def _arrays(keys: Sequence[tuple[str, str]]) -> list[str]:
    """Return the keys as the texts of two arrays."""
    return [text_array([key[0] for key in keys]), "{" + ",".join([key[1] for key in keys]) + "}"]


def _fields(row: tuple[Any, ...]) -> dict[str, Any]:
    recorded_at, occurred_at, event_id, metadata, extra, *contents = row[_AFTER_FIELDS:]
    fields: dict[str, Any] = {name: value for name, value in zip(_FIELDS, row, strict=False) if value is not None}
    fields["event_id"], fields["occurred_at"], fields["recorded_at"] = event_id, rfc3339(occurred_at), rfc3339(recorded_at)
    if metadata is not None:
        fields["metadata"] = msgspec.json.decode(metadata)
    for kind, data in zip(CONTENTS, contents, strict=True):
        if data is not None:
            fields |= content_fields(kind, data)
    return {**msgspec.json.decode(extra), **fields} if extra else fields


def _add_contents(events: dict[tuple[str, str], dict[str, Any]], contents: Iterable[tuple[Any, ...]]) -> None:
    """Add content that is not in the rows of its events."""
    for eval_id, event_id, kind, *columns in contents:
        fields = events.get((eval_id, event_id))
        if fields is not None and kind not in fields and f"{kind}_b64" not in fields:
            fields |= _content(kind, *columns)


def _stored(row: tuple[Any, ...]) -> StoredEvent:
    recorded_at, occurred_at, event_id = row[_AFTER_FIELDS : _AFTER_FIELDS + 3]
    return StoredEvent(ReplayKey(recorded_at, row[_EVAL_ID], occurred_at, event_id), _fields(row))


def content_fields(kind: str, data: bytes) -> dict[str, Any]:
    """Return content as the field of an event's JSON object: text, or base64."""
    value = content.from_bytes(data)
    return {kind: value} if isinstance(value, str) else {f"{kind}_b64": base64.b64encode(value).decode()}


def _content(kind: str, data: bytes | None, size: int | None, sha256: bytes | None, encoding: str | None) -> dict[str, Any]:
    if data is not None:
        return content_fields(kind, data)
    if size is None or sha256 is None:
        return {}
    return {f"{kind}_ref": {"sha256": sha256.hex(), "size": size, "encoding": encoding or "identity"}}


_COUNT: Final = (
    "SELECT count(*) FROM (SELECT FROM evaluation_events WHERE recorded_at >= %s AND recorded_at < %s LIMIT %s) counted"
)
_BETWEEN: Final = f"""
{_SELECT} FROM evaluation_events e
WHERE e.recorded_at >= %(start)s AND e.recorded_at < %(stop)s
    AND (e.recorded_at, e.eval_id, e.occurred_at, e.event_id) > (%(start)s, %(eval_id)s, %(occurred_at)s, %(event_id)s::uuid)
ORDER BY e.recorded_at, e.eval_id, e.occurred_at, e.event_id LIMIT %(limit)s
"""
# Events of the page's evaluations that come before the page: what their versions count from.
_BEFORE: Final = """
SELECT e.eval_id, count(*) FROM evaluation_events e
WHERE e.eval_id = ANY(%(eval_ids)s::text[])
    AND (e.recorded_at, e.eval_id, e.occurred_at, e.event_id) < (%(start)s, %(eval_id)s, %(occurred_at)s, %(event_id)s::uuid)
GROUP BY e.eval_id
"""
_CONTROL: Final = """
SELECT state = 'running' AND lease_token = %s AND generation = %s, missed = 0 FROM sinks WHERE name = %s
"""


class LogReader:
    """The events of the log from a key on, up to a time, in the order in which their evaluations got them.

    It looks at a span of time at a time, as long as a page takes; block ranges (BRIN) find its rows.
    """

    def __init__(self, lease: Lease, start: ReplayKey, stop: datetime) -> None:
        self._lease, self._key, self._stop = lease, start, stop
        self._range = sink_ranges.of_row(lease.name)
        self._from = start.recorded_at
        self._span = timedelta(seconds=1)

    def next_page(self, conn: Connection) -> list[StoredEvent] | None:
        """The next events, with their `version`; None at the end. Raises LeaseLost, DatabaseOutage (retry)."""
        raw = database.driver(conn)
        with database.errors(), conn.begin():
            state = raw.execute(_CONTROL, [self._lease.token, self._lease.cursor.generation, self._lease.name]).fetchone()
            if state is None or not state[0]:
                raise LeaseLost(f"sink {self._lease.name}: it was paused or moved, or another process works on it")
            while self._from <= self._stop:
                if events := self._page(raw):
                    return events
            if not state[1]:
                raise LeaseLost(f"sink {self._lease.name}: the outbox lost rows meanwhile, which the log has")
        return None

    def _page(self, raw: psycopg.Connection[Any]) -> list[StoredEvent]:
        stop = self._shortened(raw)
        values = {**self._key._asdict(), "start": self._from, "stop": stop, "limit": _PAGE}
        if self._from != self._key.recorded_at:
            values |= {"eval_id": "", "occurred_at": datetime.min.replace(tzinfo=UTC), "event_id": str(UUID(int=0))}
        with raw.cursor(binary=True) as cursor:
            events = [_stored(row) for row in cursor.execute(_BETWEEN.encode(), values).fetchall()]
            count, last = len(events), events[-1].key if events else self._key
            events = [event for event in events if self._range.holds(event.key.eval_id)]
            by_id = {(event.key.eval_id, event.key.event_id): event.fields for event in events}
            _add_contents(by_id, cursor.execute(_CONTENTS_OF.encode(), _arrays([*by_id])).fetchall())
        if events:
            self._number(raw, events)
        self._key = last
        self._from = self._key.recorded_at if count == _PAGE else stop
        if count < _PAGE // 2:
            self._span = min(self._span * 2, _LONGEST)
        return events

    def _shortened(self, raw: psycopg.Connection[Any]) -> datetime:
        """The end of the span, which is made so short that it holds few rows to sort."""
        while True:
            stop = min(self._from + self._span, self._stop + _SHORTEST)
            ((count,),) = raw.execute(_COUNT, [self._from, stop, 4 * _PAGE]).fetchall()
            if count < 4 * _PAGE or self._span <= _SHORTEST:
                return stop
            self._span = max(self._span / 4, _SHORTEST)

    @staticmethod
    def _number(raw: psycopg.Connection[Any], events: Sequence[StoredEvent]) -> None:
        first = events[0].key
        values = {**first._asdict(), "start": first.recorded_at, "eval_ids": _distinct(event.key.eval_id for event in events)}
        before = Counter(dict(raw.execute(_BEFORE, values).fetchall()))
        for event in events:
            before[event.key.eval_id] += 1
            event.fields["version"] = before[event.key.eval_id]


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
