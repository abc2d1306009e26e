"""How a call's events and records are written, within its transaction.

`Many` costs least for each row: COPY, and a temporary table that the statements join. That is a dozen round trips, and emptying
the table at the commit takes some ms wherever shortening a file does. `Few` sends statements one by one without waiting
for their answers: two round trips, whose rows cost several times as much. docs/decisions/0022-few-events-in-two-round-trips.md
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

import psycopg

from evalstore.storage import database, sessions
from models.errors import DatabaseOutage
from models.fields import EVENT_COLUMNS, RECORD_COLUMNS
from models.record import EventRow, RecordRow, jsonb, promote, rfc3339

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
_LOCK: Final = """
SELECT eval_id FROM evaluations WHERE eval_id = ANY(%s::text[]) ORDER BY eval_id FOR NO KEY UPDATE
"""
_READ_LOG: Final = f"""
SELECT {columns(name for name in EventRow._fields if name not in CONTENTS)}
FROM evaluation_events WHERE eval_id = ANY(%s::text[])
"""
_INTO_RECORDS: Final = f"INSERT INTO evaluations ({columns(RecordRow._fields)})"
_HASHES: Final = columns(
    CONTENTS,
    "coalesce(sha256(e.{0}), (SELECT c.sha256 FROM contents c "
    "WHERE c.eval_id = e.eval_id AND c.event_id = e.event_id AND c.kind = '{0}'))",
)
_CHANGED: Final = [name for name in RecordRow._fields if name != "eval_id"]

Log = dict[str, list[EventRow]]
Compared = dict[int, list[Any]]


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
        self._conn, self._cursor, self._info = conn, conn.cursor(binary=True), info
        # Said anew by each commit: after a failure they are made sure of. A pooler may have gone on with another session.
        self._staged: set[str] = info.pop("evalstore_staged", set())
        self._begun = conn.cursor(binary=True).execute(_BEGIN)

    def recorded_at(self) -> str:
        """The time of the transaction, RFC 3339."""
        ((*_, now),) = self._begun.fetchall()
        return rfc3339(now)

    def confirm(self, row: list[Any]) -> None:
        """Write to the outbox."""
        self._cursor.execute(_CONFIRM, row)

    def committed(self) -> None:
        """Note what the next call need not do again."""
        self._info["evalstore_staged"] = self._staged


class Many(_Way):
    """The stages live as long as the connection, and are empty between transactions. Records are 0 as the events of a call
    alone make them, and 1 as all events of theirs do; events that are there already are numbered by their place in the call."""

    def create(self, states: dict[str, RecordRow]) -> tuple[set[str], Log]:
        """Make the records that there are not yet, and lock the others; returns the ids of those made, and the log of the
        others, without content."""
        self._stage_records(0, states.values())
        self._cursor.execute(_CREATE)
        if self._cursor.rowcount == len(states):
            return set(states), {}
        created = {eval_id for (eval_id,) in self._cursor.fetchall()}
        existing = [eval_id for eval_id in states if eval_id not in created]
        _all_locked(self._cursor.execute(_LOCK, [existing]), existing)
        return created, _log_of(self._cursor.execute(_READ_LOG, [existing]), existing)

    def log(self, facts: Collection[EventRow], contents: Collection[tuple[Any, ...]]) -> None:
        """Write events, and content that has rows of its own."""
        _copy(self._cursor, "evaluation_events", EVENT_COLUMNS, facts)
        if contents:
            _copy(self._cursor, "contents", _CONTENT_TYPES, contents)

    def update(self, states: list[RecordRow]) -> None:
        """Change records."""
        self._stage_records(1, states)
        self._cursor.execute(_UPDATE)

    def compare(self, facts: dict[int, EventRow]) -> Compared:
        """By number of each event, which is in the log: whether it is the same there but for content; its content's hashes; and
        the `extra` stored there."""
        self._stage("evalstore_stage_events", EVENT_COLUMNS)
        _copy(
            self._cursor,
            "evalstore_stage_events",
            {"number": "int4"} | EVENT_COLUMNS,
            ((number, *one) for number, one in facts.items()),
        )
        return {number: same for number, *same in self._cursor.execute(_COMPARE)}

    def _stage_records(self, number: int, states: Iterable[RecordRow]) -> None:
        self._stage("evalstore_stage_records", RECORD_COLUMNS)
        _copy(
            self._cursor, "evalstore_stage_records", {"number": "int4"} | RECORD_COLUMNS, ((number, *state) for state in states)
        )

    def _stage(self, name: str, types: dict[str, str]) -> None:
        if name not in self._staged:
            declared = ", ".join(f"{column} {type_}" for column, type_ in types.items())
            declared = declared.replace("eval_id text", 'eval_id text COLLATE "C"')
            made = f"CREATE TEMPORARY TABLE IF NOT EXISTS {name} (number int4, {declared}) ON COMMIT DELETE ROWS"
            self._cursor.execute(made.encode())
            self._staged.add(name)


_CREATE: Final = f"""
{_INTO_RECORDS} SELECT {columns(RecordRow._fields)} FROM evalstore_stage_records WHERE number = 0 ORDER BY eval_id
ON CONFLICT DO NOTHING RETURNING eval_id
"""
# The time of the statement, not of the transaction: that may have begun before another one created the record.
_UPDATE: Final = f"""
UPDATE evaluations e SET ({columns(_CHANGED)}, updated_at) = ROW({columns(_CHANGED, "s.{}")}, statement_timestamp())
FROM evalstore_stage_records s WHERE e.eval_id = s.eval_id AND s.number = 1
"""
_COMPARE: Final = f"""
SELECT s.number, ({columns(_COMPARED, "e.{}")}) IS NOT DISTINCT FROM ({columns(_COMPARED, "s.{}")}), {_HASHES}, e.extra
FROM evalstore_stage_events s JOIN evaluation_events e ON e.eval_id = s.eval_id AND e.event_id = s.event_id
"""
_CONFIRM: Final = "INSERT INTO confirmations (count, body, traceparents) VALUES (%s, %s, %s)"


def _copy(cursor: psycopg.Cursor[Any], table: str, types: dict[str, str], rows: Iterable[tuple[Any, ...]]) -> None:
    with cursor.copy(f"COPY {table} ({columns(types)}) FROM STDIN (FORMAT BINARY)".encode()) as copy:
        copy.set_types(list(types.values()))
        for row in rows:
            copy.write_row(row)


class Few(_Way):
    """Statements are the same for every call, and PostgreSQL plans them once: all values go as text, NULL or not."""

    def create(self, states: dict[str, RecordRow]) -> tuple[set[str], Log]:
        """As of Many; so are the others."""
        # Also locks and reads what it made: to wait and see which these are would take longer.
        eval_ids = list(states)
        made = [self._conn.execute(_CREATE_ONE, _texts(state)) for state in states.values()]
        locked = self._conn.execute(_LOCK, [eval_ids])
        log = self._conn.cursor(binary=True).execute(_READ_LOG, [eval_ids])
        rows = log.fetchall()
        _all_locked(locked, eval_ids)
        created = {eval_id for eval_id, one in zip(eval_ids, made, strict=True) if one.rowcount}
        return created, _log_of(rows, [eval_id for eval_id in eval_ids if eval_id not in created])

    def log(self, facts: Collection[EventRow], contents: Collection[tuple[Any, ...]]) -> None:
        for one in facts:
            self._conn.execute(_LOG_ONE, _texts(one))
        for row in contents:
            self._conn.execute(_CONTENT_ONE, _texts(row))

    def update(self, states: list[RecordRow]) -> None:
        for state in states:
            self._conn.execute(_UPDATE_ONE, [*_texts(state[1:]), state.eval_id])

    def compare(self, facts: dict[int, EventRow]) -> Compared:
        asked = {
            number: self._conn.cursor(binary=True).execute(
                _COMPARE_ONE, _texts([*(getattr(one, name) for name in _COMPARED), one.eval_id, one.event_id])
            )
            for number, one in facts.items()
        }
        return {number: list(found.fetchall()[0]) for number, found in asked.items()}


def _values(types: dict[str, str]) -> str:
    return ", ".join(f"%s::{type_}" for type_ in types.values())


_CREATE_ONE: Final = f"{_INTO_RECORDS} VALUES ({_values(RECORD_COLUMNS)}) ON CONFLICT DO NOTHING"
_LOG_ONE: Final = f"INSERT INTO evaluation_events ({columns(EVENT_COLUMNS)}) VALUES ({_values(EVENT_COLUMNS)})"
_CONTENT_ONE: Final = f"INSERT INTO contents ({columns(_CONTENT_TYPES)}) VALUES ({_values(_CONTENT_TYPES)})"
_UPDATE_ONE: Final = f"""
UPDATE evaluations SET {", ".join(f"{name} = %s::{RECORD_COLUMNS[name]}" for name in _CHANGED)},
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


def _all_locked(locked: psycopg.Cursor[Any], eval_ids: list[str]) -> None:
    if locked.rowcount != len(eval_ids):
        # Its events would be in the log, and of no record.
        raise DatabaseOutage("an evaluation was deleted between finding and locking it")


def _log_of(rows: Iterable[Any], eval_ids: list[str]) -> Log:
    """The log of each: read in a later statement than the one that locked them, which therefore sees what other workers
    committed before they let go."""
    logged: Log = {eval_id: [] for eval_id in eval_ids}
    for row in rows:
        *columns, extra = row
        one = EventRow(*columns)
        logged[one.eval_id].append(one if extra is None else promote(one._replace(extra=extra)))
    return logged
