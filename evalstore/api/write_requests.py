"""What clients ask to be written, as events: checked whole, with every id and time they left out."""

import hashlib
import re
from collections.abc import Callable, Mapping
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
_BRIEF_CHARACTERS: Final = 65_536
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
    """A line of a batch: the event to store, or what is wrong with it."""

    number: int
    given: WriteRequest | None
    eval_id: str | None
    event_id: UUID | None
    faults: tuple[Fault, ...] = ()


def idempotency_key(headers: Mapping[str, str]) -> str | None:
    """The Idempotency-Key of a request. Raises InvalidEvent."""
    key = headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidEvent([Fault("Idempotency-Key", "expected 1 to 255 printable ASCII characters without spaces")])
    return key


def _object(body: bytes | bytearray) -> dict[str, Any]:
    data = decode(body, "body")
    if isinstance(body, bytearray):
        body.clear()  # large content in it is in memory often enough
    if not isinstance(data, dict):
        raise InvalidEvent([Fault("body", f"expected a JSON object, not {type(data).__name__}")])
    return {name: value for name, value in data.items() if value is not None}


def created(body: bytearray, key: str | None, max_content_bytes: int) -> WriteRequest:
    """The queued event that a POST asks for. Raises InvalidEvent."""
    data = _object(body)
    if data.setdefault("type", "evaluation:queued") != "evaluation:queued":
        raise InvalidEvent([Fault("type", "expected evaluation:queued; what happens later is told with PUT")])
    return _completed(check(data, max_content_bytes=max_content_bytes), key)


def _completed(event: Event, key: str | None) -> WriteRequest:
    changes: dict[str, Any] = {}
    is_repeatable = event.event_id is not None or key is not None
    if event.event_id is None:
        changes["event_id"] = uuid7() if key is None else uuid5(NAMESPACE_URL, f"evalstore:request:{event.eval_id}:{key}")
    if event.occurred_at is None:
        changes["occurred_at"] = datetime.now(UTC)
    return WriteRequest(event.model_copy(update=changes), has_explicit_time=event.occurred_at is not None or not is_repeatable)


class Change(NamedTuple):
    """What a PUT asks for: `make` gives the event for the record's attempt. `attempt`, if the request says which. `event`: as
    far as it is known without."""

    event: Event
    make: Callable[[int], WriteRequest]
    attempt: int | None


def changed(body: bytearray, eval_id: str, key: str | None, max_content_bytes: int) -> Change:
    """The event that a PUT asks for. Raises InvalidEvent.

    Without an event_id of its own it takes one that follows from what it says, so that saying it again changes nothing.
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
    unsaid = {"eval_id", "event_id", "attempt", "type"}
    said = {name: _in_brief(value) for name, value in data.items() if name not in unsaid}

    def make(attempt: int) -> WriteRequest:
        attempt = attempt if "attempt" not in data else event.attempt or 1
        changes: dict[str, Any] = {"attempt": attempt}
        if event.event_id is None and key is None:
            name = canonical_json({"eval_id": eval_id, "attempt": attempt, "type": event.type, "said": said})
            changes["event_id"] = uuid5(NAMESPACE_URL, f"evalstore:change:{name}")
        return _completed(event.model_copy(update=changes), key)

    return Change(event, make, event.attempt if "attempt" in data else None)


def _in_brief(value: Any) -> Any:
    """Large text by its hash: written as JSON once more it would be in memory some more times."""
    if isinstance(value, str) and len(value) > _BRIEF_CHARACTERS:
        return {"sha256": hashlib.sha256(content.to_bytes(value)).hexdigest()}
    return value


def _path_faults(data: dict[str, Any], eval_id: str) -> list[Fault]:
    if identity({"eval_id": eval_id})[0] is None:
        return [Fault("eval_id", "expected 1 to 200 of A-Z a-z 0-9 . _ ~ : @ + = -, and not '.' or '..', in the path")]
    if data.setdefault("eval_id", eval_id) != eval_id:
        return [Fault("eval_id", "not the one of the path")]
    return []


def lines(body: bytearray, eval_id: str | None, key: str | None, max_content_bytes: int, *, fast: bool) -> list[Line]:
    """Read the events of a batch, a JSON object a line, and check each by itself.

    `fast`: return rows of the log where the fast path decodes the line, in a tenth of the time.
    `eval_id`: that of the path, which lines may leave out. Raises InvalidEvent for no lines or too many.
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
        given = _completed(check(data, max_content_bytes=max_content_bytes), f"{key}:{number}" if key else None)
    except InvalidEvent as error:
        return Line(number, None, *identity(data), error.faults)
    return Line(number, given, given.event.eval_id, given.event.event_id)


def single(body: bytearray, eval_id: str | None, key: str | None, max_content_bytes: int) -> Line:
    """The one event of a JSON body."""
    return _line(1, body, eval_id, key, max_content_bytes)
