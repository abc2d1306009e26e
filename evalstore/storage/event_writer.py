"""Write the events and records of a call, inside its transaction.

`CopyWriter` has the lowest cost per row. It uses COPY and temporary tables that statements join. It needs a dozen round trips,
and the commit truncates the tables, which takes several ms on some file systems.

`PipelineWriter` sends single statements without waiting for replies. It needs two round trips, but each row costs several times
as much. docs/decisions/0022-few-events-in-two-round-trips.md
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID
from zlib import crc32

import psycopg

from evalstore.storage import database, sessions, tombstones
from models.errors import EvalstoreError
from models.fields import EVENT_COLUMNS, RECORD_COLUMNS
from models.fold import Folded, fold
from models.merge_state import Undecodable
from models.metrics import RebuildReason
from models.record import EventRow, RecordRow, jsonb, rfc3339

CONTENTS: Final[tuple[Literal["code", "output", "error"], ...]] = ("code", "output", "error")
ENRICHMENT_BYTES: Final = 128 * 1024  # jsonb writes spaces that the limit of an event's enrichment does not count.
_PIPELINE_ROWS: Final = 64
_PIPELINE_BYTES: Final = 256 * 1024

_CONTENT_TYPES: Final = dict(
    zip(
        ["eval_id", "event_id", "kind", "occurred_at", "size", "sha256", "data", "store", "encoding"],
        ["text", "uuid", "text", "timestamptz", "int8", "bytea", "bytea", "text", "text"],
        strict=True,
    )
)
_RECORD_TYPES: Final = {**RECORD_COLUMNS, "merge_state": "bytea", "merge_version": "int4"}
RECORD: Final = tuple(_RECORD_TYPES)
# A pooler may hand over a session with temporary tables of another release. The hash in these names keeps them apart.
_STAGED_RECORDS: Final = f"evalstore_stage_records_{crc32(repr(_RECORD_TYPES).encode()):08x}"
_STAGED_EVENTS: Final = f"evalstore_stage_events_{crc32(repr(EVENT_COLUMNS).encode()):08x}"

# Two events with the same id are the same if these columns and the hashes of their contents are equal.
_COMPARED: Final = [name for name in EventRow._fields if name not in {"eval_id", "event_id", *CONTENTS}]


def columns(names: Iterable[str], form: str = "{}") -> str:
    """Join column names, each formatted with `form`."""
    return ", ".join(form.format(name) for name in names)


# These statements join a temporary table with a table by its primary key. They must use the index at any table size, although
# the planner has no statistics of temporary tables. The last value is the time of the transaction.
_BEGIN: Final = f"""
SELECT set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true),
    set_config('enable_seqscan', 'off', true), {sessions.DURABLE.format("true")}, now()
