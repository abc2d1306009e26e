"""The events: one fact about an evaluation each, as senders give them and as they travel.

`parse` and `check` are the only ways in. Unknown fields are kept (`model_extra`) so that a newer gateway does not break an
older worker; `check`, the sender's way, refuses them, so that a typo shows at once.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, Final, Literal, get_args
from uuid import NAMESPACE_URL, UUID, uuid5

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from models import content
from models.errors import Fault, InvalidEvent, printable
from models.plain import INT64, SURROGATE, plain_metadata, plain_scalar
from models.validation_errors import did_you_mean, format_error

MAX_EXTRA_DEPTH = 500  # of an unknown field; Python's JSON gives up on some depth below 1,000
_EVAL_ID = re.compile(r"[A-Za-z0-9._~:@+=-]{1,200}")
UUID_FORM = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)
# As nearly every time is written: nothing to truncate or to convert, and no year before 1970 where it does not begin with 1.
USUAL_TIME = re.compile(r"[1-9]\d{3}-\d\d-\d\dT(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|\+00:00)", re.ASCII)
_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ]((?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d)(\.\d+)?([Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)", re.ASCII
)


def _eval_id(value: Any) -> str:
    if not isinstance(value, str) or not _EVAL_ID.fullmatch(value) or value in {".", ".."}:
        raise ValueError("expected 1 to 200 of A-Z a-z 0-9 . _ ~ : @ + = -, and not '.' or '..'")
    return value


def _event_id(value: Any) -> UUID | None:
    if value is None or isinstance(value, UUID):
        return value
    if not isinstance(value, str) or not UUID_FORM.fullmatch(value):
        raise ValueError("expected a UUID like 0190a2f5-7a4c-7000-8000-000000000000")
    return UUID(value)


def _occurred_at(value: Any) -> datetime | None:
    """RFC 3339 with an offset, truncated to microseconds, as UTC; a `datetime` must be aware."""
    if value is None:
        return None
    if isinstance(value, str):
        if USUAL_TIME.fullmatch(value) and not value.startswith("1"):
            try:
                return datetime.fromisoformat(value)
            except ValueError as error:
                raise ValueError(f"expected a date that exists: {error}") from None
        match = _RFC3339.fullmatch(value)
        if match is None:
            raise ValueError("expected RFC 3339 with an offset, like 2026-01-31T09:30:00.25Z (no leap seconds)")
        day, time, fraction, offset = match.groups()
        try:
            value = datetime.fromisoformat(f"{day}T{time}{(fraction or '')[:7]}{offset.upper()}")
        except ValueError as error:
            raise ValueError(f"expected a date that exists: {error}") from None
    if not isinstance(value, datetime) or value.utcoffset() is None:
        raise ValueError("expected RFC 3339 with an offset, like 2026-01-31T09:30:00.25Z")
    moment = _in_utc(value)
    if moment.year < 1970:
        raise ValueError("expected a year from 1970 to 9999 in UTC")
    return moment


def _in_utc(at: datetime) -> datetime:
    """Convert `at` to UTC and to `datetime` itself: pandas' Timestamp writes nanoseconds, and its NaT is no time."""
    try:
        moment = at.astimezone(UTC)
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)
    return moment if type(moment) is datetime else datetime.combine(moment.date(), moment.time(), UTC)


