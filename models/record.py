"""The record: the current state of an evaluation, computed from the set of its events.

The order of events and repeats make no difference. Every worker computes records with `fold`, so PostgreSQL holds what `merge`
returns.
"""

import base64
import json
import re
from collections import namedtuple
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Self
from uuid import UUID

import msgspec
from pydantic import BaseModel, ConfigDict

from models import content
from models.content import Reference
from models.events import CONTENT_FIELDS, EvaluationQueued, Event, known_values
from models.fields import EVENT_COLUMNS, RECORD_COLUMNS, SCALARS, Scalars

if TYPE_CHECKING:  # For type checkers: the columns of the named tuples below. The scalar columns come from the table of fields.

    class _Row(tuple[Any, ...]):
        __slots__ = ()
        _fields: ClassVar[tuple[str, ...]]

        def __new__(cls, *values: Any, **named: Any) -> Self: ...
        def _replace(self, **changes: Any) -> Self: ...
        def _asdict(self) -> dict[str, Any]: ...

    class _EventColumns(_Row, Scalars):
        eval_id: str
        event_id: UUID
        type: str
        attempt: int
        occurred_at: datetime
        metadata: dict[str, Any] | None
        code: bytes | Reference | None
        output: bytes | Reference | None
        error: bytes | Reference | None
        extra: str | None

    class _RecordColumns(_Row, Scalars):
        eval_id: str
        status: str
        attempt: int
        version: int
        metadata: dict[str, Any]
        metadata_truncated: bool
        queued_at: datetime | None
        started_at: datetime | None
        finished_at: datetime | None
        code_event_id: UUID | None
        result_event_id: UUID | None

else:
    _EventColumns = namedtuple("_EventColumns", EVENT_COLUMNS, defaults=(None,) * (len(EVENT_COLUMNS) - 5))
    _RecordColumns = namedtuple("_RecordColumns", RECORD_COLUMNS)


class EventRow(_EventColumns):
    """An event as a row of the event log. Content is None if it was not read."""

    __slots__ = ()

    @property
    def references(self) -> list[Reference]:
        """Return the references to the objects that hold the content."""
        return [content for content in (self.code, self.output, self.error) if isinstance(content, Reference)]


class RecordRow(_RecordColumns):
    """A record as a row of the table `evaluations`. The events named by its last two columns hold its content."""

    __slots__ = ()


class _Head(BaseModel):
    eval_id: str
    status: str
    attempt: int
    version: int


class Record(Scalars, _Head):
    """The record as readers see it. Content is text if its bytes are valid text, else bytes (`*_b64` in JSON).

    `merge` reads no object: it leaves a `Reference` from an event unchanged.
    """

    model_config = ConfigDict(frozen=True, defer_build=True, arbitrary_types_allowed=True)

    metadata: dict[str, Any] = {}
    metadata_truncated: bool = False
    queued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    enrichment: dict[str, Any] | None = None
    code: Any = None
    output: Any = None
    error: Any = None


def to_row(event: Event) -> EventRow:
    """Return `event` as a row of the event log. Raises ValueError without `event_id` or `occurred_at`."""
    if event.event_id is None or event.occurred_at is None:
        raise ValueError("an event is stored under an event_id and an occurred_at")
    fields = event.__dict__
    contents: dict[str, bytes | Reference] = {}
    for name in CONTENT_FIELDS[event.type]:
        if (text := fields[name]) is not None:
            contents[name] = content.to_bytes(text)
        elif (b64 := fields[f"{name}_b64"]) is not None:
            contents[name] = base64.b64decode(b64)
        elif (reference := fields[f"{name}_ref"]) is not None:
            contents[name] = reference
    get = fields.get
    return EventRow(
        event.eval_id,
        event.event_id,
        event.type,
        event.attempt or 1,
        event.occurred_at,
        event.metadata or None,
        **{name: get(name) for name in SCALARS} | {"language": _language(event)},
        **contents,
        extra=_extra(event),
    )


def _language(event: Event) -> str | None:
    if not isinstance(event, EvaluationQueued):
        return None
    return "python" if event.language is None else event.language


def _extra(event: Event) -> str | None:
    """Return the fields that this release does not know, without nulls, as canonical JSON."""
    unknown = {name: value for name, value in (event.model_extra or {}).items() if value is not None}
    return canonical_json(unknown) if unknown else None


def promote(row: EventRow) -> EventRow:
    """Return `row` after moving fields of this release from `extra` to their columns.

    An older worker stores unknown fields in `extra`. Values that the field does not accept stay there.
    """
    if row.extra is None:
        return row
    extra = json.loads(row.extra)
    columns = known_values(row.type, {name: value for name, value in extra.items() if getattr(row, name, ...) is None})
    if not columns:
        return row
    remaining = {name: value for name, value in extra.items() if name not in columns}
    return row._replace(**columns, extra=canonical_json(remaining) if remaining else None)


def demote(row: EventRow, stored_extra: str | None) -> EventRow | None:
    """Return `row` as an older worker stores it: fields in `stored_extra` move from their columns to `extra`.

    Return None if `row` has none of these fields.
    """
    if stored_extra is None:
        return None
    stored = json.loads(stored_extra)
    moved = {name: stored[name] for name, value in known_values(row.type, stored).items() if value == getattr(row, name)}
    if not moved:
        return None
    nothing: dict[str, Any] = dict.fromkeys(moved)
    own = json.loads(row.extra) if row.extra else {}
    return row._replace(**nothing, extra=canonical_json(own | moved))


def record(
    state: RecordRow, code: bytes | Reference | None, output: bytes | Reference | None, error: bytes | Reference | None
) -> Record:
    """Build the record for readers from `state` and its content. Content in an object stays a reference."""
    fields: dict[str, Any] = {name: value for name, value in state._asdict().items() if name in Record.model_fields}
    for name, data in (("code", code), ("output", output), ("error", error)):
        fields[name] = content.from_bytes(data) if isinstance(data, bytes) else data
    return Record(**fields)


_ENCODER = msgspec.json.Encoder(decimal_format="number")
# It begins with a letter, so the search jumps between letters. That is many times faster than a test of every character.
_LARGE_EXPONENT = re.compile(rb"e(?<=[0-9]e)\+?[0-9]")


def jsonb(value: dict[str, Any]) -> bytes:
    """Encode `value` as JSON that PostgreSQL's jsonb returns with equal numbers.

    jsonb stores 1e16 as the integer 10000000000000000. So a float from 2**53 on is written with all digits and ".0".
    """
    if not value:
        return b"{}"
    text = _ENCODER.encode(value)
    return _ENCODER.encode(_written_out(value)) if _LARGE_EXPONENT.search(text) else text


def _written_out(value: Any) -> Any:
    match value:
        case dict():
            return {key: _written_out(item) for key, item in value.items()}
        case list():
            return [_written_out(item) for item in value]
        case float() if abs(value) >= 2**53:
            return Decimal(f"{Decimal(repr(value)):f}".removesuffix(".0") + ".0")
        case _:
            return value


def rfc3339(at: datetime) -> str:
    """Format a UTC time as RFC 3339."""
    return at.isoformat().replace("+00:00", "Z")


def canonical_json(value: dict[str, Any]) -> str:
    """Encode an object as ASCII JSON. Equal objects give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