"""
_LOCK: Final = f"""
SELECT {columns(RECORD)} FROM evaluations WHERE eval_id = ANY(%s::text[]) ORDER BY eval_id FOR NO KEY UPDATE
"""
# This statement must come after the lock: only then it sees what other workers committed before they released their locks.
_LOGGED: Final = """
SELECT e.eval_id, e.event_id FROM unnest(%s::text[], %s::uuid[]) AS wanted (eval_id, event_id)
JOIN evaluation_events e ON e.eval_id = wanted.eval_id AND e.event_id = wanted.event_id
"""
_INTO_RECORDS: Final = f"INSERT INTO evaluations ({columns(RECORD)})"
_HASHES: Final = columns(
    CONTENTS,
    "coalesce(sha256(e.{0}), (SELECT c.sha256 FROM contents c "
    "WHERE c.eval_id = e.eval_id AND c.event_id = e.event_id AND c.kind = '{0}'))",
)
_CHANGED: Final = [name for name in RECORD if name != "eval_id"]

Events = dict[str, list[EventRow]]
Compared = dict[int, list[Any]]


class StoredRecord(NamedTuple):
    """A locked record with its merge state. The merge state belongs to the version `merge_version`."""

    record: RecordRow
    merge_state: bytes | None
    merge_version: int | None

    def add(self, events: Sequence[EventRow]) -> "Folded | RebuildReason":
        """Return the record with `events` added, or the reason why its merge state must first be rebuilt from the log."""
        if self.merge_state is None:
            return "absent"
        if self.merge_version != self.record.version:
            return "stale"
        try:
            return fold(Folded(self.record, self.merge_state), events)
        except Undecodable:
            return "undecodable"


class BeginResult(NamedTuple):
    """The created records, the locked existing records, and the events of existing records that are in the log.

    `erased`: the evaluations whose records are not created, because they were erased before.
    """

    created: dict[str, Folded]
    existing: dict[str, StoredRecord]
    logged: set[tuple[str, UUID]]
    erased: set[str]


class Restart(EvalstoreError):
    """The transaction cannot go on: roll it back, rebuild the records `to_rebuild`, and start again."""

    def __init__(self, message: str, to_rebuild: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.to_rebuild = tuple(to_rebuild)


@contextmanager
def open_writer(
    conn: psycopg.Connection[Any], info: dict[str, Any], rows: Sequence[EventRow]
) -> "Iterator[PipelineWriter | CopyWriter]":
    """Choose the writer for these rows. A PipelineWriter commits at the end of the block.

    `info` is the dictionary that belongs to the connection.
    """
    if not are_few(rows):
        yield CopyWriter(conn, info)
        return
    with database.pipelined(conn):
        yield PipelineWriter(conn, info)


def are_few(rows: Sequence[EventRow]) -> bool:
    """Tell whether the rows are few and small enough for a PipelineWriter."""
    contents = (data for row in rows for data in (row.code, row.output, row.error) if isinstance(data, bytes))
    return len(rows) <= _PIPELINE_ROWS and sum(map(len, contents)) <= _PIPELINE_BYTES


class EventWriter:
    """The common part of both writers. `info` is the dictionary that belongs to the connection."""

    def __init__(self, conn: psycopg.Connection[Any], info: dict[str, Any]) -> None:
        self.conn, self._cursor, self._info = conn, conn.cursor(binary=True), info
        # `after_commit` puts these names back. After a failure the tables may be missing, so they are created again. The same
        # holds in another session of a pooler.
        self._staged: set[str] = info.pop("evalstore_staged", set())
        self._first_reply = conn.cursor(binary=True).execute(_BEGIN)

    def recorded_at(self) -> str:
        """Return the time of the transaction in RFC 3339."""
        ((*_, now),) = self._first_reply.fetchall()
        return rfc3339(now)

    def confirm(self, row: list[Any]) -> None:
        """Insert a row into the outbox."""
        confirm(self.conn, row)

    def enrich(self, enrichments: dict[str, dict[str, Any]]) -> None:
        """Add these objects to the enrichments of records that this transaction wrote."""
        values = [ENRICHMENT_BYTES, [*enrichments], [jsonb(added).decode() for added in enrichments.values()]]
        self.conn.execute(_ENRICH, values)

    def after_commit(self) -> None:
        """Remember for the next call which temporary tables exist."""
        self._info["evalstore_staged"] = self._staged


# A key of a later event replaces that of an earlier one. Where all are too much together, the later event's are kept alone.
_ENRICH: Final = """
UPDATE evaluations e SET enrichment = CASE
    WHEN octet_length((coalesce(e.enrichment, '{}') || s.added)::text) <= %s THEN coalesce(e.enrichment, '{}') || s.added
    ELSE s.added END