def _metadata(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")  # noqa: TRY004 - pydantic turns only ValueError into a fault
    return plain_metadata(value)


def _b64(value: str) -> str:
    try:
        base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("expected base64 (RFC 4648, with padding)") from None
    return value


def _reference(value: Any) -> content.Reference | None:
    return None if value is None else content.reference(value)


# In the order of DESIGN: native constraints where pydantic has them, so that the store's hot path stays out of Python.
EvalId = Annotated[str, PlainValidator(_eval_id)]
RunId = EvalId
Text = Annotated[str, StringConstraints(max_length=1000, pattern=r"^[^\x00]*$")]
Content = InstanceOf[str]
Base64 = Annotated[str, AfterValidator(_b64)]
Ref = Annotated[
    content.Reference | None,
    PlainValidator(_reference),
    PlainSerializer(lambda found: found and found._asdict(), return_type=dict | None),
]
Number = Annotated[float, Field(allow_inf_nan=False)]
Int64 = Annotated[int, Field(ge=INT64.start, le=INT64.stop - 1)]


class _Event(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True, defer_build=True)

    eval_id: EvalId
    event_id: Annotated[UUID | None, PlainValidator(_event_id)] = None
    occurred_at: Annotated[datetime | None, PlainValidator(_occurred_at)] = None
    attempt: Annotated[int | None, Field(ge=1, le=1_000_000)] = 1
    metadata: Annotated[dict[str, Any] | None, PlainValidator(_metadata)] = None


class EvaluationQueued(_Event):
    """The evaluation was accepted: this is the code to run."""

    type: Literal["evaluation:queued"] = "evaluation:queued"
    code: Content | None = None
    code_b64: Base64 | None = None
    code_ref: Ref = None
    run_id: RunId | None = None
    language: Text | None = None
    submitter: Text | None = None


class EvaluationStarted(_Event):
    """An executor took it up, or says that it still runs."""

    type: Annotated[Literal["evaluation:started", "evaluation:running"], AfterValidator(lambda _: "evaluation:started")] = (
        "evaluation:started"
    )
    executor_id: Text | None = None
    container_id: Text | None = None
    timeout_s: Number | None = None


class _Result(_Event):
    executor_id: Text | None = None
    container_id: Text | None = None
    exit_code: Int64 | None = None
    output: Content | None = None
    output_b64: Base64 | None = None
    output_ref: Ref = None
    error: Content | None = None
    error_b64: Base64 | None = None
    error_ref: Ref = None
    duration_ms: Number | None = None
    memory_bytes: Int64 | None = None


class EvaluationCompleted(_Result):
    """The code ran to its end, whatever its exit code."""

    type: Literal["evaluation:completed"] = "evaluation:completed"
    exit_code: Int64
    score: Number | None = None


class EvaluationFailed(_Result):
    """The code could not be run, or not to its end."""

    type: Literal["evaluation:failed"] = "evaluation:failed"


class EvaluationTimedOut(_Result):
    """The code was stopped at its time limit."""

    type: Literal["evaluation:timed_out"] = "evaluation:timed_out"


class EvaluationCancelled(_Event):
    """Somebody called it off."""

    type: Literal["evaluation:cancelled"] = "evaluation:cancelled"
    reason: Text | None = None


class EvaluationLost(_Event):
    """No result came in time. Written by the system alone."""

    type: Literal["evaluation:lost"] = "evaluation:lost"


Event = (
    EvaluationQueued
    | EvaluationStarted
    | EvaluationCompleted
    | EvaluationFailed
    | EvaluationTimedOut
    | EvaluationCancelled
    | EvaluationLost
)
ENDINGS: Final = frozenset({"evaluation:completed", "evaluation:failed", "evaluation:timed_out", "evaluation:cancelled"})
_MODELS: Final[dict[str, type[_Event]]] = {
    name: model for model in get_args(Event) for name in get_args(model.model_fields["type"].annotation)
}
_FIELDS: Final = {model: frozenset(model.model_fields) for model in _MODELS.values()}
CONTENT_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    name: tuple(field for field in ("code", "output", "error") if field in model.model_fields)
    for name, model in _MODELS.items()
}
_REQUIRED_CONTENT = {"evaluation:queued": "code", "evaluation:failed": "error"}


# Built at the first event, not while a gateway starts.
@cache
def _adapter() -> TypeAdapter[Event]:
    return TypeAdapter(Annotated[Event, Field(discriminator="type")])


