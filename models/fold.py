"""The rule that makes the record of an evaluation from the set of its events.

The order of events and repeats make no difference. `fold` adds events to a record without the earlier events. So the events of
an evaluation may come in any parts, and the record equals the result of `merge` for all events.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from models import merge_state
from models.events import ENDINGS, Event
from models.fields import FROM_QUEUED, FROM_RESULT, FROM_STARTED
from models.merge_state import LOST, MAX_ENDINGS, NOTHING, PHASES, QUEUED, STARTED, MergeState, Metadata
from models.record import EventRow, Record, RecordRow, record, to_row


def _slice(names: tuple[str, ...]) -> slice:
    first = EventRow._fields.index(names[0])
    return slice(first, first + len(names))


# The columns of an event's row that go to the record, and their values if there is no such event.
_QUEUED, _RESULT, _STARTED = map(_slice, (FROM_QUEUED, FROM_RESULT, FROM_STARTED))
# Faster than the constructor of a named tuple.
_new = tuple.__new__
_NO_QUEUED, _NO_RESULT, _NO_STARTED = ((None,) * len(names) for names in (FROM_QUEUED, FROM_RESULT, FROM_STARTED))


class Folded(NamedTuple):
    """A record with its merge state. `conflicting_results` counts new results of attempts that already had a result."""

    record: RecordRow
    merge_state: bytes
    conflicting_results: int = 0


def fold(before: Folded | None, events: Sequence[EventRow]) -> Folded:
    """Add `events` to the record `before`, which must not include any of them yet. Return the new record.

    `events` belong to one evaluation. There is at least one, and none comes twice. Raises Undecodable if the merge state is
    invalid.
    """
    if before:
        past, version = merge_state.decode(before.record, before.merge_state), before.record.version + len(events)
        counted = past.events + list(events)
    else:
        past, version, counted = NOTHING, len(events), list(events)
    metadata = merge_state.merge_metadata(past.metadata, events)
    winners = _winners(counted)
    new = _record(winners, metadata, version)
    new_endings = [event.attempt for event in events if event.type in ENDINGS]
    endings = {*past.endings, *new_endings} if new_endings else past.endings
    if merge_state.names_its_event(new):
        state = merge_state.ONLY_EVENT
    else:
        state = merge_state.encode(_merge_state(winners, metadata, endings))
    return Folded(new, state, len(new_endings) - (len(endings) - len(past.endings)))


class _Winners(NamedTuple):
    """The events that determine a record. The started, lost and ending events belong to its attempt."""

    eval_id: str
    attempt: int
    code: EventRow | None
    first_started: EventRow | None
    last_started: EventRow | None
    last_lost: EventRow | None
    result: EventRow | None


def _winners(events: Sequence[EventRow]) -> _Winners:
    attempt = max([event.attempt for event in events])
    code = first = last = lost = result = None
    for event in events:
        phase = PHASES[event.type]
        if phase == QUEUED:
            code = event if code is None or _queued_order(event) < _queued_order(code) else code
        elif event.attempt != attempt:
            continue
        elif phase == STARTED:
            first = event if first is None or _when(event) < _when(first) else first
            last = event if last is None or _when(event) > _when(last) else last
        elif phase == LOST:
            lost = event if lost is None or _when(event) > _when(lost) else lost
        else:
            result = event if result is None or _when(event) < _when(result) else result
    return _Winners(events[0].eval_id, attempt, code, first, last, lost, result)


def _when(event: EventRow) -> tuple[datetime, UUID]:
    return event.occurred_at, event.event_id


def _queued_order(event: EventRow) -> tuple[int, datetime, UUID]:
    return -event.attempt, event.occurred_at, event.event_id


def _record(winners: _Winners, metadata: Metadata, version: int) -> RecordRow:
    eval_id, attempt, code, first_started, last_started, last_lost, result = winners
    if result:
        status = result.type.removeprefix("evaluation:")
    elif last_lost and (last_started is None or _when(last_lost) > _when(last_started)):
        status = "lost"
    else:
        status = "running" if last_started else "queued"
    return _new(
        RecordRow,
        (
            eval_id,
            status,
            attempt,
            version,
            *(code[_QUEUED] if code else _NO_QUEUED),
            # Each field separately: if the result does not name its executor, the last started event's executor stays.
            result.executor_id if result and result.executor_id is not None else last_started and last_started.executor_id,
            result.container_id if result and result.container_id is not None else last_started and last_started.container_id,
            *(first_started[_STARTED] if first_started else _NO_STARTED),
            *(result[_RESULT] if result else _NO_RESULT),
            metadata.values,
            metadata.is_truncated,
            code.occurred_at if code else None,
            first_started.occurred_at if first_started else None,
            result.occurred_at if result else None,
            code.event_id if code else None,
            result.event_id if result else None,
        ),
    )


def _merge_state(winners: _Winners, metadata: Metadata, endings: Collection[int]) -> MergeState:
    _, _, code, first, last, lost, result = winners
    names_executor = result is not None and result.executor_id is not None
    names_container = result is not None and result.container_id is not None
    return MergeState(
        code.attempt if code else 0,
        first.event_id if first else None,
        _when(last) if last and first and last.event_id != first.event_id else None,
        names_executor,
        names_container,
        last.executor_id if last and names_executor else None,
        last.container_id if last and names_container else None,
        _when(lost) if lost else None,
        sorted(endings, reverse=True)[:MAX_ENDINGS] if len(endings) > 1 else list(endings),
        metadata.stamps,
        metadata.keys,
        metadata.omitted,
        metadata.dropped,
    )


def merge(events: Iterable[Event]) -> Record:
    """Return the record that a set of events of one evaluation makes, in any order and with any repeats.

    Raises ValueError for no events, for events of several evaluations, and for an event without `event_id` or `occurred_at`. Of
    two events with the same `event_id` the first in `events` counts, as the first committed counts in the store.
    """
    rows: dict[UUID, EventRow] = {}
    for event in events:
        row = to_row(event)
        rows.setdefault(row.event_id, row)
    if len({row.eval_id for row in rows.values()}) != 1:
        raise ValueError("expected the events of exactly one evaluation")
    folded = fold(None, list(rows.values())).record
    code = rows[folded.code_event_id].code if folded.code_event_id else None
    result = rows[folded.result_event_id] if folded.result_event_id else None
    return record(folded, code, result.output if result else None, result.error if result else None)
