"""Builders of events for tests."""

from typing import Any
from uuid import UUID, uuid4

from models.events import Event, parse

Json = dict[str, Any]

_REQUIRED: dict[str, Json] = {"queued": {"code": "c"}, "completed": {"exit_code": 0}, "failed": {"error": "e"}}


def event(type_: str, number: int = 1, second: int = 0, *, eval_id: str = "e", **fields: Any) -> Json:
    """Return a valid event. `number` makes its `event_id`, `second` is the second of its `occurred_at`."""
    named = {"type": f"evaluation:{type_}", "eval_id": eval_id, "event_id": str(UUID(int=number))}
    return {**named, "occurred_at": f"2026-01-01T00:00:{second:02}Z", **_REQUIRED.get(type_, {}), **fields}


def parsed_event(type_: str, number: int = 1, second: int = 0, *, eval_id: str = "e", **fields: Any) -> Event:
    """Return `event(…)` as a model."""
    return parse(event(type_, number, second, eval_id=eval_id, **fields))


def unique_event(type_: str, eval_id: str = "e", **fields: Any) -> Json:
    """Return an event with a random `event_id`, and without required fields that are not in `fields`."""
    named = {"type": f"evaluation:{type_}", "eval_id": eval_id, "event_id": str(uuid4())}
    return {**named, "occurred_at": "2026-01-31T09:30:00Z", **fields}
