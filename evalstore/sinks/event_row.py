"""An event as a row of a table in another database: a column for each field (models/fields.py)."""

import base64
import json
from typing import Any, Final, NamedTuple

from evalstore.sinks.protocol import SinkEvent
from models.fields import CONTENTS, FIELDS


class Column(NamedTuple):
    """A column. `sql` is its type in PostgreSQL. A value of type jsonb is any JSON value, or JSON text."""

    name: str
    sql: str
    is_required: bool = False


def _columns() -> list[Column]:
    found = [Column("type", "text", True)]
    for field in FIELDS:
        if field.is_content:
            found += [Column(field.name, "text"), Column(f"{field.name}_b64", "text"), Column(f"{field.name}_ref", "jsonb")]
        else:
            found.append(Column(field.name, field.kind.sql, field.name in _REQUIRED))
    return [*found, Column("recorded_at", "timestamptz", True), Column("version", "int8", True), Column("extra", "jsonb")]


_REQUIRED: Final = {"eval_id", "event_id", "occurred_at", "attempt"}
COLUMNS: Final = _columns()
_ADDED: Final = frozenset({"type", "recorded_at", "version"})
_COMMON: Final = _ADDED | _REQUIRED | {"metadata"}
# By type: the fields that events of the type carry. They alone were validated.
_CARRIED: Final = {
    f"evaluation:{type_}": _ADDED
    | {
        name
        for field in FIELDS
        if type_ in field.events
        for name in ([field.name, f"{field.name}_b64", f"{field.name}_ref"] if field.is_content else [field.name])
    }
    for type_ in ("queued", "started", "completed", "failed", "timed_out", "cancelled")
}


def row(event: SinkEvent) -> dict[str, Any]:
    """Return the values of the columns, as JSON values; mostly the event's fields themselves.

    Fields that the event's type does not have are in `extra`, as JSON text. UTF-8 holds no lone surrogates: content with some
    is in `…_b64`, as the bytes that encode surrogates like other characters.
    """
    fields, carried = event.fields, _CARRIED.get(event.type, _COMMON)
    if fields.keys() <= carried and not any(_has_surrogates(fields.get(name)) for name in CONTENTS):
        return fields
    found = {name: value for name, value in fields.items() if name in carried}
    if len(found) < len(fields):
        found["extra"] = json.dumps({name: value for name, value in fields.items() if name not in carried})
    for name in CONTENTS:
        if _has_surrogates(found.get(name)):
            found[f"{name}_b64"] = base64.b64encode(found.pop(name).encode("utf-8", "surrogatepass")).decode()
    return found


def _has_surrogates(text: str | None) -> bool:
    if text is None or text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
