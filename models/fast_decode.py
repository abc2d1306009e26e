"""The fast path for events: decode a message in one pass, or leave it to the slow path.

Nearly all messages hold a valid event as our own senders write it. For these, `decode_message` returns what
`models.events.parse` and `models.record.to_row` return, at a fraction of the cost. For all others it returns None, and the
slow path decides. The two must never differ: tests/unit/test_wire.py compares them.
"""

import math
import re
from datetime import datetime
from functools import reduce
from operator import attrgetter, or_
from typing import Annotated, Any, Final, Literal, cast
from uuid import UUID

import msgspec
from msgspec import Meta

from models.fields import CONTENTS, FIELDS, SCALARS, SENT, Field
from models.kinds import EVAL_ID_PATTERN, PLAIN_TIME
from models.plain import MAX_METADATA_BYTES, plain_metadata
from models.record import EventRow


class _Event(msgspec.Struct, tag_field="type", forbid_unknown_fields=True):
    """The fields of all events. A subclass for each type has the fields that the table gives this type; others are None."""

    eval_id: Annotated[str, Meta(pattern=EVAL_ID_PATTERN)]
    event_id: str
    occurred_at: str
    attempt: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    metadata: dict[str, Any] | None = None


for _name in (*SCALARS, *CONTENTS):
    setattr(_Event, _name, None)


def _struct(type_: str) -> type[_Event]:
    """Return the struct for a type of event. Its content is inline text: references and base64 take the slow path."""

    def declared(field: Field) -> tuple[str, Any] | tuple[str, Any, None]:
        wire = field.kind.wire
        return (field.name, wire) if type_ in field.required else (field.name, wire | None, None)

    own = [declared(field) for field in FIELDS if type_ in field.events and field.name not in _Event.__struct_fields__]
    return cast("type[_Event]", msgspec.defstruct(type_, own, bases=(_Event,), tag=f"evaluation:{type_}", kw_only=True))


_STRUCTS: Final[dict[Any, type[_Event]]] = {f"evaluation:{type_}": _struct(type_) for type_ in SENT}
_Queued: Final = _STRUCTS["evaluation:queued"]
_AnyEvent: Any = reduce(or_, _STRUCTS.values())


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    """The options that our senders set. The reader of a trace checks the trace: an event is valid without it."""

    redis_message_id: Any = None
    traceparent: Any = None
    tracestate: Any = None


class _Message(msgspec.Struct):
    actor_name: Literal["store_evaluation"]
    args: tuple[_AnyEvent]
    queue_name: str
    message_id: str
    message_timestamp: int
    kwargs: Annotated[dict[str, Any], Meta(max_length=0)]
    options: _Options


_TYPES = {struct: type_ for type_, struct in _STRUCTS.items()}
_DECODER = msgspec.json.Decoder(_Message)
_EVENT_DECODER: msgspec.json.Decoder[_Event] = msgspec.json.Decoder(_AnyEvent)


def decode_message(
    body: bytes, *, max_content_bytes: int, traceparents: dict[bytes, Any] | None = None, redis_id: bytes = b""
) -> EventRow | None:
    """Decode the event in a message of `store_evaluation`. Return None to leave the message to the slow path.

    Put the message's `traceparent`, unchecked, into `traceparents` under `redis_id`, if `traceparents` is given.
    """
    try:
        message = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    row = _fact(message.args[0], body, max_content_bytes)
    if traceparents is not None and row is not None and (traceparent := message.options.traceparent) is not None:
        traceparents[redis_id] = traceparent
    return row


def decode_event(body: bytes, *, max_content_bytes: int) -> EventRow | None:
    """Decode an event without a message, as HTTP clients send it. Return None to leave it to `check`.

    `check` accepts every event that this function decodes.
    """
    try:
        event = _EVENT_DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return _fact(event, body, max_content_bytes)


