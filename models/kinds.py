"""The kinds of values that fields of events hold: how each is checked, sent, stored and documented."""

import base64
import binascii
import re
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any, Final
from uuid import UUID

from msgspec import Meta
from pydantic import AfterValidator, Field, InstanceOf, PlainSerializer, PlainValidator, StringConstraints

from models import content
from models.plain import INT64, MAX_METADATA_BYTES, plain_metadata

_EVAL_ID = re.compile(r"[A-Za-z0-9._~:@+=-]{1,200}")
UUID_FORM = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)
# The form of nearly all times: UTC with at most microseconds. A time of this form that does not begin with 1 is after 1970.
PLAIN_TIME = re.compile(r"[1-9]\d{3}-\d\d-\d\dT(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|\+00:00)", re.ASCII)
_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ]((?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d)(\.\d+)?([Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)", re.ASCII
)


def eval_id(value: Any) -> str:
    if not isinstance(value, str) or not _EVAL_ID.fullmatch(value) or value in {".", ".."}:
        raise ValueError("expected 1 to 200 of A-Z a-z 0-9 . _ ~ : @ + = -, and not '.' or '..'")
    return value


def event_id(value: Any) -> UUID | None:
    if value is None or isinstance(value, UUID):
        return value
    if not isinstance(value, str) or not UUID_FORM.fullmatch(value):
        raise ValueError("expected a UUID like 0190a2f5-7a4c-7000-8000-000000000000")
    return UUID(value)


def _occurred_at(value: Any) -> datetime | None:
    """Return a time in UTC, truncated to microseconds.

    Raises ValueError for text that is not RFC 3339 with an offset, and for a naive `datetime`.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if PLAIN_TIME.fullmatch(value) and not value.startswith("1"):
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
    """Convert `at` to UTC and to a plain `datetime` without `fold`.

    The conversion also serves pandas: its Timestamp writes nanoseconds, and its NaT is no time.
    """
    try:
        moment = at.astimezone(UTC)
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)
    return datetime.combine(moment.date(), moment.time().replace(fold=0), UTC)


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


@dataclass(frozen=True, eq=False)
class Kind:
    """How the values of one kind look outside of the event models.

    `words` is for reference pages, `sql` is a PostgreSQL type, `schema` is JSON Schema. `wire` is a type for msgspec. Except
    for NUL in text, msgspec accepts no value that the event models refuse.
    """

    words: str
    sql: str
    wire: Any
    schema: dict[str, Any]


EVAL_ID_PATTERN: Final = r"\A(?!\.{1,2}\Z)[A-Za-z0-9._~:@+=-]{1,200}\Z"
_NAME: Final = Kind(
    "1 to 200 of `A-Z a-z 0-9 . _ ~ : @ + = -`, not `.` or `..`",
    "text",
    Annotated[str, Meta(pattern=EVAL_ID_PATTERN)],
    {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[A-Za-z0-9._~:@+=-]{1,200}$"},
)
_INT64_SCHEMA: Final = {"type": "integer", "minimum": INT64.start, "maximum": INT64.stop - 1}
# msgspec refuses NaN where a number has limits.
_FINITE: Final = Meta(ge=-sys.float_info.max, le=sys.float_info.max)

EvalId = Annotated[str, PlainValidator(eval_id), _NAME]
RunId = Annotated[str, PlainValidator(eval_id), replace(_NAME, words="as `eval_id`")]
EventId = Annotated[UUID | None, PlainValidator(event_id), Kind("UUID", "uuid", str, {"type": "string", "format": "uuid"})]
Time = Annotated[
    datetime | None,
    PlainValidator(_occurred_at),
    Kind("RFC 3339 with an offset, years 1970 to 9999 in UTC", "timestamptz", str, {"type": "string", "format": "date-time"}),
]
Attempt = Annotated[
    int,
    Field(ge=1, le=1_000_000),
    Kind(
        "integer, 1 to 1,000,000, default 1",
        "int4",
        Annotated[int, Meta(ge=1, le=1_000_000)],
        {"type": "integer", "minimum": 1, "maximum": 1_000_000},
    ),
]
Metadata = Annotated[
    dict[str, Any] | None,
    PlainValidator(_metadata),
    Kind(f"object, up to {MAX_METADATA_BYTES // 1024} KiB", "jsonb", dict[str, Any], {"type": "object"}),
]
# Native constraints where pydantic has them: Python validators cost more.
Text = Annotated[
    str,
    StringConstraints(max_length=1000, pattern=r"^[^\x00]*$"),
    Kind("text", "text", Annotated[str, Meta(max_length=1000)], {"type": "string", "maxLength": 1000}),
]
Number = Annotated[float, Field(allow_inf_nan=False), Kind("number", "float8", Annotated[float, _FINITE], {"type": "number"})]
Int64 = Annotated[
    int,
    Field(ge=INT64.start, le=INT64.stop - 1),
    Kind("64-bit integer", "int8", Annotated[int, Meta(ge=INT64.start, le=INT64.stop - 1)], _INT64_SCHEMA),
]
Content = Annotated[InstanceOf[str], Kind("content", "bytea", str, {"type": "string"})]
# The other two forms of content are not kinds: no column holds them.
Base64 = Annotated[str, AfterValidator(_b64)]
Ref = Annotated[
    content.Reference | None,
    PlainValidator(_reference),
    PlainSerializer(lambda found: found and found._asdict(), return_type=dict | None),
]