FROM unnest(%s::text[], %s::jsonb[]) AS s (eval_id, added) WHERE e.eval_id = s.eval_id
"""


class CopyWriter(EventWriter):
    """Writes with COPY through temporary tables, which live as long as the connection and are empty between transactions.

    In the table of records, the column `number` is 0 for records to create and 1 for records to change. In the table of events,
    `number` is the event's position in the call.
    """

    def begin(self, events: Events) -> BeginResult:
        """Lock the existing records of these evaluations in order, and create missing records from `events`.

        Raises Restart if another transaction created one of them at the same time. Waiting for that record's lock could
        deadlock.
        """
        existing = records(lock(self.conn, list(events)))
        in_log = {eval_id: events[eval_id] for eval_id in existing}
        logged = _logged(self.conn, in_log).fetchall() if in_log else []
        created = {eval_id: fold(None, rows) for eval_id, rows in events.items() if eval_id not in existing}
        if created:
            self._stage_records(0, created.values())
            self._cursor.execute(_CREATE)
            if self._cursor.rowcount != len(created):
                raise Restart("another transaction created an evaluation of these")
        erased = _without_erased(self.conn, tombstones.ask(self.conn, created), created) if created else set[str]()
        return BeginResult(created, existing, set(logged), erased)

    def log(self, rows: Collection[EventRow], contents: Collection[tuple[Any, ...]]) -> None:
        """Insert events, and content that has its own rows."""
        _copy(self._cursor, "evaluation_events", EVENT_COLUMNS, rows)
        if contents:
            _copy(self._cursor, "contents", _CONTENT_TYPES, contents)

    def update(self, records: list[Folded]) -> None:
        """Change locked records."""
        self._stage_records(1, records)
        self._cursor.execute(_UPDATE)

    def compare(self, rows: dict[int, EventRow]) -> Compared:
        """Compare events with those stored under the same ids.

        Return by number: whether all compared columns are equal, the hashes of the stored contents, and the stored `extra`.
        """
        self._stage(_STAGED_EVENTS, EVENT_COLUMNS)
        _copy(
            self._cursor,
            _STAGED_EVENTS,
            {"number": "int4"} | EVENT_COLUMNS,
            ((number, *row) for number, row in rows.items()),
        )
        return {number: same for number, *same in self._cursor.execute(_COMPARE)}

    def _stage_records(self, number: int, records: Iterable[Folded]) -> None:
        self._stage(_STAGED_RECORDS, _RECORD_TYPES)
        _copy(
            self._cursor,
            _STAGED_RECORDS,
            {"number": "int4"} | _RECORD_TYPES,
            ((number, *_row(folded)) for folded in records),
        )

    def _stage(self, name: str, types: dict[str, str]) -> None:
        if name not in self._staged:
            declared = ", ".join(f"{column} {type_}" for column, type_ in types.items())
            declared = declared.replace("eval_id text", 'eval_id text COLLATE "C"')
            statement = f"CREATE TEMPORARY TABLE IF NOT EXISTS {name} (number int4, {declared}) ON COMMIT DELETE ROWS"
            self._cursor.execute(statement.encode())
            self._staged.add(name)


_CREATE: Final = f"""
{_INTO_RECORDS} SELECT {columns(RECORD)} FROM {_STAGED_RECORDS} WHERE number = 0 ORDER BY eval_id ON CONFLICT DO NOTHING
"""
# statement_timestamp(), not now(): this transaction may have begun before another transaction created the record.
_UPDATE: Final = f"""
UPDATE evaluations e SET ({columns(_CHANGED)}, updated_at) = ROW({columns(_CHANGED, "s.{}")}, statement_timestamp())
FROM {_STAGED_RECORDS} s WHERE e.eval_id = s.eval_id AND s.number = 1
"""
_COMPARE: Final = f"""
SELECT s.number, ({columns(_COMPARED, "e.{}")}) IS NOT DISTINCT FROM ({columns(_COMPARED, "s.{}")}), {_HASHES}, e.extra
FROM {_STAGED_EVENTS} s JOIN evaluation_events e ON e.eval_id = s.eval_id AND e.event_id = s.event_id
"""
_CONFIRM: Final = "INSERT INTO confirmations (count, body, traceparents) VALUES (%s, %s, %s)"


def _copy(cursor: psycopg.Cursor[Any], table: str, types: dict[str, str], rows: Iterable[tuple[Any, ...]]) -> None:
    with cursor.copy(f"COPY {table} ({columns(types)}) FROM STDIN (FORMAT BINARY)".encode()) as copy:
        copy.set_types(list(types.values()))
        for row in rows:
            copy.write_row(row)


class PipelineWriter(EventWriter):
    """Writes with single statements in a pipeline.

    The statements never change, so PostgreSQL plans them once. All values are sent as text or NULL.
    """

    def begin(self, events: Events) -> BeginResult:
        """Do as `CopyWriter.begin` does. The other methods also match those of CopyWriter."""
        # Try to create all records: an existing record is left unchanged. Waiting to see which exist would cost a round trip.
        locked = lock(self.conn, list(events))
        new = {eval_id: fold(None, rows) for eval_id, rows in events.items()}
        inserts = [self.conn.execute(_CREATE_ONE, _texts(_row(folded))) for folded in new.values()]
        logged = _logged(self.conn, events)
        tombs = tombstones.ask(self.conn, events)
        existing = records(locked)
        created = {eval_id: new[eval_id] for eval_id, insert in zip(new, inserts, strict=True) if insert.rowcount}
        if len(created) + len(existing) != len(events):
            raise Restart("another transaction created an evaluation of these")
        erased = _without_erased(self.conn, tombs, created)
        return BeginResult(created, existing, set(logged.fetchall()), erased)

    def log(self, rows: Collection[EventRow], contents: Collection[tuple[Any, ...]]) -> None:
        for row in rows:
            self.conn.execute(_LOG_ONE, _texts(row))
        for content in contents:
            self.conn.execute(_CONTENT_ONE, _texts(content))

    def update(self, records: list[Folded]) -> None:
        for folded in records:
            update(self.conn, folded)

    def compare(self, rows: dict[int, EventRow]) -> Compared:
        replies = {
            number: self.conn.cursor(binary=True).execute(
                _COMPARE_ONE, _texts([*(getattr(row, name) for name in _COMPARED), row.eval_id, row.event_id])
            )
            for number, row in rows.items()
        }
        return {number: list(reply.fetchall()[0]) for number, reply in replies.items()}


def _without_erased(conn: psycopg.Connection[Any], tombs: psycopg.Cursor[Any], created: dict[str, Folded]) -> set[str]:
    """Delete the records of erased evaluations from those just created; returns the evaluations.

    Tombstones are looked up after the records are inserted: an eraser writes its tombstone first, and then waits for whoever
    inserts the record. So either the tombstone is seen here, or the eraser sees the record.
    """
    erased = {eval_id for (eval_id,) in tombs.fetchall()} & created.keys()
    if erased:
        conn.execute("DELETE FROM evaluations WHERE eval_id = ANY(%s::text[])", [list(erased)])
        for eval_id in erased:
            del created[eval_id]
    return erased


def _values(types: dict[str, str]) -> str:
    return ", ".join(f"%s::{type_}" for type_ in types.values())


_CREATE_ONE: Final = f"{_INTO_RECORDS} VALUES ({_values(_RECORD_TYPES)}) ON CONFLICT DO NOTHING"
_LOG_ONE: Final = f"INSERT INTO evaluation_events ({columns(EVENT_COLUMNS)}) VALUES ({_values(EVENT_COLUMNS)})"
_CONTENT_ONE: Final = f"INSERT INTO contents ({columns(_CONTENT_TYPES)}) VALUES ({_values(_CONTENT_TYPES)})"
_UPDATE_ONE: Final = f"""
UPDATE evaluations SET {", ".join(f"{name} = %s::{_RECORD_TYPES[name]}" for name in _CHANGED)},
    updated_at = statement_timestamp()
