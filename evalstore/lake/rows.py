"""Events and records as rows of the lake, and back, without a difference."""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import msgspec

from evalstore.lake.schema import EVALUATIONS, EVENTS, LakeTable, arrow_schema
from evalstore.storage.event_reader import StoredEvent
from evalstore.storage.sink_cursors import ReplayKey
from models import content
from models.record import rfc3339

if TYPE_CHECKING:
    import pyarrow as pa

_CONTENTS: Final = ("code", "output", "error")
_TYPES: Final[dict[str, type]] = {"string": str, "int": int, "long": int, "double": float, "boolean": bool, "binary": bytes}
_INT64: Final = range(-(2**63), 2**63)
_SPECIAL: Final = {"eval_id", "event_id", "type", "occurred_at", "recorded_at", "metadata", "extra"}
_PLAIN: Final = {
    column.name: _TYPES[column.type]
    for column in EVENTS.columns
    if column.name not in _SPECIAL and column.name.partition("_")[0] not in _CONTENTS
}
_REFERENCES: Final = {f"{kind}_ref" for kind in _CONTENTS}
_TEXTS: Final = {f"{kind}_b64" for kind in _CONTENTS}


def event_row(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of an event. A value that does not fit its column goes to `extra`; `version` is left out."""
    row: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, value in fields.items():
        kind = _PLAIN.get(name)
        if kind is not None:
            if type(value) is kind and (kind is not int or value in _INT64):
                row[name] = value
            else:
                extra[name] = value
        elif name in {"eval_id", "event_id", "type"}:
            row[name] = value
        elif name in {"occurred_at", "recorded_at"}:
            row[name] = datetime.fromisoformat(value)
        elif name == "metadata" and isinstance(value, dict):
            row[name] = _json(value)
        elif not _put_content(row, name, value) and name != "version":
            extra[name] = value
    if extra:
        row["extra"] = _json(extra)
    return row


def _put_content(row: dict[str, Any], name: str, value: Any) -> bool:
    """Put content or a reference into its columns, if `_content` gives the same field back."""
    kind, _, form = name.rpartition("_") if name in _REFERENCES or name in _TEXTS else (name, "", "")
    if kind not in _CONTENTS or kind in row or f"{kind}_sha256" in row:
        return False
    if form == "ref":
        try:
            found = content.reference(value)
        except ValueError:
            return False
        row[f"{kind}_sha256"], row[f"{kind}_size"], row[f"{kind}_encoding"] = found
        return True
    if not isinstance(value, str):
        return False
    if not form:
        row[kind] = content.to_bytes(value)
        return True
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return False
    if isinstance(content.from_bytes(data), str) or base64.b64encode(data).decode() != value:
        return False
    row[kind] = data
    return True


def event_of(row: Mapping[str, Any]) -> StoredEvent:
    """Return the event of a row, as PostgreSQL gives it."""
    fields = {name: row[name] for name in _PLAIN if row[name] is not None}
    fields |= {name: row[name] for name in ("eval_id", "event_id", "type")}
    fields |= {name: rfc3339(row[name]) for name in ("occurred_at", "recorded_at")}
    if row["metadata"] is not None:
        fields["metadata"] = msgspec.json.decode(row["metadata"])
    for kind in _CONTENTS:
        fields |= _content(kind, row)
    if row["extra"] is not None:
        fields |= _from_json(row["extra"])
    return StoredEvent(ReplayKey(row["recorded_at"], row["eval_id"], row["occurred_at"], row["event_id"]), fields)


def _content(kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
    if (data := row[kind]) is not None:
        value = content.from_bytes(data)
        return {kind: value} if isinstance(value, str) else {f"{kind}_b64": base64.b64encode(value).decode()}
    if row[f"{kind}_sha256"] is None:
        return {}
    return {f"{kind}_ref": {name: row[f"{kind}_{name}"] for name in ("sha256", "size", "encoding")}}


_NAMES: Final = {column.name for column in EVALUATIONS.columns}


def record_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a record: columns of `evaluations` with Python values. Other keys go to `extra`."""
    row = {name: str(value) if isinstance(value, UUID) else value for name, value in record.items() if name in _NAMES}
    if row.get("metadata") is not None:
        row["metadata"] = _json(row["metadata"])
    if extra := {name: value for name, value in record.items() if name not in _NAMES}:
        row["extra"] = _json(extra)
    return row


def record_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a row: all columns but `extra`, whose keys stand beside them."""
    record = {name: value for name, value in row.items() if name != "extra"}
    record |= {name: UUID(row[name]) for name in ("code_event_id", "result_event_id") if row[name] is not None}
    if row["metadata"] is not None:
        record["metadata"] = msgspec.json.decode(row["metadata"])
    return record | (_from_json(row["extra"]) if row["extra"] is not None else {})


def to_table(table: LakeTable, rows: Iterable[Mapping[str, Any]]) -> "pa.Table":
    """Return rows as an Arrow table in the order of the lake's table."""
    import pyarrow as pa  # noqa: PLC0415 - only processes with a lake load this

    return ordered(table, pa.Table.from_pylist(list(rows), schema=arrow_schema(table)))


def ordered(table: LakeTable, rows: "pa.Table") -> "pa.Table":
    """Return the rows in the order of the lake's table."""
    return rows.sort_by([(name, "ascending") for name in table.order])


def event_rows(events: Sequence[Any]) -> "pa.Table":
    """Return events as an Arrow table. Of an event that is there twice, one stays."""
    unique = {(event.fields["eval_id"], event.fields["event_id"]): event for event in events}
    return to_table(EVENTS, [event_row(event.fields) for event in unique.values()])


def _json(value: Any) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except UnicodeEncodeError:  # lone surrogates
        return json.dumps(value, separators=(",", ":"))


def _from_json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return json.loads(text)
