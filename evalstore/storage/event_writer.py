"""Write the events and records of a call, inside its transaction.

`CopyWriter` has the lowest cost per row. It uses COPY and temporary tables that statements join. It needs a dozen round trips,
and the commit truncates the tables, which takes several ms on some file systems.

`PipelineWriter` sends single statements without waiting for replies. It needs two round trips, but each row costs several times
as much. docs/decisions/0022-few-events-in-two-round-trips.md
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Literal, NamedTuple, Self
from uuid import UUID
from zlib import crc32

import psycopg
from psycopg.pq import PipelineStatus

from evalstore.storage import database, sessions, tombstones
from evalstore.storage.row_statements import (
    CHANGED,
    INTO_RECORDS,
    RECORD,
    RECORD_TYPES,
    SINGLE,
    Rows,
    columns,
    parameters,
    texts,
    values,
)
from evalstore.storage.tombstones import text_array
from models.errors import EvalstoreError
from models.fields import EVENT_COLUMNS
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
# A pooler may hand over a session with temporary tables of another release. The hash in these names keeps them apart.
_STAGED_RECORDS: Final = f"evalstore_stage_records_{crc32(repr(RECORD_TYPES).encode()):08x}"
_STAGED_EVENTS: Final = f"evalstore_stage_events_{crc32(repr(EVENT_COLUMNS).encode()):08x}"

# Two events with the same id are the same if these columns and the hashes of their contents are equal.
_COMPARED: Final = [name for name in EventRow._fields if name not in {"eval_id", "event_id", *CONTENTS}]


# These statements join a temporary table, or rows in JSON, with a table by its primary key. They must use the index at any
# table size, although the planner has no statistics of the other side. Plans are generic: PostgreSQL would plan each call with
# a short array again. The last value is the time of the transaction.
_BEGIN: Final = f"""
SELECT set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true),
    set_config('enable_seqscan', 'off', true), set_config('plan_cache_mode', 'force_generic_plan', true),
    {sessions.DURABLE.format("true")}, now()
"""
_LOCK: Final = f"""
SELECT {columns(RECORD)} FROM evaluations WHERE eval_id = ANY(%s::text[]) ORDER BY eval_id FOR NO KEY UPDATE
"""
_LOCK_ONE: Final = f"SELECT {columns(RECORD)} FROM evaluations WHERE eval_id = %s::text FOR NO KEY UPDATE"
# This statement must come after the lock: only then it sees what other workers committed before they released their locks.
_LOGGED: Final = """
SELECT e.eval_id, e.event_id FROM unnest(%s::text[], %s::uuid[]) AS wanted (eval_id, event_id)
JOIN evaluation_events e ON e.eval_id = wanted.eval_id AND e.event_id = wanted.event_id
"""
_HASHES: Final = columns(
    CONTENTS,
    "coalesce(sha256(e.{0}), (SELECT c.sha256 FROM contents c "
    "WHERE c.eval_id = e.eval_id AND c.event_id = e.event_id AND c.kind = '{0}'))",
)

_new: Final = tuple.__new__  # Faster than the constructor of a named tuple.

Events = dict[str, list[EventRow]]
Compared = dict[int, list[Any]]


class StoredRecord(NamedTuple):
    """A locked record with its merge state. The merge state belongs to the version `merge_version`."""

    record: RecordRow
    merge_state: bytes | None
    merge_version: int | None

    @classmethod
    def of(cls, row: Sequence[Any]) -> Self:
        """Return the record with the columns `RECORD`."""
        return cls(_new(RecordRow, row[:-2]), *row[-2:])

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
            if self._create() != len(created):
                raise Restart("another transaction created an evaluation of these")
        found = {eval_id for (eval_id,) in tombstones.ask(self.conn, created).fetchall()} if created else set[str]()
        return BeginResult(created, existing, set(logged), _without_erased(self.conn, found, created))

    def write(self, rows: Rows, contents: Rows, changed: Collection[Folded], confirmation: list[Any]) -> None:
        """Insert events, content that has its own rows, and a row of the outbox. Change locked records."""
        self.log(rows, contents)
        if changed:
            self._stage_records(1, changed)
            self._cursor.execute(_UPDATE)
        confirm(self.conn, confirmation)

    def _create(self) -> int:
        """Insert the staged records that are missing. Return their number."""
        if not sessions.has_citus(self.conn):
            return self._cursor.execute(_CREATE).rowcount
        # The count that Citus reports includes records that exist already.
        return len(self._cursor.execute(f"{_CREATE} RETURNING eval_id".encode()).fetchall())

    def log(self, rows: Rows, contents: Rows) -> None:
        """Insert events, and content that has its own rows."""
        _copy(self._cursor, "evaluation_events", EVENT_COLUMNS, rows)
        if contents:
            _copy(self._cursor, "contents", _CONTENT_TYPES, contents)

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
        self._stage(_STAGED_RECORDS, RECORD_TYPES)
        _copy(
            self._cursor,
            _STAGED_RECORDS,
            {"number": "int4"} | RECORD_TYPES,
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
{INTO_RECORDS} SELECT {columns(RECORD)} FROM {_STAGED_RECORDS} WHERE number = 0 ORDER BY eval_id ON CONFLICT DO NOTHING
"""
# statement_timestamp(), not now(): this transaction may have begun before another transaction created the record.
_UPDATE: Final = f"""
UPDATE evaluations e SET ({columns(CHANGED)}, updated_at) = ROW({columns(CHANGED, "s.{}")}, statement_timestamp())
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
    """Writes with a fixed number of statements in a pipeline.

    The statements never change, so PostgreSQL plans them once. All values are sent as text or NULL, but several rows as JSON:
    these cost a single statement.
    """

    def begin(self, events: Events) -> BeginResult:
        """Do as `CopyWriter.begin` does. The other methods also match those of CopyWriter."""
        # Try to create all records: an existing record is left unchanged. Waiting to see which exist would cost a round trip.
        locked = lock(self.conn, list(events))
        new = {eval_id: fold(None, rows) for eval_id, rows in events.items()}
        statements, given = parameters(RECORD_TYPES, [_row(folded) for folded in new.values()])
        inserted = self.conn.execute(statements.create, given)
        ids = _ids(events)
        found = self.conn.cursor(binary=True).execute(_LOOK_UP, [*ids, ids[0]])
        existing = records(locked)
        created = {eval_id: new[eval_id] for (eval_id,) in inserted.fetchall()}
        if len(created) + len(existing) != len(events):
            raise Restart("another transaction created an evaluation of these")
        logged, erased = set[tuple[str, UUID]](), set[str]()
        for eval_id, event_id in found.fetchall():
            if event_id is None:
                erased.add(eval_id)
            else:
                logged.add((eval_id, event_id))
        return BeginResult(created, existing, logged, _without_erased(self.conn, erased, created))

    def write(self, rows: Rows, contents: Rows, changed: Collection[Folded], confirmation: list[Any]) -> None:
        for content in contents:
            self.conn.execute(_CONTENT_ONE, texts(content))
        statements, given = parameters(EVENT_COLUMNS, rows)
        self.conn.execute(statements.log, given)
        if changed:
            statements, given = parameters(RECORD_TYPES, [_row(folded) for folded in changed])
            self.conn.execute(statements.update, given)
        confirm(self.conn, confirmation)

    def compare(self, rows: dict[int, EventRow]) -> Compared:
        replies = {
            number: self.conn.cursor(binary=True).execute(
                _COMPARE_ONE, texts([*(getattr(row, name) for name in _COMPARED), row.eval_id, row.event_id])
            )
            for number, row in rows.items()
        }
        return {number: list(reply.fetchall()[0]) for number, reply in replies.items()}


def _without_erased(conn: psycopg.Connection[Any], found: set[str], created: dict[str, Folded]) -> set[str]:
    """Delete from the records just created those of the erased evaluations `found`. Return these evaluations.

    Tombstones are looked up after the records are inserted. An eraser writes its tombstone first, and then waits for the
    transaction that inserts the record. So either this transaction sees the tombstone, or the eraser sees the record.
    """
    erased = found & created.keys()
    if erased:
        conn.execute("DELETE FROM evaluations WHERE eval_id = ANY(%s::text[])", [list(erased)])
        for eval_id in erased:
            del created[eval_id]
    return erased


# This statement must come after the lock and the insert. See `_LOGGED` and `_without_erased`. A row without an event is an
# erased evaluation.
_LOOK_UP: Final = f"{_LOGGED} UNION ALL SELECT erased.eval_id, NULL FROM ({tombstones.ERASED}) erased"
_CONTENT_ONE: Final = f"INSERT INTO contents ({columns(_CONTENT_TYPES)}) VALUES ({values(_CONTENT_TYPES)})"
_COMPARE_ONE: Final = f"""
SELECT ({columns(_COMPARED, "e.{}")}) IS NOT DISTINCT FROM ({values({name: EVENT_COLUMNS[name] for name in _COMPARED})}),
    {_HASHES}, e.extra
