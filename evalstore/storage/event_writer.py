"""How a call's events and records are written, within its transaction.

`Many` costs least for each row: COPY, and a temporary table that the statements join. That is a dozen round trips, and emptying
the table at the commit takes some ms wherever shortening a file does. `Few` sends statements one by one without waiting
for their answers: two round trips, whose rows cost several times as much. docs/decisions/0022-few-events-in-two-round-trips.md
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
_FEW: Final = 64
_SMALL_BYTES: Final = 256 * 1024

_CONTENT_TYPES: Final = dict(
    zip(
        ["eval_id", "event_id", "kind", "occurred_at", "size", "sha256", "data", "store", "encoding"],
        ["text", "uuid", "text", "timestamptz", "int8", "bytea", "bytea", "text", "text"],
        strict=True,
    )
)
# A row of `evaluations`, as `_row` makes it.
_RECORD_TYPES: Final = {**RECORD_COLUMNS, "merge_state": "bytea", "merge_version": "int4"}
RECORD: Final = tuple(_RECORD_TYPES)
# A pooler may give a worker a session in which another release made its stages: these have other names.
_STAGED_RECORDS: Final = f"evalstore_stage_records_{crc32(repr(_RECORD_TYPES).encode()):08x}"
_STAGED_EVENTS: Final = f"evalstore_stage_events_{crc32(repr(EVENT_COLUMNS).encode()):08x}"

# What of an event's row says whether another is the same; content by its hash, as it may be elsewhere.
_COMPARED: Final = [name for name in EventRow._fields if name not in {"eval_id", "event_id", *CONTENTS}]


def columns(names: Iterable[str], form: str = "{}") -> str:
    """A list of columns, each in that form."""
    return ", ".join(form.format(name) for name in names)


# What follows joins a stage with a table by the table's primary key, and must do so by index however large the tables grow and
# whatever the planner believes of the stage. The last is the time of the transaction.
_BEGIN: Final = f"""
SELECT set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true),
    set_config('enable_seqscan', 'off', true), {sessions.DURABLE.format("true")}, now()
