"""Bodies of requests that write, as checked events with an id and a time."""

import hashlib
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import NAMESPACE_URL, UUID, uuid5

from uuid_utils.compat import uuid7

from evalstore.storage.conditional import WriteRequest
from models import content
from models.errors import Fault, InvalidEvent
from models.events import Event, check, decode, identity
from models.fast_decode import decode_event
from models.record import canonical_json

MAX_LINES: Final = 10_000
_LARGE_CHARACTERS: Final = 65_536
_KEY: Final = re.compile(r"[!-~]{1,255}")
_TYPES: Final = {
    "queued": "evaluation:queued",
    "running": "evaluation:started",
    "completed": "evaluation:completed",
    "failed": "evaluation:failed",
    "timed_out": "evaluation:timed_out",
    "cancelled": "evaluation:cancelled",
}


class Line(NamedTuple):
    """A line of a batch: the request to store its event, or its faults."""

    number: int
    request: WriteRequest | None
    eval_id: str | None
    event_id: UUID | None
    faults: tuple[Fault, ...] = ()


def check_idempotency_key(key: str | None) -> None:
    """Raise InvalidEvent for a key in a wrong form."""
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidEvent([Fault("Idempotency-Key", "expected 1 to 255 printable ASCII characters without spaces")])


def _object(body: bytes | bytearray) -> dict[str, Any]:
    data = decode(body, "body")
    if isinstance(body, bytearray):
        body.clear()  # Free the memory, which the content needs.
    if not isinstance(data, dict):
        raise InvalidEvent([Fault("body", f"expected a JSON object, not {type(data).__name__}")])
    return {name: value for name, value in data.items() if value is not None}


def created(body: bytearray, key: str | None, max_content_bytes: int) -> WriteRequest:
    """Return the queued event of a POST. Raises InvalidEvent."""
    data = _object(body)
    if data.setdefault("type", "evaluation:queued") != "evaluation:queued":
        raise InvalidEvent([Fault("type", "expected evaluation:queued: PUT takes later events")])
    return _complete(check(data, max_content_bytes=max_content_bytes), key)


def _complete(event: Event, key: str | None) -> WriteRequest:
    """Fill in the id and the time. With a key the id is derived from the key, so a repeated request builds the same event."""
    changes: dict[str, Any] = {}
    is_repeatable = event.event_id is not None or key is not None
    if event.event_id is None:
        changes["event_id"] = uuid7() if key is None else uuid5(NAMESPACE_URL, f"evalstore:request:{event.eval_id}:{key}")
    if event.occurred_at is None:
        changes["occurred_at"] = datetime.now(UTC)
    return WriteRequest(event.model_copy(update=changes), has_explicit_time=event.occurred_at is not None or not is_repeatable)


class Change(NamedTuple):
    """The event of a PUT. `make` completes the event for the record's attempt. `attempt` is the request's attempt, or None."""

    event: Event
    make: Callable[[int], WriteRequest]
    attempt: int | None


def changed(body: bytearray, eval_id: str, key: str | None, max_content_bytes: int) -> Change:
    """Return the event of a PUT. Raises InvalidEvent.

    Without event_id and key, the id is derived from the content, so the same change again stores nothing.
    """
    data = _object(body)
    faults = _path_faults(data, eval_id)
    status = data.pop("status", None)
    type_ = _TYPES.get(status) if isinstance(status, str) else None
    if status is not None and type_ is None:
        faults.append(Fault("status", f"expected one of {', '.join(_TYPES)}"))
    elif status is None and "type" not in data:
        faults.append(Fault("status", "required, or type"))
    elif type_ and data.setdefault("type", type_) not in (type_, "evaluation:running" if status == "running" else type_):
        faults.append(Fault("type", f"not the type of status {status}"))
    if faults:
        raise InvalidEvent(faults)
    event = check(data, max_content_bytes=max_content_bytes)
    not_content = {"eval_id", "event_id", "attempt", "type"}
    content_fields = {name: _hash_if_large(value) for name, value in data.items() if name not in not_content}

    def make(attempt: int) -> WriteRequest:
        attempt = attempt if "attempt" not in data else event.attempt or 1
        changes: dict[str, Any] = {"attempt": attempt}
        if event.event_id is None and key is None:
            name = canonical_json({"eval_id": eval_id, "attempt": attempt, "type": event.type, "said": content_fields})
            changes["event_id"] = uuid5(NAMESPACE_URL, f"evalstore:change:{name}")
        return _complete(event.model_copy(update=changes), key)

    return Change(event, make, event.attempt if "attempt" in data else None)


def _hash_if_large(value: Any) -> Any:
    """Replace large text by its hash, to save the memory of its JSON."""
    if isinstance(value, str) and len(value) > _LARGE_CHARACTERS:
        return {"sha256": hashlib.sha256(content.to_bytes(value)).hexdigest()}
    return value


def _path_faults(data: dict[str, Any], eval_id: str) -> list[Fault]:
    if identity({"eval_id": eval_id})[0] is None:
        return [Fault("eval_id", "expected 1 to 200 of A-Z a-z 0-9 . _ ~ : @ + = -, and not '.' or '..', in the path")]
    if data.setdefault("eval_id", eval_id) != eval_id:
        return [Fault("eval_id", "not the id in the path")]
    return []


def lines(body: bytearray, eval_id: str | None, key: str | None, max_content_bytes: int, *, fast: bool) -> list[Line]:
    """Read the events of a batch, one JSON object a line, and check each line separately.

    With `fast`, lines that the fast path decodes come as rows of the log, in a tenth of the time. `eval_id` is the id in the
    path, which lines may omit. Raises InvalidEvent for no lines or too many.
    """
    if eval_id is not None and (faults := _path_faults({}, eval_id)):
        raise InvalidEvent(faults)
    found = [(number, text) for number, text in enumerate(bytes(body).split(b"\n"), 1) if text.strip()]
    body.clear()
    if not 1 <= len(found) <= MAX_LINES:
        raise InvalidEvent([Fault("body", f"expected 1 to {MAX_LINES:,} events, a line each, not {len(found):,}")])
    return [
        (fast and _decode_line(number, text, eval_id, max_content_bytes))
        or _line(number, text, eval_id, key, max_content_bytes)
        for number, text in found
    ]


def _decode_line(number: int, text: bytes, eval_id: str | None, max_content_bytes: int) -> Line | None:
    row = decode_event(text, max_content_bytes=max_content_bytes)
    if row is None or eval_id not in {None, row.eval_id}:
        return None
    return Line(number, WriteRequest(row, has_explicit_time=True), row.eval_id, row.event_id)


def _line(number: int, text: bytes | bytearray, eval_id: str | None, key: str | None, max_content_bytes: int) -> Line:
    data: dict[str, Any] = {}
    try:
        data = _object(text)
        if eval_id is not None and (faults := _path_faults(data, eval_id)):
            return Line(number, None, *identity(data), tuple(faults))
        request = _complete(check(data, max_content_bytes=max_content_bytes), f"{key}:{number}" if key else None)
    except InvalidEvent as error:
        return Line(number, None, *identity(data), error.faults)
    return Line(number, request, request.event.eval_id, request.event.event_id)


def single(body: bytearray, eval_id: str | None, key: str | None, max_content_bytes: int) -> Line:
    """Read the event of a JSON body. Faults name it line 1."""
    return _line(1, body, eval_id, key, max_content_bytes)
