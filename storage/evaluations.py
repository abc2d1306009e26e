"""Storing and reading evaluations. Every event, whichever way it came, is written by `store`."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

import msgspec
import psycopg
from sqlalchemy import Connection

from models.content import Reference
from models.errors import DatabaseOutage
from models.events import ENDINGS, Event
from models.record import Fact, Record, State, fact, fold, record
from storage import contents, database
from storage.contents import Content, Kind
from storage.objects import Stores

# Content up to this size is part of its event's row, larger content has a row of its own in `contents`.
ROW_LIMIT_BYTES: Final = 4096

Outcome = Literal["applied", "duplicate", "reused"]


@dataclass(frozen=True)
class Stored:
    """What became of a call's events: `outcomes` in their order, and the confirmations written to the outbox.

    `written_at`: when there was nothing left to do but to commit, on the clock of `time.perf_counter`.
    """

    outcomes: list[Outcome]
    confirmations: list[dict[str, Any]] = field(default_factory=list)
    conflicting_results: int = 0
    written_at: float = field(default=0.0, compare=False)


_CONTENTS: Final[tuple[Kind, ...]] = ("code", "output", "error")
_PG_TYPES: Final[dict[str, list[str]]] = {
    "text": ["eval_id", "type", "status", "language", "submitter", "executor_id", "container_id", "reason", "extra"],
    "uuid": ["event_id", "code_event_id", "result_event_id"],
    "int4": ["attempt", "version"],
    "int8": ["exit_code", "memory_bytes"],
    "float8": ["timeout_s", "duration_ms"],
    "timestamptz": ["occurred_at", "queued_at", "started_at", "finished_at"],
    "jsonb": ["metadata"],
    "bytea": [*_CONTENTS],
}
_TYPE_OF: Final = {column: type_ for type_, columns in _PG_TYPES.items() for column in columns}


def _columns(names: Iterable[str], form: str = "{}") -> str:
    return ", ".join(form.format(name) for name in names)


def _stage(name: str, columns: Iterable[str]) -> str:
    declared = ", ".join(f"{column} {_TYPE_OF[column]}" for column in columns).replace(
        "eval_id text", 'eval_id text COLLATE "C"'
    )
    return f"CREATE TEMPORARY TABLE IF NOT EXISTS {name} (number int4, {declared}) ON COMMIT DELETE ROWS;"


_FACT_TYPES: Final = [_TYPE_OF[column] for column in Fact._fields]
_STATE_TYPES: Final = [_TYPE_OF[column] for column in State._fields]
_CONTENT_TYPES: Final = ["text", "uuid", "text", "timestamptz", "int8", "bytea", "bytea", "text", "text"]

# The stages live as long as the connection and are empty between transactions. Records are 0 as the events of a call alone make
# them, and 1 as all events of theirs do; events that are there already are numbered by their place in the call. What follows
# joins a stage with a table by the table's primary key, and must do so by index however large the tables grow and whatever the
# planner believes of the stage.
_STAGES: Final = _stage("stage_events", Fact._fields) + _stage("stage_records", State._fields)
_BEGIN: Final = """
SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL enable_seqscan = off; SELECT now();
"""
_STAGE_RECORDS: Final = f"COPY stage_records (number, {_columns(State._fields)}) FROM STDIN (FORMAT BINARY)"
_CREATE: Final = f"""
INSERT INTO evaluations ({_columns(State._fields)})
SELECT {_columns(State._fields)} FROM stage_records WHERE number = 0 ORDER BY eval_id
ON CONFLICT DO NOTHING RETURNING eval_id
"""
_LOCK: Final = """
SELECT eval_id FROM evaluations WHERE eval_id = ANY(%s::text[]) ORDER BY eval_id FOR NO KEY UPDATE
"""
_READ_LOG: Final = f"""
SELECT {_columns(name for name in Fact._fields if name not in {*_CONTENTS, "extra"})}
FROM evaluation_events WHERE eval_id = ANY(%s::text[])
"""
_LOG: Final = f"COPY evaluation_events ({_columns(Fact._fields)}) FROM STDIN (FORMAT BINARY)"
_LOG_CONTENTS: Final = """
COPY contents (eval_id, event_id, kind, occurred_at, size, sha256, data, store, encoding) FROM STDIN (FORMAT BINARY)
"""
_STAGE_EVENTS: Final = f"COPY stage_events (number, {_columns(Fact._fields)}) FROM STDIN (FORMAT BINARY)"
_COMPARED: Final = [name for name in Fact._fields if name not in {"eval_id", "event_id", *_CONTENTS}]
_COMPARE: Final = f"""
SELECT s.number,
    ({_columns(_COMPARED, "e.{}")}) IS NOT DISTINCT FROM ({_columns(_COMPARED, "s.{}")}),
    {
    _columns(
        _CONTENTS,
        "coalesce(sha256(e.{0}), (SELECT c.sha256 FROM contents c "
        "WHERE c.eval_id = e.eval_id AND c.event_id = e.event_id AND c.kind = '{0}'))",
    )
}
FROM stage_events s JOIN evaluation_events e ON e.eval_id = s.eval_id AND e.event_id = s.event_id
"""
# The time of the statement, not of the transaction: that may have begun before another one created the record.
_CHANGED: Final = [name for name in State._fields if name != "eval_id"]
_UPDATE: Final = f"""
UPDATE evaluations e SET ({_columns(_CHANGED)}, updated_at) = ROW({_columns(_CHANGED, "s.{}")}, statement_timestamp())
FROM stage_records s WHERE e.eval_id = s.eval_id AND s.number = 1
"""
_CONFIRM: Final = "INSERT INTO confirmations (count, body, traceparents) VALUES (%s, %s, %s)"


def store(conn: Connection, events: Sequence[Event | Fact], trace_of: Callable[[int], str | None] | None = None) -> Stored:
    """Write `events` to the log, the records and the outbox, in one transaction that is committed when this returns.

    An event that is already stored is a `duplicate`; one whose `event_id` is stored with another body is `reused` and changes
    nothing. Any number of callers may store events of the same evaluations at once: all take their locks in the order of
    `eval_id`, new records first, so that none waits for another in a circle. `trace_of` gives the trace of an event by its
    position, as a `traceparent`; each confirmation goes on in that of the last event it tells of.

    Raises DatabaseOutage (nothing is stored, or all of it where only the answer was lost: call again).
    """
    if not events:
        return Stored([])
    facts = [event if isinstance(event, Fact) else fact(event) for event in events]
    outcomes: list[Outcome] = ["duplicate"] * len(facts)
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        # Said anew by each commit: after a failure they are made sure of. A pooler may have gone on with another session.
        is_staged = conn.connection.info.pop("evalstore_staged", False)
        recorded_at = _begin(cursor, _BEGIN if is_staged else _STAGES + _BEGIN)
        written = _write(cursor, facts)
        confirmations = _confirmations(facts, written, recorded_at)
        if confirmations:
            body = b"\n".join(map(msgspec.json.encode, confirmations))
            traces = trace_of and _traces(written, trace_of)
            cursor.execute(_CONFIRM, [len(confirmations), body.decode(), traces])
        written_at = time.perf_counter()
        info = conn.connection.info
    info["evalstore_staged"] = True
    for positions in written.new.values():
        for position in positions:
            outcomes[position] = "applied"
    for position in written.reused:
        outcomes[position] = "reused"
    return Stored(outcomes, confirmations, written.conflicting_results, written_at)


def _begin(cursor: psycopg.Cursor[Any], statements: str) -> str:
    """Prepare the transaction; returns its time, RFC 3339."""
    cursor.execute(statements.encode(), binary=False)
    while cursor.nextset():
        pass
    ((now,),) = cursor.fetchall()
    return str(now.isoformat()).replace("+00:00", "Z")


class _Written(NamedTuple):
    """What was written: the positions of an evaluation's new events, those of reused ones, and the records made or changed."""

    new: dict[str, list[int]]
    reused: list[int]
    created: set[str]
    states: dict[str, State]
    conflicting_results: int