"""
_LOCK: Final = f"""
SELECT {columns(RECORD)} FROM evaluations WHERE eval_id = ANY(%s::text[]) ORDER BY eval_id FOR NO KEY UPDATE
"""
# A later statement than the lock: this one sees what other workers committed before they released it.
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
    """A record that is locked, with its merge state, which is of the version `merge_version`."""

    record: RecordRow
    merge_state: bytes | None
    merge_version: int | None

    def add(self, events: Sequence[EventRow]) -> "Folded | RebuildReason":
        """Return the record with `events`, or the reason why its merge state must be rebuilt from the log first."""
        if self.merge_state is None:
            return "absent"
        if self.merge_version != self.record.version:
            return "stale"
        try:
            return fold(Folded(self.record, self.merge_state), events)
        except Undecodable:
            return "undecodable"


class Begun(NamedTuple):
    """The records that were created, those that existed and are locked, and the events of these that are in the log.

    `erased`: the evaluations whose records would have been created if they had not been erased before.
    """

    created: dict[str, Folded]
    existing: dict[str, StoredRecord]
    logged: set[tuple[str, UUID]]
    erased: set[str]


class Restart(EvalstoreError):
    """The transaction cannot go on: roll it back, rebuild the records `to_rebuild`, and begin again."""

    def __init__(self, message: str, to_rebuild: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.to_rebuild = tuple(to_rebuild)


@contextmanager
def writing(conn: psycopg.Connection[Any], info: dict[str, Any], facts: Sequence[EventRow]) -> "Iterator[Few | Many]":
    """The way to write these; `info` goes with the connection. Few are committed at the end of the block."""
    if not are_few(facts):
        yield Many(conn, info)
        return
    with database.pipelined(conn):
        yield Few(conn, info)


def are_few(facts: Sequence[EventRow]) -> bool:
    """Whether these are few, and small."""
    contents = (data for one in facts for data in (one.code, one.output, one.error) if isinstance(data, bytes))
    return len(facts) <= _FEW and sum(map(len, contents)) <= _SMALL_BYTES


class _Way:
    """What both have in common. `info` goes with the connection."""

    def __init__(self, conn: psycopg.Connection[Any], info: dict[str, Any]) -> None:
        self.conn, self._cursor, self._info = conn, conn.cursor(binary=True), info
        # Said anew by each commit: after a failure they are made sure of. A pooler may have gone on with another session.
        self._staged: set[str] = info.pop("evalstore_staged", set())
        self._begun = conn.cursor(binary=True).execute(_BEGIN)

    def recorded_at(self) -> str:
        """The time of the transaction, RFC 3339."""
        ((*_, now),) = self._begun.fetchall()
        return rfc3339(now)

    def confirm(self, row: list[Any]) -> None:
        """Write to the outbox."""
        confirm(self.conn, row)

    def committed(self) -> None:
        """Note what the next call need not do again."""
        self._info["evalstore_staged"] = self._staged


class Many(_Way):
    """The stages live as long as the connection, and are empty between transactions. Records to create have the number 0 in
    them, records to change 1; events that are there already are numbered by their place in the call."""

    def begin(self, events: Events) -> Begun:
        """Lock the records of these evaluations, in order; create those that there are not yet, from `events` alone.

        Raises Restart if another transaction created one meanwhile: to wait for that record's lock could be a deadlock.
        """
        existing = records(lock(self.conn, list(events)))
        found = {eval_id: events[eval_id] for eval_id in existing}
        logged = _logged(self.conn, found).fetchall() if found else []
        created = {eval_id: fold(None, of_one) for eval_id, of_one in events.items() if eval_id not in existing}
        if created:
            self._stage_records(0, created.values())
            self._cursor.execute(_CREATE)
            if self._cursor.rowcount != len(created):
                raise Restart("another transaction created an evaluation of these")
        erased = _without_erased(self.conn, tombstones.ask(self.conn, created), created) if created else set[str]()
        return Begun(created, existing, set(logged), erased)

    def log(self, facts: Collection[EventRow], contents: Collection[tuple[Any, ...]]) -> None:
        """Write events, and content that has rows of its own."""
        _copy(self._cursor, "evaluation_events", EVENT_COLUMNS, facts)
        if contents:
            _copy(self._cursor, "contents", _CONTENT_TYPES, contents)

    def update(self, records: list[Folded]) -> None:
        """Change records."""
        self._stage_records(1, records)
        self._cursor.execute(_UPDATE)

    def compare(self, facts: dict[int, EventRow]) -> Compared:
        """By number of each event, which is in the log: whether it is the same there but for content; its content's hashes; and
        the `extra` stored there."""
        self._stage(_STAGED_EVENTS, EVENT_COLUMNS)
        _copy(
            self._cursor,
            _STAGED_EVENTS,
            {"number": "int4"} | EVENT_COLUMNS,
            ((number, *one) for number, one in facts.items()),
        )
        return {number: same for number, *same in self._cursor.execute(_COMPARE)}

    def _stage_records(self, number: int, records: Iterable[Folded]) -> None:
        self._stage(_STAGED_RECORDS, _RECORD_TYPES)
        _copy(
            self._cursor,
            _STAGED_RECORDS,
            {"number": "int4"} | _RECORD_TYPES,
            ((number, *_row(one)) for one in records),
        )

    def _stage(self, name: str, types: dict[str, str]) -> None:
        if name not in self._staged:
            declared = ", ".join(f"{column} {type_}" for column, type_ in types.items())
            declared = declared.replace("eval_id text", 'eval_id text COLLATE "C"')
            made = f"CREATE TEMPORARY TABLE IF NOT EXISTS {name} (number int4, {declared}) ON COMMIT DELETE ROWS"
            self._cursor.execute(made.encode())
            self._staged.add(name)


_CREATE: Final = f"""
{_INTO_RECORDS} SELECT {columns(RECORD)} FROM {_STAGED_RECORDS} WHERE number = 0 ORDER BY eval_id ON CONFLICT DO NOTHING
"""
# The time of the statement, not of the transaction: that may have begun before another one created the record.
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


class Few(_Way):
    """Statements are the same for every call, and PostgreSQL plans them once: all values go as text, NULL or not."""

    def begin(self, events: Events) -> Begun:
        """As of Many; so are the others."""
        # Creating does nothing where a record exists. To wait and see which do would be a round trip more.
        locked = lock(self.conn, list(events))
        alone = {eval_id: fold(None, of_one) for eval_id, of_one in events.items()}
        made = [self.conn.execute(_CREATE_ONE, _texts(_row(one))) for one in alone.values()]
        logged = _logged(self.conn, events)
        tombs = tombstones.ask(self.conn, events)
        existing = records(locked)
        created = {eval_id: alone[eval_id] for eval_id, one in zip(alone, made, strict=True) if one.rowcount}
        if len(created) + len(existing) != len(events):
            raise Restart("another transaction created an evaluation of these")
        erased = _without_erased(self.conn, tombs, created)
        return Begun(created, existing, set(logged.fetchall()), erased)

    def log(self, facts: Collection[EventRow], contents: Collection[tuple[Any, ...]]) -> None:
        for one in facts:
            self.conn.execute(_LOG_ONE, _texts(one))
        for row in contents:
            self.conn.execute(_CONTENT_ONE, _texts(row))

    def update(self, records: list[Folded]) -> None:
        for one in records:
            update(self.conn, one)

    def compare(self, facts: dict[int, EventRow]) -> Compared:
        asked = {
            number: self.conn.cursor(binary=True).execute(
                _COMPARE_ONE, _texts([*(getattr(one, name) for name in _COMPARED), one.eval_id, one.event_id])
            )
            for number, one in facts.items()
        }
        return {number: list(found.fetchall()[0]) for number, found in asked.items()}


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
    """Lock the records that exist of these evaluations, in order. Others read them meanwhile."""
    return conn.cursor(binary=True).execute(_LOCK, [_array(eval_ids)])


def confirm(conn: psycopg.Connection[Any], row: list[Any]) -> None:
    """Write the confirmations of a commit to the outbox: their number, their lines and their traces."""
    conn.execute(_CONFIRM, row)


def update(conn: psycopg.Connection[Any], folded: Folded) -> None:
    """Change a record that is locked."""
    eval_id, *changed = _row(folded)
    conn.execute(_UPDATE_ONE, [*_texts(changed), eval_id])


def records(locked: psycopg.Cursor[Any]) -> dict[str, StoredRecord]:
    """Return the records that `lock` locked."""
    return {row[0]: StoredRecord(RecordRow(*row[:-2]), *row[-2:]) for row in locked.fetchall()}


def _logged(conn: psycopg.Connection[Any], events: Events) -> psycopg.Cursor[Any]:
    """Look up which of these events are in the log."""
    ids = [(eval_id, one.event_id.int) for eval_id, of_one in events.items() for one in of_one]
    arrays = [_array([eval_id for eval_id, _ in ids]), "{" + ",".join([f"{event_id:032x}" for _, event_id in ids]) + "}"]
    return conn.cursor(binary=True).execute(_LOGGED, arrays)


def _array(eval_ids: Iterable[str]) -> str:
    """The ids as PostgreSQL's text of an array; they hold neither quotes nor backslashes. psycopg takes longer for a list."""
    return '{"' + '","'.join(eval_ids) + '"}'


def _row(folded: Folded) -> tuple[Any, ...]:
    return *folded.record, folded.merge_state, folded.record.version