FROM evaluation_events e WHERE e.eval_id = %s::text AND e.event_id = %s::uuid
"""


def in_pipeline(conn: psycopg.Connection[Any]) -> AbstractContextManager[object]:
    """Begin a pipeline if there is none. A nested pipeline would wait for the replies to earlier statements."""
    return conn.pipeline() if conn.pgconn.pipeline_status == PipelineStatus.OFF else nullcontext()


def lock(conn: psycopg.Connection[Any], eval_ids: list[str]) -> list[psycopg.Cursor[Any]]:
    """Lock the existing records of these evaluations in order. Others can still read them.

    Citus refuses to lock several rows of a distributed table in one statement. So there each record takes a statement.
    """
    if not sessions.has_citus(conn):
        return [conn.cursor(binary=True).execute(_LOCK, [text_array(eval_ids)])]
    with in_pipeline(conn):
        return [conn.cursor(binary=True).execute(_LOCK_ONE, [eval_id]) for eval_id in sorted(eval_ids)]


def confirm(conn: psycopg.Connection[Any], row: list[Any]) -> None:
    """Write the confirmations of a commit to the outbox: their number, their lines and their traces."""
    conn.execute(_CONFIRM, row)


def update(conn: psycopg.Connection[Any], folded: Folded) -> None:
    """Change a locked record."""
    conn.execute(SINGLE.update, texts(_row(folded)))


def records(locked: Iterable[psycopg.Cursor[Any]]) -> dict[str, StoredRecord]:
    """Return the records that `lock` locked."""
    return {row[0]: StoredRecord.of(row) for cursor in locked for row in cursor.fetchall()}


def _logged(conn: psycopg.Connection[Any], events: Events) -> psycopg.Cursor[Any]:
    """Look up which of these events are in the log."""
    return conn.cursor(binary=True).execute(_LOGGED, _ids(events))


def _ids(events: Events) -> list[str]:
    """Return the ids of evaluations and events as the texts of two arrays."""
    ids = [(eval_id, row.event_id.int) for eval_id, rows in events.items() for row in rows]
    return [text_array([eval_id for eval_id, _ in ids]), "{" + ",".join([f"{event_id:032x}" for _, event_id in ids]) + "}"]


def _row(folded: Folded) -> tuple[Any, ...]:
    return *folded.record, folded.merge_state, folded.record.version