def _write(cursor: psycopg.Cursor[Any], facts: list[Fact]) -> _Written:
    """Write `facts` to the log and the records. Of those with one event_id the first stands, unless one is stored already."""
    firsts: dict[str, dict[UUID, int]] = {}
    for position, one in enumerate(facts):
        firsts.setdefault(one.eval_id, {}).setdefault(one.event_id, position)
    new = {eval_id: list(firsts[eval_id].values()) for eval_id in sorted(firsts)}
    states = {eval_id: fold([facts[position] for position in positions]) for eval_id, positions in new.items()}
    _stage_records(cursor, 0, states.values())

    cursor.execute(_CREATE)
    all_created = cursor.rowcount == len(states)
    created = set(states) if all_created else {eval_id for (eval_id,) in cursor.fetchall()}
    existing = [] if all_created else [eval_id for eval_id in states if eval_id not in created]
    before = _lock_and_read(cursor, existing) if existing else {}
    for eval_id in existing:
        known = {one.event_id for one in before[eval_id]}
        new[eval_id] = [position for event_id, position in firsts[eval_id].items() if event_id not in known]
        if not new[eval_id]:
            del new[eval_id], states[eval_id]
        else:
            states[eval_id] = fold(before[eval_id] + [facts[position] for position in new[eval_id]])
    applied = [position for positions in new.values() for position in positions]
    # None of these is in the log: an evaluation created here had no events, and the others' are known, and locked.
    if applied:
        _log(cursor, [facts[position] for position in applied])
    if changed_before := [states[eval_id] for eval_id in existing if eval_id in states]:
        _stage_records(cursor, 1, changed_before)
        cursor.execute(_UPDATE)
    return _Written(
        new,
        _reused(cursor, facts, set(range(len(facts))).difference(applied)) if len(applied) < len(facts) else [],
        created,
        states,
        sum(
            _conflicting_results(before.get(eval_id, []), [facts[position] for position in positions])
            for eval_id, positions in new.items()
        ),
    )