def decode(text: bytes | bytearray, name: str = "event") -> Any:
    """The value of a JSON text; lone surrogates are let through, NaN and Infinity are not. Raises InvalidEvent of that name."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return json.loads(text.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidEvent([Fault(name, f"expected JSON: {error}")]) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is beyond what a double holds")
    return number


def parse(data: object, *, max_content_bytes: int = content.MAX_CONTENT_BYTES) -> Event:
    """The event that a decoded JSON value is, as a worker takes it: fields it does not know are kept in `model_extra`.

    Raises InvalidEvent, which names every wrong field; the same value would fail again.
    """
    try:
        event = _adapter().validate_python(data)
    except ValidationError as error:
        # pydantic takes no names with lone surrogates, and unknown fields may have any.
        given: dict[Any, Any] = data if isinstance(data, dict) else {}
        odd = {name: value for name, value in given.items() if isinstance(name, str) and SURROGATE.search(name)}
        if not odd:
            raise InvalidEvent(_faults(data, error, max_content_bytes)) from None
        event = parse({name: value for name, value in given.items() if name not in odd}, max_content_bytes=max_content_bytes)
        event = event.model_copy(update=odd)
    faults = _content_faults(event.type, event.__dict__, max_content_bytes)
    if event.model_extra:
        faults += [Fault(name, fault) for name, value in event.model_extra.items() if (fault := _extra_fault(value))]
    if faults:
        raise InvalidEvent(faults)
    return event


def _extra_fault(value: Any) -> str | None:
    """What keeps the value of an unknown field from being kept as it came, or None."""
    level = [value]
    for _ in range(MAX_EXTRA_DEPTH + 1):
        if any(isinstance(item, float) and not math.isfinite(item) for item in level):
            return "expected finite numbers"
        outer = [item for item in level if isinstance(item, dict | list)]
        level = [inner for item in outer for inner in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return None
    return f"nested deeper than {MAX_EXTRA_DEPTH} levels"


def identified(event: Mapping[str, Any], message_id: str, message_timestamp_ms: int) -> dict[str, Any]:
    """`event` with an `event_id` and an `occurred_at`: its own, or else its message's, the same at every delivery.

    A message_id that is no UUID gives one derived from it. Raises InvalidEvent for what is no object, an id that is no text, or
    a timestamp that is no time.
    """
    if not isinstance(event, Mapping):
        raise InvalidEvent([Fault("event", f"expected a JSON object, not {type(event).__name__}")])
    if event.get("event_id") is not None and event.get("occurred_at") is not None:
        return dict(event) if not isinstance(event, dict) else event
    filled = dict(event)
    if filled.get("event_id") is None:
        if not isinstance(message_id, str):
            raise InvalidEvent([Fault("event_id", f"missing, and the message's id {message_id!r} is no text")])
        name = f"evalstore:message:{printable(message_id)}"
        filled["event_id"] = UUID(message_id) if UUID_FORM.fullmatch(message_id) else uuid5(NAMESPACE_URL, name)
    if filled.get("occurred_at") is None:
        try:
            seconds, ms = divmod(message_timestamp_ms, 1000)
            filled["occurred_at"] = datetime.fromtimestamp(seconds, UTC).replace(microsecond=int(ms) * 1000)
        except (OverflowError, ValueError, OSError, TypeError):
            fault = f"missing, and the message's timestamp {message_timestamp_ms!r} is no time in milliseconds"
            raise InvalidEvent([Fault("occurred_at", fault)]) from None
    return filled


def identity(event: Mapping[str, Any]) -> tuple[str | None, UUID | None]:
    """The `eval_id` and `event_id` of an event that may be wrong in any way, each None where it is no such thing."""
    found: list[Any] = []
    for validate, name in ((_eval_id, "eval_id"), (_event_id, "event_id")):
        try:
            found.append(validate(event.get(name)))
        except ValueError:
            found.append(None)
    return found[0], found[1]


def check(data: object, *, max_content_bytes: int = content.MAX_CONTENT_BYTES) -> Event:
    """The event that a sender gives, as a JSON object or as one of the models: no unknown fields, no system events.

    Its fields have JSON's own types, or those of the models. Raises InvalidEvent, which names every wrong field.
    """
    faults: list[Fault] = []
    if isinstance(data, _Event):
        data = dict(data)
    if isinstance(data, Mapping):
        faults += [
            Fault("event", f"expected text as names, not {type(name).__name__}") for name in data if not isinstance(name, str)
        ]
        data = {name: plain_scalar(value) for name, value in data.items() if value is not None and isinstance(name, str)}
        model = _MODELS.get(data["type"]) if isinstance(data.get("type"), str) else None
        known = _FIELDS[model] if model else data.keys()
        if not data.keys() <= known:
            faults += [_unknown(name, data["type"], known) for name in data if name not in known]
        if model is EvaluationLost:
            faults.append(Fault("type", "evaluation:lost is written by the system alone"))
    try:
        event = parse(data, max_content_bytes=max_content_bytes)
    except InvalidEvent as error:
        raise InvalidEvent([*error.faults, *faults]) from None
    if faults:
        raise InvalidEvent(faults)
    return event


def known_values(type_: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `values` that are fields of events of that type, as their models hold them. Leave out invalid ones."""
    model, found = _MODELS[type_], {}
    for name in values.keys() & _FIELDS[model]:
        with suppress(ValidationError):
            found[name] = _field_adapter(model, name).validate_python(values[name])
    return found


