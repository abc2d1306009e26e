"""Statements that write a few rows each, without COPY. The rows are parameters, or JSON if there are several."""

from collections.abc import Collection, Iterable
from typing import Any, Final, NamedTuple

import msgspec

from models.fields import EVENT_COLUMNS, RECORD_COLUMNS
from models.record import jsonb

Rows = Collection[tuple[Any, ...]]
RECORD_TYPES: Final = {**RECORD_COLUMNS, "merge_state": "bytea", "merge_version": "int4"}
RECORD: Final = tuple(RECORD_TYPES)
CHANGED: Final = [name for name in RECORD if name != "eval_id"]


def columns(names: Iterable[str], form: str = "{}") -> str:
    """Join column names, each formatted with `form`."""
    return ", ".join(form.format(name) for name in names)


INTO_RECORDS: Final = f"INSERT INTO evaluations ({columns(RECORD)})"


def values(types: dict[str, str]) -> str:
    return ", ".join(f"%s::{type_}" for type_ in types.values())


class Statements(NamedTuple):
    """Statements that take rows either as one parameter for each column of a single row, or as JSON.

    Each statement writes one table: a distributed table cannot be written in a WITH clause.
    """

    create: str
    log: str
    update: str


def _statements(*, json: bool) -> Statements:
    def source(types: dict[str, str]) -> str:
        if not json:
            return f"(VALUES ({values(types)})) AS s ({columns(types)})"
        declared = ", ".join(f"{name} {'text' if type_ == 'bytea' else type_}" for name, type_ in types.items())
        return f"json_to_recordset(%s::json) AS s ({declared})"

    def column(name: str, types: dict[str, str]) -> str:
        return f"decode(s.{name}, 'base64')" if json and types[name] == "bytea" else f"s.{name}"

    def select(types: dict[str, str]) -> str:
        return f"SELECT {columns(column(name, types) for name in types)} FROM {source(types)}"

    create = f'{INTO_RECORDS} {select(RECORD_TYPES)} ORDER BY s.eval_id COLLATE "C" ON CONFLICT DO NOTHING RETURNING eval_id'
    log = f"INSERT INTO evaluation_events ({columns(EVENT_COLUMNS)}) {select(EVENT_COLUMNS)}"
    changed = ", ".join(f"{name} = {column(name, RECORD_TYPES)}" for name in CHANGED)
    update = f"""UPDATE evaluations e SET {changed}, updated_at = statement_timestamp()
        FROM {source(RECORD_TYPES)} WHERE e.eval_id = s.eval_id"""
    return Statements(create, log, update)


SINGLE: Final = _statements(json=False)
_MANY: Final = _statements(json=True)


def texts(row: Iterable[Any]) -> list[str | None]:
    return [None if value is None else _TEXT_OF.get(type(value), str)(value) for value in row]


_TEXT_OF: Final[dict[type, Any]] = {
    dict: lambda value: jsonb(value).decode(),
    bytes: lambda value: "\\x" + value.hex(),
}


_JSON: Final = msgspec.json.Encoder()


def parameters(types: dict[str, str], rows: Rows) -> tuple[Statements, list[str | None]]:
    """Return the statements for these rows with their parameters. JSON leaves out the columns that are NULL."""
    if len(rows) == 1:
        return SINGLE, [text for row in rows for text in texts(row)]
    objects = [
        {
            name: msgspec.Raw(jsonb(value)) if type(value) is dict else value
            for name, value in zip(types, row, strict=True)
            if value is not None
        }
        for row in rows
    ]
    return _MANY, [_JSON.encode(objects).decode()]
