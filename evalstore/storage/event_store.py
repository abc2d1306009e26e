"""Storing and reading evaluations. Every event, whichever way it came, is written by `store`."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

import msgspec
import psycopg
from sqlalchemy import Connection

from evalstore.objects.object_store import Stores
from evalstore.storage import content_reader, database, event_writer, rebuild
from evalstore.storage.content_reader import Content
from evalstore.storage.event_writer import Restart, StoredRecord
from models.content import Reference
from models.errors import DatabaseOutage
from models.events import Event
from models.fold import Folded, fold
from models.metrics import RebuildReason
from models.record import EventRow, Record, RecordRow, demote, record, rfc3339, to_row

# Content up to this size is part of its event's row, larger content has a row of its own in `contents`.
ROW_LIMIT_BYTES: Final = 4096

# A transaction begins again each time that another one created a record of its evaluations at the same moment.
TRIES: Final = 100
RESTARTED_TOO_OFTEN: Final = f"other transactions made this one begin again {TRIES} times"

Outcome = Literal["applied", "duplicate", "reused", "erased"]


class Confirmation(msgspec.Struct, gc=False):
    """What other services are told of an evaluation that a commit changed, in the order in which it is written."""

    type: Literal[
        "storage:evaluation:created", "storage:evaluation:updated", "storage:evaluation:erased", "storage:evaluation:repaired"
    ]
    eval_id: str
    version: int
    status: str
    run_id: str | msgspec.UnsetType
    event_ids: list[UUID]
    recorded_at: str


_ENCODER: Final = msgspec.json.Encoder()


@dataclass(frozen=True)
class Stored:
    """What became of a call's events: `outcomes` in their order, and the confirmations written to the outbox.

    `rebuilt`: why records were made anew from the event log.
    `written_at`: when there was nothing left to do but to commit, on the clock of `time.perf_counter`.
    """

    outcomes: list[Outcome]
    confirmations: list[Confirmation] = field(default_factory=list)
    conflicting_results: int = 0
    rebuilt: Counter[RebuildReason] = field(default_factory=Counter)
    written_at: float = field(default=0.0, compare=False)


def confirm_change(
    conn: psycopg.Connection[Any],
    type_: Literal["storage:evaluation:erased", "storage:evaluation:repaired"],
    record: RecordRow,
) -> None:
    """Write the confirmation of a change without an event to the outbox. The caller holds the record's lock, and commits."""
    ((now,),) = conn.cursor(binary=True).execute("SELECT now()").fetchall()
    run_id = msgspec.UNSET if record.run_id is None else record.run_id
    told = Confirmation(type_, record.eval_id, record.version, record.status, run_id, [], rfc3339(now))
    event_writer.confirm(conn, [1, _ENCODER.encode(told).decode(), None])