def _stage_records(cursor: psycopg.Cursor[Any], number: int, states: Iterable[State]) -> None:
    _copy(cursor, _STAGE_RECORDS, ["int4", *_STATE_TYPES], ((number, *state) for state in states))


def _copy(cursor: psycopg.Cursor[Any], statement: str, types: list[str], rows: Iterable[tuple[Any, ...]]) -> None:
    with cursor.copy(statement.encode()) as copy:
        copy.set_types(types)
        for row in rows:
            copy.write_row(row)


def _lock_and_read(cursor: psycopg.Cursor[Any], eval_ids: list[str]) -> dict[str, list[Fact]]:
    """Lock existing records, and read the log of each: in a later statement than the one that locked them, which therefore sees
    what other workers committed before they let go."""
    if cursor.execute(_LOCK, [eval_ids]).rowcount != len(eval_ids):
        # Its events would be in the log, and of no record.
        raise DatabaseOutage("an evaluation was deleted between finding and locking it")
    logged: dict[str, list[Fact]] = {eval_id: [] for eval_id in eval_ids}
    for row in cursor.execute(_READ_LOG, [eval_ids]):
        logged[row[0]].append(Fact(*row))
    return logged


def _log(cursor: psycopg.Cursor[Any], facts: list[Fact]) -> None:
    """Write events to the log, and content that is large or an object to rows of its own."""
    contents: list[tuple[Any, ...]] = []
    _copy(cursor, _LOG, _FACT_TYPES, (_without_large(one, contents) for one in facts))
    if contents:
        _copy(cursor, _LOG_CONTENTS, _CONTENT_TYPES, contents)


def _without_large(one: Fact, contents: list[tuple[Any, ...]]) -> Fact:
    """`one` without content that is large or an object; rows for that are added to `contents`."""
    large = [
        (kind, data)
        for kind, data in zip(_CONTENTS, _contents(one), strict=True)
        if data is not None and (isinstance(data, Reference) or len(data) > ROW_LIMIT_BYTES)
    ]
    if not large:
        return one
    contents += [(*one[:2], kind, one.occurred_at, *_where(data)) for kind, data in large]
    nothing: dict[str, Any] = dict.fromkeys(kind for kind, _ in large)
    return one._replace(**nothing)


def _where(data: bytes | Reference) -> tuple[Any, ...]:
    """Content as a row of `contents` holds it: size, hash, data, store and encoding."""
    if isinstance(data, Reference):
        return data.size, _digest(data), None, "objects", data.encoding
    return len(data), _digest(data), data, None, None


def _reused(cursor: psycopg.Cursor[Any], facts: list[Fact], repeated: set[int]) -> list[int]:
    """The positions among `repeated` of facts whose body is not the one stored under their event_id."""
    staged = ((position, *_without_large(facts[position], [])) for position in repeated)
    _copy(cursor, _STAGE_EVENTS, ["int4", *_FACT_TYPES], staged)
    stored = {position: same for position, *same in cursor.execute(_COMPARE)}
    return [position for position in repeated if stored[position] != [True, *map(_digest, _contents(facts[position]))]]


def _contents(one: Fact) -> tuple[bytes | Reference | None, ...]:
    return one.code, one.output, one.error


def _digest(data: bytes | Reference | None) -> bytes | None:
    """The SHA-256 of content, by which the same is the same wherever it is."""
    if isinstance(data, Reference):
        return bytes.fromhex(data.sha256)
    return None if data is None else hashlib.sha256(data).digest()


def _conflicting_results(before: list[Fact], new: list[Fact]) -> int:
    """How many of the `new` events end an attempt that another event ended before."""
    endings = [one.attempt for one in new if one.type in ENDINGS]
    if not endings:
        return 0
    before_that = {one.attempt for one in before if one.type in ENDINGS}
    return len(endings) - len(set(endings) - before_that)


