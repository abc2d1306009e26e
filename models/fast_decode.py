"""The usual message, read in one pass.

Nearly all that arrives is a valid event as our own senders write it. For those, `read_fact` gives what `models.events.parse`
and `models.record.fact` give, at a fraction of the cost; for whatever else it gives None, and they decide. It must never
differ from them: tests/unit/test_wire.py compares the two.
"""

import math
import re
from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from models.events import USUAL_TIME
from models.plain import MAX_METADATA_BYTES, plain_metadata
from models.record import Fact

_EvalId = Annotated[str, Meta(pattern=r"\A(?!\.{1,2}\Z)[A-Za-z0-9._~:@+=-]{1,200}\Z")]
_Text = Annotated[str, Meta(max_length=1000)] | None
_Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class _Event(msgspec.Struct, tag_field="type", forbid_unknown_fields=True):
    eval_id: _EvalId
    event_id: str
    occurred_at: str
    attempt: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    metadata: dict[str, Any] | None = None


class _Queued(_Event, tag="evaluation:queued", kw_only=True):
    code: str
    run_id: _EvalId | None = None
    language: _Text = None
    submitter: _Text = None


class _Started(_Event, tag="evaluation:started"):
    executor_id: _Text = None
    container_id: _Text = None
    timeout_s: float | None = None


class _Result(_Event, kw_only=True):
    executor_id: _Text = None
    container_id: _Text = None
    exit_code: _Int64 | None = None
    output: str | None = None
    error: str | None = None
    duration_ms: float | None = None
    memory_bytes: _Int64 | None = None


class _Completed(_Result, tag="evaluation:completed", kw_only=True):
    exit_code: _Int64
    score: float | None = None


class _Failed(_Result, tag="evaluation:failed", kw_only=True):
    error: str


class _TimedOut(_Result, tag="evaluation:timed_out"):
    pass


class _Cancelled(_Event, tag="evaluation:cancelled"):
    reason: _Text = None


_Usual = _Queued | _Started | _Completed | _Failed | _TimedOut | _Cancelled


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    """What our senders put there. What is said of a trace is for whoever follows it to check: the event is as good without."""

    redis_message_id: Any = None
    traceparent: Any = None
    tracestate: Any = None


class _Message(msgspec.Struct):
    actor_name: Literal["store_evaluation"]
    args: tuple[_Usual]
    queue_name: str
    message_id: str
    message_timestamp: int
    kwargs: Annotated[dict[str, Any], Meta(max_length=0)]
    options: _Options


_TYPES = {kind: str(kind.__struct_config__.tag) for kind in (_Queued, _Started, _Completed, _Failed, _TimedOut, _Cancelled)}
_DECODER = msgspec.json.Decoder(_Message)
_EVENT_DECODER: msgspec.json.Decoder[_Usual] = msgspec.json.Decoder(_Usual)


def read_fact(
    body: bytes, *, max_content_bytes: int, traceparents: dict[bytes, Any] | None = None, redis_id: bytes = b""
) -> Fact | None:
    """The event in a message of `store_evaluation`, if it is a usual one in all respects.

    Into `traceparents`, if that is given, goes what the message says of its trace, unchecked, under its `redis_id`.
    """
    try:
        message = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    found = _fact(message.args[0], body, max_content_bytes)
    if traceparents is not None and found is not None and (traceparent := message.options.traceparent) is not None:
        traceparents[redis_id] = traceparent
    return found


def read_event(body: bytes, *, max_content_bytes: int) -> Fact | None:
    """The same of an event by itself, as HTTP clients send it: with its id and its time, and nothing that `check` refuses."""
    try:
        event = _EVENT_DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return _fact(event, body, max_content_bytes)