WHERE eval_id = %s::text
"""
_COMPARE_ONE: Final = f"""
SELECT ({columns(_COMPARED, "e.{}")}) IS NOT DISTINCT FROM ({_values({name: EVENT_COLUMNS[name] for name in _COMPARED})}),
    {_HASHES}, e.extra
FROM evaluation_events e WHERE e.eval_id = %s::text AND e.event_id = %s::uuid
"""


def _texts(row: Iterable[Any]) -> list[str | None]:
    return [None if value is None else _TEXT_OF.get(type(value), str)(value) for value in row]


_TEXT_OF: Final[dict[type, Any]] = {
    dict: lambda value: jsonb(value).decode(),
    bytes: lambda value: "\\x" + value.hex(),
}


def lock(conn: psycopg.Connection[Any], eval_ids: list[str]) -> psycopg.Cursor[Any]:
    """Lock the existing records of these evaluations in order. Others can still read them."""
    return conn.cursor(binary=True).execute(_LOCK, [_array(eval_ids)])


def confirm(conn: psycopg.Connection[Any], row: list[Any]) -> None:
    """Write the confirmations of a commit to the outbox: their number, their lines and their traces."""
    conn.execute(_CONFIRM, row)


def update(conn: psycopg.Connection[Any], folded: Folded) -> None:
    """Change a locked record."""
    eval_id, *changed = _row(folded)
    conn.execute(_UPDATE_ONE, [*_texts(changed), eval_id])


def records(locked: psycopg.Cursor[Any]) -> dict[str, StoredRecord]:
    """Return the records that `lock` locked."""
    return {row[0]: StoredRecord(RecordRow(*row[:-2]), *row[-2:]) for row in locked.fetchall()}


def _logged(conn: psycopg.Connection[Any], events: Events) -> psycopg.Cursor[Any]:
    """Look up which of these events are in the log."""
    ids = [(eval_id, row.event_id.int) for eval_id, rows in events.items() for row in rows]
    arrays = [_array([eval_id for eval_id, _ in ids]), "{" + ",".join([f"{event_id:032x}" for _, event_id in ids]) + "}"]
    return conn.cursor(binary=True).execute(_LOGGED, arrays)


def _array(eval_ids: Iterable[str]) -> str:
    """Return ids as the text of a PostgreSQL array. Ids hold no quotes or backslashes. psycopg converts a list more slowly."""
    return '{"' + '","'.join(eval_ids) + '"}'


def _row(folded: Folded) -> tuple[Any, ...]:
    return *folded.record, folded.merge_state, folded.record.version
