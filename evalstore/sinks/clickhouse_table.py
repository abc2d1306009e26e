"""The table in ClickHouse: its columns, the statements that make it, and whether a table that is there fits."""

import re
from collections.abc import Mapping
from typing import Final

from evalstore.sinks.event_row import COLUMNS, Column

# By the type in PostgreSQL: the type that `create` gives a column, and others that hold the same values.
_TYPES: Final = {
    "text": ("String",),
    "uuid": ("UUID", "String"),
    "timestamptz": ("DateTime64(6, 'UTC')", "DateTime64"),
    "int4": ("UInt32", "Int32", "Int64", "UInt64", "String"),
    "int8": ("Int64", "Int128", "Int256", "String"),
    "float8": ("Float64", "String"),
    "jsonb": ("String", "JSON"),
}
_FEW_VALUES: Final = {"type", "language"}
_WRAPPED: Final = re.compile(r"^(?:Nullable|LowCardinality)\((.*)\)$")


def create_table(table: str) -> str:
    """The statement that makes the table where it is not there.

    Without replication a server keeps deduplication tokens only if the table says for how many inserts.
    """
    columns = ",\n    ".join(_definition(column) for column in COLUMNS)
    return f"""
CREATE TABLE IF NOT EXISTS {table} (
    {columns}
)
ENGINE = ReplacingMergeTree
PARTITION BY toYYYYMM(recorded_at)
ORDER BY (eval_id, event_id)
SETTINGS non_replicated_deduplication_window = 1000
"""


def missing_columns(table: str, found: Mapping[str, str]) -> str:
    """The statement that adds the columns that the table lacks; empty where it has all."""
    lacking = [column for column in COLUMNS if column.name not in found]
    return (
        f"ALTER TABLE {table} {', '.join(f'ADD COLUMN IF NOT EXISTS {_definition(one)}' for one in lacking)}" if lacking else ""
    )


def wrong_types(found: Mapping[str, str]) -> str:
    """Name the columns that cannot hold their field."""
    wrong = [column for column in COLUMNS if not _holds(column, found[column.name])]
    return ", ".join(f"{column.name} is {found[column.name]}, not {_type(column)}" for column in wrong)


def _definition(column: Column) -> str:
    return f"`{column.name}` {_type(column)}"


def _type(column: Column) -> str:
    name = _TYPES[column.sql][0]
    if not column.is_required:
        name = f"Nullable({name})"
    return f"LowCardinality({name})" if column.name in _FEW_VALUES else name


def _holds(column: Column, name: str) -> bool:
    while match := _WRAPPED.match(name):
        name = match[1]
    return name in _TYPES[column.sql] or name.partition("(")[0] in _TYPES[column.sql]