def look_at(data: dict[str, Any], *, max_content_bytes: int) -> tuple[datetime, bytes] | None:
    """The time of an event that a sender gives, and the event as JSON, if it is a usual one that `check` takes.

    It has an id in the usual form and no nulls: it travels as it is, but for the form of its time. None leaves it to `check`.
    """
    # Of one kind, as a union would be looked through anew each time; and no JSON is read, which would copy all text.
    kind = _KINDS.get(tag) if type(tag := data.get("type")) is str else None
    if kind is None or not _is_plain(data, _PLAIN):
        return None
    metadata = data.get("metadata")
    # Before the encoder, which fails on other types, or on deep nesting, without the name of the field.
    if type(metadata) is dict and not (_is_plain(metadata, _PLAIN_METADATA) and _is_finite(metadata)):
        return None
    try:
        event, body = msgspec.convert(data, kind), msgspec.json.encode(data)
    except (msgspec.ValidationError, ValueError, OverflowError):
        return None
    if len(body) > max_content_bytes or b"\\u0000" in body or not _USUAL_ID.fullmatch(event.event_id):
        return None
    # msgspec would write NaN as null.
    if not all(math.isfinite(getattr(event, name) or 0) for name in _NUMBERS[kind]):
        return None
    if metadata and not _is_sound(metadata, len(body)):
        return None
    occurred_at = _time(event.occurred_at)
    return None if occurred_at is None else (occurred_at, body)


def _is_plain(members: dict[Any, Any], plain: frozenset[type]) -> bool:
    """Whether JSON says the same as these, NaN aside; msgspec would write much else as something similar."""
    return plain.issuperset(map(type, members.values())) and _TEXT.issuperset(map(type, members))


def _is_finite(members: dict[str, Any]) -> bool:
    return all(math.isfinite(value) for value in members.values() if type(value) is float)


_KINDS: Final[dict[Any, type[_Usual]]] = {tag: kind for kind, tag in _TYPES.items()}
# The fields of each that take any number; the others take integers alone, or none.
_NUMBERS: Final[dict[Any, tuple[str, ...]]] = {
    kind: tuple(name for name in ("duration_ms", "score", "timeout_s") if name in kind.__struct_fields__)
    for kind in _KINDS.values()
}
_TEXT: Final[frozenset[type]] = frozenset({str})
_PLAIN: Final[frozenset[type]] = frozenset({str, int, float, dict})
_PLAIN_METADATA: Final[frozenset[type]] = frozenset({str, int, float, bool, type(None)})
_USUAL_ID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


def _fact(event: _Usual, body: bytes, max_content_bytes: int) -> Fact | None:
    # Content is at most as long as what it was escaped to; NUL is for content alone.
    if len(body) > max_content_bytes or b"\\u0000" in body:
        return None
    event_id, occurred_at = _uuid(event.event_id), _time(event.occurred_at)
    if event_id is None or occurred_at is None or (event.metadata and not _is_sound(event.metadata, len(body))):
        return None
    head = (event.eval_id, event_id, _TYPES[type(event)], event.attempt or 1, occurred_at, event.metadata or None)
    match event:
        case _Queued():
            language = "python" if event.language is None else event.language
            rest: tuple[Any, ...] = (event.run_id, language, event.submitter, *_NOTHING[:8], event.code.encode(), *_NOTHING[:3])
        case _Started():
            rest = (*_NOTHING[:3], event.executor_id, event.container_id, *_NOTHING[:4], event.timeout_s, *_NOTHING[:5])
        case _Cancelled():
            rest = (*_NOTHING, event.reason, *_NOTHING[:4])
        case _Result():
            output = None if event.output is None else event.output.encode()
            error = None if event.error is None else event.error.encode()
            score = event.score if type(event) is _Completed else None
            rest = (None, None, None, event.executor_id, event.container_id, event.exit_code, event.duration_ms)
            rest += (event.memory_bytes, score, None, None, None, output, error, None)
    return _new(Fact, head + rest)  # `_make` counts the fields once more


_new = tuple.__new__
# Fills the columns of a fact that its type of event has not; tests/unit/test_wire.py would notice one too many or too few.
_NOTHING = (None,) * 10


def _uuid(text: str) -> UUID | None:
    """Of the two forms that msgspec knows, the one of this length has hyphens."""
    if len(text) != 36:
        return None
    try:
        return msgspec.convert(text, UUID)
    except msgspec.ValidationError:
        return None


# What was decoded from UTF-8, and has no NUL, is sound if it has no integer that is too large.
_SOUND = frozenset({str, float, bool, type(None)})


def _is_sound(metadata: dict[str, Any], body_bytes: int) -> bool:
    """Whether `plain_metadata`, which takes longer, accepts it. No number grows to eight times its length when written out."""
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
    if not USUAL_TIME.fullmatch(text) or text < "2":
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
