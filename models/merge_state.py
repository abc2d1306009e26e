"""The merge state: what a later fold needs from a record's events beyond the record's columns.

The set of events determines the state and its bytes: the number of the rule, then msgpack. A record of one event needs only the
number, if its columns name that event.
"""

import heapq
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from hashlib import sha256
from operator import itemgetter
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec

from models.errors import EvalstoreError
from models.events import ENDINGS
from models.fields import SCALARS
from models.record import EventRow, RecordRow

MAX_KEYS: Final = 1024
MAX_VALUE_BYTES: Final = 8 * 1024
MAX_ENDINGS: Final = 64

# Change this number with the rule or with the columns that it fills: a state of another rule is rebuilt from the log.
_RULE: Final = b"\x01"
# The merge state of a record whose columns name the one event that it is made of.
ONLY_EVENT: Final = _RULE
QUEUED, STARTED, LOST, ENDING = range(4)
PHASES: Final = {
    "evaluation:queued": QUEUED,
    "evaluation:started": STARTED,
    "evaluation:lost": LOST,
    **dict.fromkeys(ENDINGS, ENDING),
}

Moment = tuple[datetime, UUID]
# The order in which metadata is merged: attempt, phase, occurred_at, event_id.
Stamp = tuple[int, int, datetime, UUID]
# The metadata of an event that still counts, and the keys of its omitted values.
Described = tuple[Stamp, dict[str, Any], frozenset[str]]


class Undecodable(EvalstoreError):
    """The bytes are no merge state of this record by the rule of this release."""