def store(
    conn: Connection,
    events: Sequence[Event | EventRow],
    traces_of: Callable[[Sequence[int]], list[str]] | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Stored:
    """Write `events` to the log, the records and the outbox, in one transaction that is committed when this returns.

    An event that is already stored is a `duplicate`; one whose `event_id` is stored with another body is `reused` and
    changes nothing; one of an evaluation that was erased is `erased`, and is not stored. Any number of callers may store
    events of the same evaluations at once: all lock the records that exist in the order of `eval_id`, and then create the
    others in that order, so that none waits for another in a circle. `traces_of` gives the traces of events by their
    positions, as a `traceparent` each or nothing; each confirmation goes on in that of the last event it tells of.
    `progress` is called while a record is made anew from a long log.

    Raises DatabaseOutage (nothing is stored, or all of it where only the answer was lost: call again).
    """
    rebuilt = Counter[RebuildReason]()
    for _ in range(TRIES):
        try:
            stored = store_once(conn, events, traces_of)
        except Restart as restart:
            rebuilt += after_restart(conn, restart, progress)
        else:
            return replace(stored, rebuilt=stored.rebuilt + rebuilt) if rebuilt else stored
    raise DatabaseOutage(RESTARTED_TOO_OFTEN)


def after_restart(conn: Connection, restart: Restart, progress: Callable[[], object] = lambda: None) -> Counter[RebuildReason]:
    """Prepare another try of a transaction that raised `restart`; returns why records were rebuilt. Commits.

    Raises DatabaseOutage (retry).
    """
    return Counter(reason for eval_id in restart.to_rebuild if (reason := rebuild.rebuild(conn, eval_id, progress)))


def store_once(
    conn: Connection, events: Sequence[Event | EventRow], traces_of: Callable[[Sequence[int]], list[str]] | None = None
) -> Stored:
    """As `store`, within a transaction that the caller may have begun. Raises Restart after it rolled that back."""
    if not events:
        return Stored([])
    facts = [event if isinstance(event, EventRow) else to_row(event) for event in events]
    outcomes: list[Outcome] = ["duplicate"] * len(facts)
    with (
        database.errors(),
        _restart_after_deadlock(),
        conn.begin(),
        event_writer.writing(database.driver(conn), conn.connection.info, facts) as way,
    ):
        written = _write(way, facts)
        confirmations = _confirmations(facts, written, way.recorded_at())
        if confirmations:
            body = _ENCODER.encode_lines(confirmations)[:-1].decode()
            way.confirm([len(confirmations), body, traces_of and _traces(written, traces_of)])
        written_at = time.perf_counter()
    way.committed()
    for positions in written.new.values():
        for position in positions:
            outcomes[position] = "applied"
    for position in written.reused:
        outcomes[position] = "reused"
    if written.erased:
        outcomes = [
            "erased" if one.eval_id in written.erased else outcome for one, outcome in zip(facts, outcomes, strict=True)
        ]
    conflicting_results = sum([one.conflicting_results for one in written.records.values()])
    return Stored(outcomes, confirmations, conflicting_results, written.rebuilt, written_at)


@contextmanager
def _restart_after_deadlock() -> Iterator[None]:
    """Workers of releases before merge states create records before they lock others, so these and ours may deadlock."""
    try:
        yield
    except psycopg.errors.DeadlockDetected as error:
        raise Restart("PostgreSQL ended a deadlock") from error


class _Written(NamedTuple):
    """What was written: the positions of an evaluation's new events, those of reused ones, and the records made or changed."""

    new: dict[str, list[int]]
    reused: list[int]
    created: Collection[str]
    records: dict[str, Folded]
    rebuilt: Counter[RebuildReason]
    erased: set[str]


def _write(way: "event_writer.Few | event_writer.Many", facts: list[EventRow]) -> _Written:
    """Write `facts` to the log and the records. Of those with one event_id the first stands, unless one is stored already."""
    firsts: dict[str, dict[UUID, int]] = {}
    for position, one in enumerate(facts):
        firsts.setdefault(one.eval_id, {}).setdefault(one.event_id, position)
    new = {eval_id: list(firsts[eval_id].values()) for eval_id in sorted(firsts)}
    begun = way.begin({eval_id: [facts[at] for at in positions] for eval_id, positions in new.items()})
    for eval_id in begun.erased:
        del new[eval_id]
    for eval_id in {eval_id for eval_id, _ in begun.logged}:
        new[eval_id] = [at for event_id, at in firsts[eval_id].items() if (eval_id, event_id) not in begun.logged]
        if not new[eval_id]:
            del new[eval_id]
    added = {eval_id: [facts[at] for at in new[eval_id]] for eval_id in begun.existing if eval_id in new}
    changed, rebuilt = _fold(way.conn, begun.existing, added)
    applied = [position for positions in new.values() for position in positions]
    # None of these is in the log: an evaluation created here had no events, and the others' are known, and locked.
    if applied:
        contents: list[tuple[Any, ...]] = []
        way.log([_without_large(facts[position], contents) for position in applied], contents)
    if changed:
        way.update(list(changed.values()))
    repeated = set(range(len(facts))).difference(applied) if len(applied) < len(facts) else set()
    repeated -= {position for position in repeated if facts[position].eval_id in begun.erased}
    reused = _reused(way, facts, repeated) if repeated else []
    records = begun.created | changed
    return _Written(new, reused, begun.created, {eval_id: records[eval_id] for eval_id in new}, rebuilt, begun.erased)


def _fold(
    conn: psycopg.Connection[Any], existing: dict[str, StoredRecord], added: dict[str, list[EventRow]]
) -> tuple[dict[str, Folded], Counter[RebuildReason]]:
    """Add events to records that exist; returns these, and why some were made anew from the log. Raises Restart."""
    folded: dict[str, Folded] = {}
    reasons: dict[str, RebuildReason] = {}
    for eval_id, events in added.items():
        result = existing[eval_id].add(events)
        if isinstance(result, Folded):
            folded[eval_id] = result
        else:
            reasons[eval_id] = result
    if not reasons:
        return folded, Counter()
    versions = {eval_id: existing[eval_id].record.version for eval_id in reasons}
    if long := [eval_id for eval_id, version in versions.items() if version > rebuild.PAGE]:
        raise Restart("records with long logs are to be made anew", long)
    logs = rebuild.fold_logs(conn, versions)
    folded |= {eval_id: fold(logs.get(eval_id), added[eval_id]) for eval_id in reasons}
    return {eval_id: folded[eval_id] for eval_id in added}, Counter(reasons.values())


def _without_large(one: EventRow, contents: list[tuple[Any, ...]]) -> EventRow:
    """`one` without content that is large or an object; rows for that are added to `contents`."""
    large = [
        (kind, data)
        for kind, data in zip(event_writer.CONTENTS, _contents(one), strict=True)
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


def _reused(way: "event_writer.Few | event_writer.Many", facts: list[EventRow], repeated: set[int]) -> list[int]:
    """The positions among `repeated` of facts whose body is not the one stored under their event_id."""
    rows = {position: _without_large(facts[position], []) for position in repeated}
    same = {position: [True, *map(_digest, _contents(facts[position]))] for position in repeated}
    stored = way.compare(rows)
    different = [position for position in repeated if stored[position][:-1] != same[position]]
    # An older worker kept fields that it does not know in `extra`: compare with the event as that worker stores it.
    older = {~position: row for position in different if (row := demote(rows[position], stored[position][-1]))}
    if older:
        stored = way.compare(older)
        different = [position for position in different if ~position not in older or stored[~position][:-1] != same[position]]
    return different


def _contents(one: EventRow) -> tuple[bytes | Reference | None, ...]:
    return one.code, one.output, one.error


def _digest(data: bytes | Reference | None) -> bytes | None:
    """The SHA-256 of content, by which the same is the same wherever it is."""
    if isinstance(data, Reference):
        return bytes.fromhex(data.sha256)
    return None if data is None else hashlib.sha256(data).digest()


def _confirmations(facts: list[EventRow], written: _Written, recorded_at: str) -> list[Confirmation]:
    """One for each evaluation that changed."""
    return [
        Confirmation(
            "storage:evaluation:created" if eval_id in written.created else "storage:evaluation:updated",
            eval_id,
            folded.record.version,
            folded.record.status,
            msgspec.UNSET if folded.record.run_id is None else folded.record.run_id,
            [facts[position].event_id for position in written.new[eval_id]],
            recorded_at,
        )
        for eval_id, folded in written.records.items()
    ]


def _traces(written: _Written, traces_of: Callable[[Sequence[int]], list[str]]) -> str | None:
    """The traces that the confirmations go on in, a line each, in their order; None where there are none."""
    traces = traces_of([written.new[eval_id][-1] for eval_id in written.records])
    return "\n".join(traces) if any(traces) else None


# Join a record `e` with the events that hold its content (`queued`, `ending`), and the rows of `contents` for what is large.
CONTENT_JOINS: Final = """
LEFT JOIN evaluation_events queued ON queued.eval_id = e.eval_id AND queued.event_id = e.code_event_id
LEFT JOIN evaluation_events ending ON ending.eval_id = e.eval_id AND ending.event_id = e.result_event_id
LEFT JOIN contents code ON code.eval_id = e.eval_id AND code.event_id = e.code_event_id AND code.kind = 'code'
LEFT JOIN contents output ON output.eval_id = e.eval_id AND output.event_id = e.result_event_id AND output.kind = 'output'
LEFT JOIN contents error ON error.eval_id = e.eval_id AND error.event_id = e.result_event_id AND error.kind = 'error'
"""
WITH_CONTENT: Final = f"FROM evaluations e {CONTENT_JOINS} WHERE e.eval_id = %s"
_GET: Final = f"""
SELECT {event_writer.columns(RecordRow._fields, "e.{}")}, e.created_at, e.updated_at,
    coalesce(queued.code, code.data), coalesce(ending.output, output.data), coalesce(ending.error, error.data),
    {event_writer.columns(event_writer.CONTENTS, "{0}.size, {0}.sha256, {0}.store, {0}.encoding")}
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
    state, (created_at, updated_at, *data) = RecordRow(*row[: len(RecordRow._fields)]), row[len(RecordRow._fields) : -12]
    found = record(state, *(_whole(conn, state, stores, at, data[at], row[at * 4 - 12 :]) for at in range(3)))
    return found.model_copy(update={"created_at": created_at, "updated_at": updated_at})


def _whole(
    conn: Connection, state: RecordRow, stores: Stores | None, at: int, data: bytes | None, columns: Sequence[Any]
) -> bytes | Reference | None:
    size, sha256, store, encoding = columns[:4]
    event_id = state.result_event_id if at else state.code_event_id
    if store is None or event_id is None:
        return data
    content = Content(state.eval_id, event_id, event_writer.CONTENTS[at], size, b"", sha256, 0, store, encoding)
    return content.reference if stores is None else b"".join(content_reader.read(lambda: nullcontext(conn), stores, content))


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