def _confirmations(facts: list[Fact], written: _Written, recorded_at: str) -> list[dict[str, Any]]:
    """One for each evaluation that changed."""
    return [
        {
            "type": "storage:evaluation:created" if eval_id in written.created else "storage:evaluation:updated",
            "eval_id": eval_id,
            "version": state.version,
            "status": state.status,
            "event_ids": [facts[position].event_id for position in written.new[eval_id]],
            "recorded_at": recorded_at,
        }
        for eval_id, state in written.states.items()
    ]


def _traces(written: _Written, trace_of: Callable[[int], str | None]) -> str | None:
    """The traces that the confirmations go on in, a line each, in their order; None where there are none."""
    traces = [trace_of(written.new[eval_id][-1]) or "" for eval_id in written.states]
    return "\n".join(traces) if any(traces) else None


# A record `e` beside the events that hold its content (`queued`, `ending`), and the rows of `contents` for what is large.
WITH_CONTENT: Final = """
FROM evaluations e
LEFT JOIN evaluation_events queued ON queued.eval_id = e.eval_id AND queued.event_id = e.code_event_id
LEFT JOIN evaluation_events ending ON ending.eval_id = e.eval_id AND ending.event_id = e.result_event_id
LEFT JOIN contents code ON code.eval_id = e.eval_id AND code.event_id = e.code_event_id AND code.kind = 'code'
LEFT JOIN contents output ON output.eval_id = e.eval_id AND output.event_id = e.result_event_id AND output.kind = 'output'
LEFT JOIN contents error ON error.eval_id = e.eval_id AND error.event_id = e.result_event_id AND error.kind = 'error'
WHERE e.eval_id = %s
"""
_GET: Final = f"""
SELECT {_columns(State._fields, "e.{}")}, e.created_at, e.updated_at,
    coalesce(queued.code, code.data), coalesce(ending.output, output.data), coalesce(ending.error, error.data),
    {_columns(_CONTENTS, "{0}.size, {0}.sha256, {0}.store, {0}.encoding")}
{WITH_CONTENT}
"""


def get(conn: Connection, eval_id: str, stores: Stores | None = None) -> Record | None:
    """The record with all its content in memory, or None. Without `stores`, of what is an object the reference.

    Raises DatabaseOutage, ObjectStoreOutage (retry), ObjectMissing, ObjectDamaged.
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        row = cursor.execute(_GET, [eval_id]).fetchone()
    if row is None:
        return None
    state, (created_at, updated_at, *data) = State(*row[: len(State._fields)]), row[len(State._fields) : -12]
    found = record(state, *(_whole(conn, state, stores, at, data[at], row[at * 4 - 12 :]) for at in range(3)))
    return found.model_copy(update={"created_at": created_at, "updated_at": updated_at})


def _whole(
    conn: Connection, state: State, stores: Stores | None, at: int, data: bytes | None, columns: Sequence[Any]
) -> bytes | Reference | None:
    size, sha256, store, encoding = columns[:4]
    event_id = state.result_event_id if at else state.code_event_id
    if store is None or event_id is None:
        return data
    content = Content(state.eval_id, event_id, _CONTENTS[at], size, b"", sha256, 0, store, encoding)
    return content.reference if stores is None else b"".join(contents.read(lambda: nullcontext(conn), stores, content))


_APPLIED: Final = """
SELECT e.eval_id, e.event_id FROM unnest(%s::text[], %s::uuid[]) AS wanted (eval_id, event_id)
JOIN evaluation_events e ON e.eval_id = wanted.eval_id AND e.event_id = wanted.event_id
"""


def applied(conn: Connection, keys: Sequence[tuple[str, UUID]]) -> set[tuple[str, UUID]]:
    """Those of `keys` (eval_id, event_id) that are in the event log. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        cursor.execute(_APPLIED, [[eval_id for eval_id, _ in keys], [event_id for _, event_id in keys]])
        return set(cursor.fetchall())


_THERE: Final = "SELECT eval_id FROM evaluations WHERE eval_id = ANY(%s::text[])"


def locked(conn: Connection, eval_ids: Sequence[str]) -> set[str]:
    """Those of these evaluations whose record somebody else keeps locked at this moment. Waits for nobody.

    Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        there = {eval_id for (eval_id,) in cursor.execute(_THERE, [eval_ids])}
        return there - {eval_id for (eval_id,) in cursor.execute(_THERE + " FOR NO KEY UPDATE SKIP LOCKED", [eval_ids])}


_COUNT: Final = "SELECT status, count(*) FROM evaluations GROUP BY status"


def count_by_status(conn: Connection) -> dict[str, int]:
    """How many evaluations there are, by status. Reads every record. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        return dict(cursor.execute(_COUNT).fetchall())