@cache
def _field_adapter(model: type[_Event], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(model.model_fields[name].rebuild_annotation(), config=ConfigDict(strict=True))


def _unknown(name: str, type_: str, known: Collection[str]) -> Fault:
    if having := [other for other, model in _MODELS.items() if name in _FIELDS[model] and other != "evaluation:running"]:
        return Fault(name, f"not a field of {type_}, but of {', '.join(having)}")
    return Fault(name, f"not a field of {type_}{did_you_mean(name, known)}")


def _content_faults(type_: str, values: Mapping[str, Any], max_content_bytes: int) -> list[Fault]:
    """What is wrong with an event's content beyond the type of each field."""
    faults = []
    for name in CONTENT_FIELDS[type_]:
        text, b64, ref = values.get(name), values.get(f"{name}_b64"), values.get(f"{name}_ref")
        if text is None and b64 is None and ref is None:
            if _REQUIRED_CONTENT.get(type_) == name:
                faults.append(Fault(name, f"required, as {name}, {name}_b64 or {name}_ref"))
            continue
        forms = [form for form, value in ((name, text), (f"{name}_b64", b64), (f"{name}_ref", ref)) if value is not None]
        if len(forms) > 1:
            faults.append(Fault(name, f"given more than once, as {' and '.join(forms)}"))
        # A character takes at most 4 bytes, four characters of base64 make 3: only what comes near is measured.
        if isinstance(text, str) and len(text) * 4 > max_content_bytes:
            size = len(content.to_bytes(text))
        elif isinstance(b64, str):
            size = len(b64) * 3 // 4 - b64[-2:].count("=")
        elif isinstance(ref, content.Reference):
            size = ref.size
        else:
            continue
        if size > max_content_bytes:
            faults.append(Fault(name, f"{size:,} bytes, expected at most {max_content_bytes:,}"))
    return faults


def _faults(data: object, error: ValidationError, max_content_bytes: int) -> list[Fault]:
    """Every wrong field of `data`, in the words of DESIGN rather than pydantic's."""
    if not isinstance(data, dict):
        return [Fault("event", f"expected a JSON object, not {type(data).__name__}")]
    faults = []
    type_ = data.get("type")
    if not isinstance(type_, str) or type_ not in _MODELS:
        names = [name for name in _MODELS if name != "evaluation:lost"]
        faults.append(Fault("type", f"expected one of {', '.join(names)}{did_you_mean(type_, names)}"))
        try:
            _Event.model_validate(data)
        except ValidationError as common:
            error = common
        else:
            return faults
    else:
        faults += _content_faults(type_, data, max_content_bytes)
    for fault in error.errors(include_url=False):
        path = ".".join(str(part) for part in fault["loc"] if part not in _MODELS) or "event"
        faults.append(Fault(path, format_error(fault)))
    return faults