def check_and_encode(data: dict[str, Any], *, max_content_bytes: int) -> tuple[datetime, bytes] | None:
    """Check an event that a sender gives. Return its time and the event as JSON, or None to leave the event to `check`.

    The event has a lower-case id and no nulls: it can be sent as it is, but for the form of its time.
    """
    # Convert to the struct of one type, because msgspec prepares a union again at each call. Decoding the JSON would copy all
    # text.
    kind = _STRUCTS.get(tag) if type(tag := data.get("type")) is str else None
    if kind is None or not _is_plain(data, _PLAIN):
        return None
    metadata = data.get("metadata")
    # Check before encoding: the encoder's errors for other types or deep nesting do not name the field.
    if type(metadata) is dict and not (_is_plain(metadata, _PLAIN_METADATA) and _is_finite(metadata)):
        return None
    try:
        event, body = msgspec.convert(data, kind), msgspec.json.encode(data)
    except (msgspec.ValidationError, ValueError, OverflowError):
        return None
    if len(body) > max_content_bytes or b"\\u0000" in body or not _LOWER_CASE_UUID.fullmatch(event.event_id):
        return None
    if metadata and not _is_sound(metadata, len(body)):
        return None
    occurred_at = _time(event.occurred_at)
    return None if occurred_at is None else (occurred_at, body)


def _is_plain(members: dict[Any, Any], plain: frozenset[type]) -> bool:
    """Return whether JSON holds these values exactly, NaN aside. msgspec converts other types to similar ones."""
    return plain.issuperset(map(type, members.values())) and _TEXT.issuperset(map(type, members))


def _is_finite(members: dict[str, Any]) -> bool:
    return all(math.isfinite(value) for value in members.values() if type(value) is float)


_TEXT: Final[frozenset[type]] = frozenset({str})
_PLAIN: Final[frozenset[type]] = frozenset({str, int, float, dict})
_PLAIN_METADATA: Final[frozenset[type]] = frozenset({str, int, float, bool, type(None)})
_LOWER_CASE_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


def _fact(event: Any, body: bytes, max_content_bytes: int) -> EventRow | None:
    # Content is no longer than its JSON. Only content may hold NUL: leave every NUL to the slow path.
    if len(body) > max_content_bytes or b"\\u0000" in body:
        return None
    event_id, occurred_at = _uuid(event.event_id), _time(event.occurred_at)
    if event_id is None or occurred_at is None or (event.metadata and not _is_sound(event.metadata, len(body))):
        return None
    struct = type(event)
    if struct is _Queued and event.language is None:
        event.language = "python"
    head = (event.eval_id, event_id, _TYPES[struct], event.attempt or 1, occurred_at, event.metadata or None)
    code, output, error = event.code, event.output, event.error
    tail = (
        None if code is None else code.encode(),
        None if output is None else output.encode(),
        None if error is None else error.encode(),
        None,
    )
    return _new(EventRow, head + _scalars(event) + tail)  # `_make` would count the fields again.


_new = tuple.__new__
_scalars = attrgetter(*SCALARS)


def _uuid(text: str) -> UUID | None:
    """Return the UUID. msgspec accepts two forms; the form with hyphens has 36 characters."""
    if len(text) != 36:
        return None
    try:
        return msgspec.convert(text, UUID)
    except msgspec.ValidationError:
        return None


# A value that was decoded from UTF-8 without NUL is valid unless it is an integer beyond 64 bits.
_SOUND = frozenset({str, float, bool, type(None)})


def _is_sound(metadata: dict[str, Any], body_bytes: int) -> bool:
    """Return whether `plain_metadata` would accept this metadata. This check is faster.

    msgspec writes a number at most eight times as long as the sender did, so small bodies need no check of their size.
    """
    if body_bytes <= MAX_METADATA_BYTES // 8 and all(
        type(value) in _SOUND or (type(value) is int and abs(value) < 2**63) for value in metadata.values()
    ):
        return True
    try:
        plain_metadata(metadata)
    except ValueError:
        return False
    return True


def _time(text: str) -> datetime | None:
    if not PLAIN_TIME.fullmatch(text) or text < "2":
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
