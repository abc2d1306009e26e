"""Builders of events for tests."""

from typing import Any
from uuid import UUID, uuid4

Json = dict[str, Any]

_REQUIRED: dict[str, Json] = {"queued": {"code": "c"}, "completed": {"exit_code": 0}, "failed": {"error": "e"}}


def event(type_: str, eval_id: str = "e", *, number: int | None = None, second: int = 0, **fields: Any) -> Json:
    """Return a valid event of `evaluation:TYPE_`, with `fields` instead of or beside the required ones.

    `number` makes its `event_id`, which is random otherwise. `second` is the second of its `occurred_at`.
    """
    event_id = str(uuid4() if number is None else UUID(int=number))
    named = {"type": f"evaluation:{type_}", "eval_id": eval_id, "event_id": event_id}
    return {**named, "occurred_at": f"2026-01-01T00:00:{second:02}Z", **_REQUIRED.get(type_, {}), **fields}
