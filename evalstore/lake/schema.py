"""The tables of the lake and their field ids. A release may add columns at the end, and changes no other.

An older release keeps a field without a column in `extra`, and so does this one.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa
    from pyiceberg.schema import Schema

VERSION: Final = 1
"""The number of the schema. A table with a higher number is refused."""


class Column(NamedTuple):
    """A column. Its field id is its place in the table, from 1."""

    name: str
    type: str
    doc: str
    required: bool = False


class LakeTable(NamedTuple):
    """A table, partitioned by the day of `time` and sorted by `order`. `key` is unique in the table."""

    name: str
    columns: tuple[Column, ...]
    time: str
    key: tuple[str, ...]
    order: tuple[str, ...]
    statistics: tuple[str, ...]

    def id_of(self, name: str) -> int:
        """Return the field id of a column."""
        return next(at for at, column in enumerate(self.columns, 1) if column.name == name)


def _content(kind: str, what: str) -> tuple[Column, ...]:
    return (
        Column(kind, "binary", f"{what}, up to 64 KiB; text is UTF-8"),
        Column(f"{kind}_sha256", "string", "SHA-256 of larger content: the name of its object"),
        Column(f"{kind}_size", "long", "bytes of larger content"),
        Column(f"{kind}_encoding", "string", "encoding of the object: identity or zstd"),
    )


_SCALARS: Final = (
    Column("run_id", "string", "the run"),
    Column("language", "string", "language of the code"),
    Column("submitter", "string", "submitter"),
    Column("executor_id", "string", "executor"),
    Column("container_id", "string", "container"),
    Column("timeout_s", "double", "time limit in seconds"),
    Column("exit_code", "long", "exit code of the program"),
    Column("duration_ms", "double", "duration in milliseconds"),
    Column("memory_bytes", "long", "maximum memory in bytes"),
    Column("score", "double", "score of a grader"),
    Column("reason", "string", "reason of a cancellation"),
)
_CONTENTS: Final = (
    *_content("code", "the code"),
    *_content("output", "standard output"),
    *_content("error", "standard error"),
)

EVENTS: Final = LakeTable(
    "events",
    (
        Column("eval_id", "string", "the evaluation", required=True),
        Column("event_id", "string", "the event, a UUID", required=True),
        Column("type", "string", "type of the event", required=True),
        Column("attempt", "int", "number of the attempt", required=True),
        Column("occurred_at", "timestamptz", "time of the event", required=True),
        Column("recorded_at", "timestamptz", "time of storing; the partition is its day in UTC", required=True),
        Column("metadata", "string", "JSON object"),
        *_SCALARS,
        *_CONTENTS,
        Column("extra", "string", "JSON object of all other fields"),
    ),
    "recorded_at",
    ("eval_id", "event_id"),
    ("eval_id", "occurred_at", "event_id"),
    ("eval_id", "type", "occurred_at", "recorded_at", "run_id", "submitter"),
)
EVALUATIONS: Final = LakeTable(
    "evaluations",
    (
        Column("eval_id", "string", "the evaluation", required=True),
        Column("status", "string", "status", required=True),
        Column("attempt", "int", "the attempt that counts", required=True),
        Column("version", "int", "number of events", required=True),
        *_SCALARS,
        Column("metadata", "string", "JSON object, merged from all events"),
        Column("metadata_truncated", "boolean", "true if the merged metadata was shortened"),
        Column("queued_at", "timestamptz", "time of the queued event"),
        Column("started_at", "timestamptz", "time of the first started event"),
        Column("finished_at", "timestamptz", "time of the result"),
        Column("created_at", "timestamptz", "time of storing the first event; the partition is its day in UTC", required=True),
        Column("updated_at", "timestamptz", "time of storing the last event", required=True),
        Column("code_event_id", "string", "the event that has the code"),
        Column("result_event_id", "string", "the event that has the result"),
        Column("merge_state", "binary", "state of the merge, for evalstore"),
        Column("merge_version", "int", "version of the merge state"),
        Column("repairs", "int", "number of repairs by a replay"),
        *_CONTENTS,
        Column("extra", "string", "JSON object of all other fields"),
    ),
    "created_at",
    ("eval_id",),
    ("eval_id",),
    ("eval_id", "status", "created_at", "finished_at", "run_id", "submitter"),
)
TABLES: Final = (EVENTS, EVALUATIONS)


def iceberg_schema(table: LakeTable) -> "Schema":
    """Return the Iceberg schema with our field ids."""
    from pyiceberg import types  # noqa: PLC0415 - only processes with a lake load this
    from pyiceberg.schema import Schema  # noqa: PLC0415

    kinds = {
        "string": types.StringType(),
        "binary": types.BinaryType(),
        "int": types.IntegerType(),
        "long": types.LongType(),
        "double": types.DoubleType(),
        "boolean": types.BooleanType(),
        "timestamptz": types.TimestamptzType(),
    }
    return Schema(
        *(
            types.NestedField(number, column.name, kinds[column.type], column.required, column.doc)
            for number, column in enumerate(table.columns, 1)
        )
    )


def arrow_schema(table: LakeTable) -> "pa.Schema":
    """Return the schema of data files, with field ids."""
    import pyarrow as pa  # noqa: PLC0415 - as above

    kinds = {
        "string": pa.string(),
        "binary": pa.binary(),
        "int": pa.int32(),
        "long": pa.int64(),
        "double": pa.float64(),
        "boolean": pa.bool_(),
        "timestamptz": pa.timestamp("us", tz="UTC"),
    }
    return pa.schema(
        [
            pa.field(column.name, kinds[column.type], not column.required, {"PARQUET:field_id": str(number)})
            for number, column in enumerate(table.columns, 1)
        ]
    )