class MergeState(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """The merge state of a record. All fields except `queued_attempt`, `endings` and metadata describe the record's attempt.

    `last_started` is None if the first started event is also the last. `last_executor_id` and `last_container_id` belong to the
    last started event, if the result names its own. `keys` has a number for each metadata key, in sorted order: the position of
    the key's event in `stamps`. It is empty if there is only one stamp. `omitted` has the positions of keys whose values were
    too large.
    """

    queued_attempt: int
    first_started_id: UUID | None
    last_started: Moment | None
    result_names_executor: bool
    result_names_container: bool
    last_executor_id: str | None
    last_container_id: str | None
    last_lost: Moment | None
    endings: list[int]
    stamps: list[Stamp]
    keys: list[int]
    omitted: list[int]
    dropped: bool


class Metadata(NamedTuple):
    """Merged metadata, with the data for its merge state."""

    values: dict[str, Any]
    stamps: list[Stamp]
    keys: list[int]
    omitted: list[int]
    dropped: bool

    @property
    def is_truncated(self) -> bool:
        """Tell whether a key was dropped or a value omitted."""
        return self.dropped or bool(self.omitted)


class Past(NamedTuple):
    """The events that a record and its merge state represent, reduced to what can still affect a later fold."""

    events: list[EventRow]
    metadata: Metadata
    endings: Sequence[int]


NO_METADATA: Final = Metadata({}, [], [], [], dropped=False)
NOTHING: Final = Past([], NO_METADATA, ())


_ENCODER: Final = msgspec.msgpack.Encoder(uuid_format="bytes")
_DECODER: Final = msgspec.msgpack.Decoder(MergeState)


def encode(state: MergeState) -> bytes:
    """Encode the merge state of a record that does not name its only event."""
    return _RULE + _ENCODER.encode(state)


def names_its_event(record: RecordRow) -> bool:
    """Tell whether the columns of `record` hold everything that counts of its one event."""
    return record.version == 1 and record.status not in ("running", "lost") and not record.metadata_truncated


def decode(record: RecordRow, data: bytes) -> Past:
    """Decode `record` and its merge state into the events that they represent. Raises Undecodable."""
    if data == ONLY_EVENT:
        return _only_event(record)
    if not data.startswith(_RULE):
        raise Undecodable("the merge state is of another rule")
    try:
        state = _DECODER.decode(data[1:])
    except (msgspec.MsgspecError, ValueError) as error:
        raise Undecodable(f"the merge state cannot be decoded: {error}") from error
    metadata = Metadata(record.metadata, state.stamps, state.keys, state.omitted, state.dropped)
    if not _is_consistent(metadata):
        raise Undecodable("the merge state is of other metadata")
    if (record.started_at is None) != (state.first_started_id is None) or (record.code_event_id is None) != (
        state.queued_attempt == 0
    ):
        raise Undecodable("the merge state is of another record")
    return Past(_events(record, state), metadata, state.endings)


def _is_consistent(metadata: Metadata) -> bool:
    """Tell whether the positions in the merge state fit the metadata of the record."""
    values, stamps, keys, omitted, _ = metadata
    if not keys and not omitted:
        return len(stamps) == (1 if values else 0)
    return (
        bool(stamps)
        and len(keys) == (len(values) if len(stamps) > 1 else 0)
        and (not keys or 0 <= min(keys) <= max(keys) < len(stamps))
        and (not omitted or 0 <= min(omitted) <= max(omitted) < len(values))
    )


def last_started(record: RecordRow, data: bytes) -> Moment | None:
    """Return the last started event of the record's attempt. Raises Undecodable."""
    started = [event for event in decode(record, data).events if PHASES[event.type] == STARTED]
    return max([(event.occurred_at, event.event_id) for event in started], default=None)


def _only_event(record: RecordRow) -> Past:
    if not names_its_event(record):
        raise Undecodable("the merge state is of another record")
    event_id, at, endings, phase = (
        (record.result_event_id, record.finished_at, [record.attempt], ENDING)
        if record.result_event_id
        else (record.code_event_id, record.queued_at, [], QUEUED)
    )
    if event_id is None or at is None:
        raise Undecodable("the merge state is of another record")
    event = _event(record, event_id, f"evaluation:{record.status}", record.attempt, at, record[_SCALARS])
    stamps = [(record.attempt, phase, at, event_id)] if record.metadata else []
    return Past([event], Metadata(record.metadata, stamps, [], [], dropped=False), endings)


def _events(record: RecordRow, state: MergeState) -> list[EventRow]:
    """Return the queued, started, lost and ending events that still count, without metadata and content.

    Each event has all scalars of the record. A fold takes from an event only the columns that its type of event determines.
    """
    events: list[EventRow] = []
    scalars = record[_SCALARS]
    if record.code_event_id and record.queued_at:
        events.append(
            _event(record, record.code_event_id, "evaluation:queued", state.queued_attempt, record.queued_at, scalars)
        )
    names_executor, names_container = state.result_names_executor, state.result_names_container
    if state.first_started_id and record.started_at:
        started = scalars
        if names_executor or names_container:
            started = _with_place(
                scalars,
                state.last_executor_id if names_executor else record.executor_id,
                state.last_container_id if names_container else record.container_id,
            )
        first = state.first_started_id, "evaluation:started", record.attempt, record.started_at
        if state.last_started:
            last_at, last_id = state.last_started
            events.append(_event(record, last_id, "evaluation:started", record.attempt, last_at, started))
            started = _with_place(scalars, None, None)
        events.append(_event(record, *first, started))
    if state.last_lost:
        at, event_id = state.last_lost
        events.append(_event(record, event_id, "evaluation:lost", record.attempt, at, scalars))
    if record.result_event_id and record.finished_at:
        if not (names_executor and names_container):
            scalars = _with_place(
                scalars, record.executor_id if names_executor else None, record.container_id if names_container else None
            )
        type_ = f"evaluation:{record.status}"
        events.append(_event(record, record.result_event_id, type_, record.attempt, record.finished_at, scalars))
    return events


def _slice(row: type[EventRow | RecordRow], names: tuple[str, ...]) -> slice:
    first = row._fields.index(names[0])
    return slice(first, first + len(names))


_SCALARS: Final = _slice(RecordRow, SCALARS)
_BEFORE_PLACE: Final = SCALARS.index("executor_id")
_AFTER_PLACE: Final = SCALARS.index("container_id") + 1
_NO_CONTENT: Final = (None,) * (len(EventRow._fields) - _slice(EventRow, SCALARS).stop)
# Faster than the constructor of a named tuple.
_new: Final = tuple.__new__


def _with_place(scalars: tuple[Any, ...], executor_id: str | None, container_id: str | None) -> tuple[Any, ...]:
    return (*scalars[:_BEFORE_PLACE], executor_id, container_id, *scalars[_AFTER_PLACE:])


def _event(
    record: RecordRow, event_id: UUID, type_: str, attempt: int, occurred_at: datetime, scalars: tuple[Any, ...]
) -> EventRow:
    return _new(EventRow, (record.eval_id, event_id, type_, attempt, occurred_at, None, *scalars, *_NO_CONTENT))


def _described(metadata: Metadata) -> list[Described]:
    """Group the merged metadata by source event."""
    merged, stamps, keys, places, _ = metadata
    if len(stamps) == 1 and not places:
        return [(stamps[0], merged, _NONE)]
    names = sorted(merged)
    omitted = frozenset([names[place] for place in places])
    values: list[dict[str, Any]] = [{} for _ in stamps]
    for name, place in zip(names, keys or [0] * len(names), strict=True):
        values[place][name] = merged[name]
    return [(stamp, of_event, omitted & of_event.keys()) for stamp, of_event in zip(stamps, values, strict=True)]


def merge_metadata(past: Metadata, events: Iterable[EventRow]) -> Metadata:
    """Merge the metadata of `events` into `past`."""
    new = [_describe(event) for event in events if event.metadata]
    if not new:
        return past
    described = _described(past) + new if past.stamps else new
    if len(described) == 1 and len(described[0][1]) <= MAX_KEYS:
        stamp, values, omitted = described[0]
        return Metadata(values, [stamp], [], _places(sorted(values), omitted) if omitted else [], past.dropped)
    described.sort(key=_stamp)
    if len(described) == 2:  # The most common case, in a shorter way.
        (first, before, too_large), (last, after, also_too_large) = described
        if not too_large and not also_too_large and len(after) < len(values := before | after) <= MAX_KEYS:
            return Metadata(values, [first, last], [int(name in after) for name in sorted(values)], [], past.dropped)
    merged: dict[str, Any] = {}
    winners: dict[str, int] = {}
    omitted = _NONE
    for number, (_, values, too_large) in enumerate(described):
        merged |= values
        for name in values:
            winners[name] = number
        if omitted or too_large:
            omitted = (omitted - values.keys()) | too_large
    if dropped := len(merged) > MAX_KEYS:
        kept = heapq.nsmallest(MAX_KEYS, merged, key=lambda name: sha256(name.encode()).digest())
        merged = {name: merged[name] for name in kept}
    names = sorted(merged)
    keys = [winners[name] for name in names]
    stamps = [stamp for stamp, _, _ in described]
    if len(numbers := set(keys)) < len(stamps):
        places = {number: place for place, number in enumerate(sorted(numbers))}
        keys = [places[number] for number in keys]
        stamps = [stamps[number] for number in places]
    return Metadata(
        merged,
        stamps,
        keys if len(stamps) > 1 else [],
        _places(names, omitted) if omitted else [],
        past.dropped or dropped,
    )


def _places(names: list[str], chosen: frozenset[str]) -> list[int]:
    return [place for place, name in enumerate(names) if name in chosen]


_stamp = itemgetter(0)
_NONE: Final[frozenset[str]] = frozenset()


def _describe(event: EventRow) -> Described:
    """Return an event's metadata, with a marker in place of each value that is too large."""
    values = event.metadata or {}
    stamp = event.attempt, PHASES[event.type], event.occurred_at, event.event_id
    large: dict[str, Any] | None = None
    for name, value in values.items():
        kind = type(value)
        if (kind is str and len(value) > _SHORT) or kind is dict or kind is list:
            size = _json_bytes(value)
            if size > MAX_VALUE_BYTES:
                large = large or {}
                large[name] = {"$omitted_bytes": size}
    return (stamp, values | large, frozenset(large)) if large else (stamp, values, _NONE)


# In JSON no character takes more bytes than \u0000.
_SHORT: Final = MAX_VALUE_BYTES // 6 - 1
_NEGATIVE_ZERO: Final = re.compile(rb"-0\.0(?![0-9e])")


def _json_bytes(value: Any) -> int:
    """Return the size of `value` as JSON. It is equal before and after storage: jsonb has no -0.0."""
    text = msgspec.json.encode(value)
    return len(text) if len(text) <= MAX_VALUE_BYTES else len(text) - len(_NEGATIVE_ZERO.findall(text))
