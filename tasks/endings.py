"""The parts of a recording's events: ids, content, and the ending for an error."""

import base64
from datetime import UTC, datetime
from typing import Any, Final, Literal

from uuid_utils import uuid7

from models import content
from models.errors import printable
from models.record import rfc3339

Json = dict[str, Any]
Status = Literal["completed", "failed", "timed_out", "cancelled"]

# Errors of subprocess, Dramatiq and Celery, by name: importing these libraries would cost other senders time.
_TIME_LIMITS: Final = frozenset({"TimeoutExpired", "TimeLimitExceeded", "SoftTimeLimitExceeded"})
_MAX_REASON: Final = 1000


def event(type_: str, eval_id: str, attempt: int, **fields: Any) -> Json:
    """Build an event that may be sent again: with its id and time, and without fields that are None."""
    named = {"type": f"evaluation:{type_}", "eval_id": eval_id, "attempt": attempt}
    unique = {"event_id": str(uuid7()), "occurred_at": rfc3339(datetime.now(UTC))}
    return named | unique | {name: value for name, value in fields.items() if value is not None}


def status_of(raised: BaseException) -> Status:
    """Return the ending of a block that an error left."""
    if isinstance(raised, TimeoutError) or type(raised).__name__ in _TIME_LIMITS:
        return "timed_out"
    return "failed" if isinstance(raised, Exception) else "cancelled"


def content_fields(name: str, value: str | bytes | None) -> Json:
    """Return content as text if its bytes are UTF-8, else as base64."""
    if not isinstance(value, bytes | bytearray | memoryview):
        return {} if value is None else {name: value}
    text = content.from_bytes(bytes(value))
    return {name: text} if isinstance(text, str) else {f"{name}_b64": base64.b64encode(text).decode()}


def joined(error: str | bytes | None, text: str) -> str | bytes:
    """Return the text behind what standard error holds already."""
    if not error:
        return text
    return b"\n".join([error, content.to_bytes(text)]) if isinstance(error, bytes) else f"{error}\n{text}"


def as_reason(reason: str) -> str:
    """Return a text that the field `reason` takes."""
    return printable(reason).replace("\0", "\\0")[:_MAX_REASON]
