"""The models of events. Each event states one fact about an evaluation.

Events enter only through `parse` and `check`. `parse` is for workers: it keeps unknown fields (`model_extra`), so that a newer
gateway does not break an older worker. `check` is for senders: it refuses unknown fields, so that a typo shows at once.
"""

import json
import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, Final, Literal, get_args
from uuid import NAMESPACE_URL, UUID, uuid5

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from models import content, fields, kinds
from models.errors import Fault, InvalidEvent, printable
from models.kinds import UUID_FORM, Int64
from models.plain import SURROGATE, plain_scalar
from models.validation_errors import did_you_mean, format_error

MAX_EXTRA_DEPTH = 500  # Of an unknown field. Python's JSON decoder fails at some depth below 1,000.


class _Event(fields.Common, BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True, defer_build=True)


class EvaluationQueued(fields.Code, fields.Queued, _Event):
    """The evaluation was accepted. The event holds the code to run."""

    type: Literal["evaluation:queued"] = "evaluation:queued"


class EvaluationStarted(fields.Started, fields.Ran, _Event):
    """An executor started the evaluation, or reports that it still runs."""

    type: Annotated[Literal["evaluation:started", "evaluation:running"], AfterValidator(lambda _: "evaluation:started")] = (
        "evaluation:started"
    )


class EvaluationCompleted(fields.Graded, fields.Output, fields.Measured, fields.Ran, _Event):
    """The code ran to its end, with any exit code."""

    type: Literal["evaluation:completed"] = "evaluation:completed"
    exit_code: Int64 = Field()  # Other events may omit it.


class EvaluationFailed(fields.Output, fields.Measured, fields.Ran, _Event):
    """The code could not be started, or failed before its end."""

    type: Literal["evaluation:failed"] = "evaluation:failed"


class EvaluationTimedOut(fields.Output, fields.Measured, fields.Ran, _Event):
    """The code was stopped at its time limit."""

    type: Literal["evaluation:timed_out"] = "evaluation:timed_out"


class EvaluationCancelled(fields.Cancelled, _Event):
    """The evaluation was cancelled."""

    type: Literal["evaluation:cancelled"] = "evaluation:cancelled"


class EvaluationLost(_Event):
    """No result came in time. Only the system writes this event."""

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
    name: tuple(field for field in fields.CONTENTS if field in model.model_fields) for name, model in _MODELS.items()
}
_REQUIRED_CONTENT: Final = {
    f"evaluation:{type_}": field.name for field in fields.FIELDS if field.is_content for type_ in field.required
}


# Built at the first event: a gateway should start fast.
@cache
def _adapter() -> TypeAdapter[Event]:
    return TypeAdapter(Annotated[Event, Field(discriminator="type")])


def decode(text: bytes | bytearray, name: str = "event") -> Any:
    """Decode a JSON text. Accept lone surrogates; refuse NaN and Infinity. Raises InvalidEvent."""
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
    """Build the event from a decoded JSON value, for a worker. Unknown fields are kept in `model_extra`.

    Raises InvalidEvent, which names every wrong field. The same value would fail again.
    """
    try:
        event = _adapter().validate_python(data)
    except ValidationError as error:
        # pydantic refuses names with lone surrogates, but unknown fields may have any name.
        fields: dict[Any, Any] = data if isinstance(data, dict) else {}
        odd = {name: value for name, value in fields.items() if isinstance(name, str) and SURROGATE.search(name)}
        if not odd:
            raise InvalidEvent(_faults(data, error, max_content_bytes)) from None
        event = parse({name: value for name, value in fields.items() if name not in odd}, max_content_bytes=max_content_bytes)
        event = event.model_copy(update=odd)
    faults = _content_faults(event.type, event.__dict__, max_content_bytes)
    if event.model_extra:
        faults += [Fault(name, fault) for name, value in event.model_extra.items() if (fault := _extra_fault(value))]
    if faults:
        raise InvalidEvent(faults)
    return event


def _extra_fault(value: Any) -> str | None:
    """Return why an unknown field's value cannot be stored unchanged, or None."""
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
    """Return `event` with an `event_id` and an `occurred_at`. Missing values come from the message, equally at every delivery.

    If message_id is no UUID, the event_id is derived from it. Raises InvalidEvent if the event is no object, an id is no text,
    or a timestamp is no time.
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
    """Return the `eval_id` and `event_id` of an event that may be invalid. An invalid id is None."""
    ids: list[Any] = []
    for validate, name in ((kinds.eval_id, "eval_id"), (kinds.event_id, "event_id")):
        try:
            ids.append(validate(event.get(name)))
        except ValueError:
            ids.append(None)
    return ids[0], ids[1]


def check(data: object, *, max_content_bytes: int = content.MAX_CONTENT_BYTES) -> Event:
    """Build the event from a sender's JSON object or model. Refuse unknown fields and system events.

    Fields have the types of JSON or of the models. Raises InvalidEvent, which names every wrong field.
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
    """Return the valid scalar fields in `values` of this type of event, converted to the model's types.

    Leave out invalid values.
    """
    model, known = _MODELS[type_], {}
    for name in values.keys() & _FIELDS[model] & set(fields.SCALARS):
        with suppress(ValidationError):
            known[name] = _field_adapter(model, name).validate_python(values[name])
    return known


@cache
def _field_adapter(model: type[_Event], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(model.model_fields[name].rebuild_annotation(), config=ConfigDict(strict=True))


def _unknown(name: str, type_: str, known: Collection[str]) -> Fault:
    if having := [other for other, model in _MODELS.items() if name in _FIELDS[model] and other != "evaluation:running"]:
        return Fault(name, f"not a field of {type_}, but of {', '.join(having)}")
    return Fault(name, f"not a field of {type_}{did_you_mean(name, known)}")


def _content_faults(type_: str, values: Mapping[str, Any], max_content_bytes: int) -> list[Fault]:
    """Return the faults of an event's content beyond its types: missing, in several forms, or too large."""
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
        # A character takes at most 4 bytes: encode only text that may exceed the limit. Four characters of base64 hold 3 bytes.
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
    """Return every wrong field of `data`, in evalstore's words instead of pydantic's."""
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
