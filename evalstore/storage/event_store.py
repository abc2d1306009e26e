"""Store and read evaluations. All events, from every source, are written by `store_once`."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

import msgspec
import psycopg
from sqlalchemy import Connection

from evalstore.objects.object_store import Stores
from evalstore.storage import content_reader, database, event_writer, rebuild, sessions
from evalstore.storage.content_reader import Content
from evalstore.storage.event_writer import BeginResult, Restart, StoredRecord
from evalstore.storage.row_statements import columns
from evalstore.storage.visibility import EVERYTHING, Hidden, Visibility
from models.content import Reference
from models.errors import DatabaseOutage
from models.events import Event
from models.fold import Folded, fold
from models.metrics import RebuildReason
from models.record import EventRow, Record, RecordRow, demote, record, rfc3339, to_row

# Content up to this size is stored in its event's row. Larger content has its own row in `contents`.
ROW_LIMIT_BYTES: Final = 4096

# A transaction restarts if another transaction creates one of its records at the same time.
TRIES: Final = 100
RESTARTED_TOO_OFTEN: Final = f"restarted {TRIES} times because of other transactions"

Outcome = Literal["applied", "duplicate", "reused", "erased"]


class Confirmation(msgspec.Struct, gc=False):
    """The notice to other services that a commit changed an evaluation. Fields are in the order in which they are result."""

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
    """The result of a call: an outcome for each event, in order, and the confirmations written to the outbox.

    `rebuilt` counts why records were rebuilt from the event log. `written_at` is the time just before the commit, on the clock
    of `time.perf_counter`.
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
    visibility: Visibility = EVERYTHING,
    enrichments: Mapping[int, dict[str, Any]] | None = None,
) -> Stored:
    """Write `events` to the log, the records and the outbox, in one transaction. Commit.

    An event that is already stored is a `duplicate`. An event whose `event_id` is stored with another body is `reused` and
    changes nothing. An event of an erased evaluation is `erased` and is not stored. Any number of callers may store events of
    the same evaluations at once. All callers lock existing records by `eval_id` and then create missing records by `eval_id`,
    so they cannot deadlock.

    `traces_of` maps positions of events to their `traceparent`s, empty for none. A confirmation continues the trace of the last
    event that it confirms. `progress` is called while a record is rebuilt from a long log. `visibility` is that of the caller:
    each record has to be visible before the change and after it. `enrichments` maps positions of events to objects, which are
    kept beside the records if the events are applied.

    Raises Hidden (nothing is stored). Raises DatabaseOutage: nothing is stored, or everything if only the reply was lost. Call
    again.
    """
    rebuilt = Counter[RebuildReason]()
    for _ in range(TRIES):
        try:
            stored = store_once(conn, events, traces_of, visibility, enrichments)
        except Restart as restart:
            rebuilt += after_restart(conn, restart, progress)
        else:
            return replace(stored, rebuilt=stored.rebuilt + rebuilt) if rebuilt else stored
    raise DatabaseOutage(RESTARTED_TOO_OFTEN)


def after_restart(conn: Connection, restart: Restart, progress: Callable[[], object] = lambda: None) -> Counter[RebuildReason]:
    """Prepare another attempt after a transaction raised `restart`. Return why records were rebuilt. Commit.

    Raises DatabaseOutage (retry).
    """
    return Counter(reason for eval_id in restart.to_rebuild if (reason := rebuild.rebuild(conn, eval_id, progress)))


def store_once(
    conn: Connection,
    events: Sequence[Event | EventRow],
    traces_of: Callable[[Sequence[int]], list[str]] | None = None,
    visibility: Visibility = EVERYTHING,
    enrichments: Mapping[int, dict[str, Any]] | None = None,
) -> Stored:
    """Do as `store` does, once. The caller may have begun the transaction. Raises Restart, Hidden after a rollback."""
    if not events:
        return Stored([])
    rows = [event if isinstance(event, EventRow) else to_row(event) for event in events]
    outcomes: list[Outcome] = ["duplicate"] * len(rows)
    with (
        database.errors(),
        _restart_after_deadlock(),
        conn.begin(),
        event_writer.open_writer(database.driver(conn), conn.connection.info, rows) as writer,
    ):
        plan = _begin(writer, rows, visibility)
        if enrichments:
            _enrich(writer, plan, enrichments)
        confirmations = _confirmations(rows, plan, writer.recorded_at())
        if confirmations:
            body = _ENCODER.encode_lines(confirmations)[:-1].decode()
            contents: list[tuple[Any, ...]] = []
            logged = [_without_large(rows[at], contents) for positions in plan.new.values() for at in positions]
            writer.write(logged, contents, plan.changed, [len(confirmations), body, traces_of and _traces(plan, traces_of)])
        reused = _reused(writer, rows, plan.repeated) if plan.repeated else []
        written_at = time.perf_counter()
    writer.after_commit()
    for positions in plan.new.values():
        for position in positions:
            outcomes[position] = "applied"
    for position in reused:
        outcomes[position] = "reused"
    if plan.erased:
        outcomes = ["erased" if row.eval_id in plan.erased else outcome for row, outcome in zip(rows, outcomes, strict=True)]
    conflicting_results = sum([folded.conflicting_results for folded in plan.records.values()])
    return Stored(outcomes, confirmations, conflicting_results, plan.rebuilt, written_at)


def _enrich(
    writer: "event_writer.PipelineWriter | event_writer.CopyWriter",
    plan: "_Plan",
    enrichments: Mapping[int, dict[str, Any]],
) -> None:
    """Keep the enrichments of new events beside their records. Those of repeats are dropped."""
    added: dict[str, dict[str, Any]] = {}
    for eval_id, positions in plan.new.items():
        for position in positions:
            if enrichment := enrichments.get(position):
                added[eval_id] = added.get(eval_id, {}) | enrichment
    if added:
        writer.enrich(added)


@contextmanager
def _restart_after_deadlock() -> Iterator[None]:
    """Translate a deadlock into Restart.

    Workers of older releases create records before they lock others, so deadlocks can happen.
    """
    try:
        yield
    except psycopg.errors.DeadlockDetected as error:
        raise Restart("PostgreSQL ended a deadlock") from error


class _Plan(NamedTuple):
    """The work of a transaction: the positions of new events by evaluation, those of repeats, and the records to write.

    `records` are all created and changed records. `erased` are evaluations whose events are not stored.
    """

    new: dict[str, list[int]]
    repeated: set[int]
    created: Collection[str]
    changed: Collection[Folded]
    records: dict[str, Folded]
    rebuilt: Counter[RebuildReason]
    erased: set[str]


def _begin(
    writer: "event_writer.PipelineWriter | event_writer.CopyWriter", rows: list[EventRow], visibility: Visibility
) -> _Plan:
    """Lock and create records, and find the work for `rows`. Raises Hidden.

    Of rows with the same event_id keep the first, unless one is already stored. None of the new events is in the log: new
    evaluations have no events, and the writer looked up the others under their locks.
    """
    by_id: dict[str, dict[UUID, int]] = {}
    for position, row in enumerate(rows):
        by_id.setdefault(row.eval_id, {}).setdefault(row.event_id, position)
    new = {eval_id: list(by_id[eval_id].values()) for eval_id in sorted(by_id)}
    begin_result = writer.begin({eval_id: [rows[at] for at in positions] for eval_id, positions in new.items()})
    if visibility.is_restricted:
        _refuse_hidden(begin_result, rows, visibility)
    for eval_id in begin_result.erased:
        del new[eval_id]
    for eval_id in {eval_id for eval_id, _ in begin_result.logged}:
        new[eval_id] = [at for event_id, at in by_id[eval_id].items() if (eval_id, event_id) not in begin_result.logged]
        if not new[eval_id]:
            del new[eval_id]
    added = {eval_id: [rows[at] for at in new[eval_id]] for eval_id in begin_result.existing if eval_id in new}
    changed, rebuilt = _fold(writer.conn, begin_result.existing, added)
    applied = sum(map(len, new.values()))
    repeated = set(range(len(rows))).difference(*new.values()) if applied < len(rows) else set()
    repeated -= {position for position in repeated if rows[position].eval_id in begin_result.erased}
    records = begin_result.created | changed
    return _Plan(
        new,
        repeated,
        begin_result.created,
        changed.values(),
        {eval_id: records[eval_id] for eval_id in new},
        rebuilt,
        begin_result.erased,
    )


def _refuse_hidden(begun: BeginResult, rows: list[EventRow], visibility: Visibility) -> None:
    """Raise Hidden if an evaluation is not visible, was erased, or would be created or moved so that it is not visible.

    The caller holds the locks of all of them, so no other transaction changes what is visible before the commit.
    """
    existing = {eval_id: stored.record for eval_id, stored in begun.existing.items()}
    created = {eval_id: folded.record for eval_id, folded in begun.created.items()}
    hidden = begun.erased | {
        eval_id for eval_id, record in (existing | created).items() if not visibility.allows(record.submitter, record.run_id)
    }
    foreign = {
        row.eval_id for row in rows if row.type == "evaluation:queued" and not visibility.allows(row.submitter, row.run_id)
    }
    if hidden or foreign:
        raise Hidden(frozenset(hidden | foreign), frozenset(foreign - begun.erased - (existing.keys() & hidden)))


def _fold(
    conn: psycopg.Connection[Any], existing: dict[str, StoredRecord], added: dict[str, list[EventRow]]
) -> tuple[dict[str, Folded], Counter[RebuildReason]]:
    """Add events to existing records. Return the records, and why some were rebuilt from the log. Raises Restart."""
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
        raise Restart("rebuild the records with long logs first", long)
    logs = rebuild.fold_logs(conn, versions)
    folded |= {eval_id: fold(logs.get(eval_id), added[eval_id]) for eval_id in reasons}
    return {eval_id: folded[eval_id] for eval_id in added}, Counter(reasons.values())


def _without_large(row: EventRow, contents: list[tuple[Any, ...]]) -> EventRow:
    """Return `row` without content that is large or in an object. Append rows for that content to `contents`."""
    for data in row[_CONTENTS]:
        if data is not None and (isinstance(data, Reference) or len(data) > ROW_LIMIT_BYTES):
            break
    else:
        return row
    large = {
        kind: data
        for kind, data in zip(event_writer.CONTENTS, row[_CONTENTS], strict=True)
        if data is not None and (isinstance(data, Reference) or len(data) > ROW_LIMIT_BYTES)
    }
    contents += [(*row[:2], kind, row.occurred_at, *_where(data)) for kind, data in large.items()]
    empty: dict[str, Any] = dict.fromkeys(large)
    return row._replace(**empty)


_FIRST_CONTENT: Final = EventRow._fields.index(event_writer.CONTENTS[0])
_CONTENTS: Final = slice(_FIRST_CONTENT, _FIRST_CONTENT + len(event_writer.CONTENTS))


def _where(data: bytes | Reference) -> tuple[Any, ...]:
    """Return the columns of `contents` for this content: size, hash, data, store and encoding."""
    if isinstance(data, Reference):
        return data.size, _digest(data), None, "objects", data.encoding
    return len(data), _digest(data), data, None, None


def _reused(
    writer: "event_writer.PipelineWriter | event_writer.CopyWriter", rows: list[EventRow], repeated: set[int]
) -> list[int]:
    """Return those of the positions `repeated` whose body differs from the body stored under the same event_id."""
    small = {position: _without_large(rows[position], []) for position in repeated}
    same = {position: [True, *map(_digest, rows[position][_CONTENTS])] for position in repeated}
    stored = writer.compare(small)
    different = [position for position in repeated if stored[position][:-1] != same[position]]
    # An older worker stored fields that it does not know in `extra`: compare with the event as that worker stores it.
    older = {~position: row for position in different if (row := demote(small[position], stored[position][-1]))}
    if older:
        stored = writer.compare(older)
        different = [position for position in different if ~position not in older or stored[~position][:-1] != same[position]]
    return different


def _digest(data: bytes | Reference | None) -> bytes | None:
    """Return the SHA-256 of content, which is the same inline and in an object."""
    if isinstance(data, Reference):
        return bytes.fromhex(data.sha256)
    return None if data is None else hashlib.sha256(data).digest()


def _confirmations(rows: list[EventRow], plan: _Plan, recorded_at: str) -> list[Confirmation]:
    """Build a confirmation for each changed evaluation."""
    return [
        Confirmation(
            "storage:evaluation:created" if eval_id in plan.created else "storage:evaluation:updated",
            eval_id,
            record.version,
            record.status,
            msgspec.UNSET if record.run_id is None else record.run_id,
            [rows[position].event_id for position in plan.new[eval_id]],
            recorded_at,
        )
        for eval_id, (record, *_) in plan.records.items()
    ]


def _traces(plan: _Plan, traces_of: Callable[[Sequence[int]], list[str]]) -> str | None:
    """Return the traces that the confirmations continue, one line each, or None if there are none."""
    traces = traces_of([plan.new[eval_id][-1] for eval_id in plan.records])
    return "\n".join(traces) if any(traces) else None


# Joins a record `e` with the events that hold its content (`queued`, `ending`), and with the rows of `contents` for large
# content.
CONTENT_JOINS: Final = """
LEFT JOIN evaluation_events queued ON queued.eval_id = e.eval_id AND queued.event_id = e.code_event_id
LEFT JOIN evaluation_events ending ON ending.eval_id = e.eval_id AND ending.event_id = e.result_event_id
LEFT JOIN contents code ON code.eval_id = e.eval_id AND code.event_id = e.code_event_id AND code.kind = 'code'
LEFT JOIN contents output ON output.eval_id = e.eval_id AND output.event_id = e.result_event_id AND output.kind = 'output'
LEFT JOIN contents error ON error.eval_id = e.eval_id AND error.event_id = e.result_event_id AND error.kind = 'error'
"""
WITH_CONTENT: Final = f"FROM evaluations e {CONTENT_JOINS} WHERE e.eval_id = %s"
_GET: Final = f"""
SELECT {columns(RecordRow._fields, "e.{}")}, e.created_at, e.updated_at, e.enrichment,
    coalesce(queued.code, code.data), coalesce(ending.output, output.data), coalesce(ending.error, error.data),
    {columns(event_writer.CONTENTS, "{0}.size, {0}.sha256, {0}.store, {0}.encoding")}
{WITH_CONTENT}
"""


def get(conn: Connection, eval_id: str, stores: Stores | None = None) -> Record | None:
    """Return the record with all its content in memory, or None. Without `stores`, return references for content in objects.

    Raises DatabaseOutage, ObjectStoreOutage (retry), ObjectMissing, ObjectDamaged.
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        row = cursor.execute(_GET, [eval_id]).fetchone()
    if row is None:
        return None
    state, (created_at, updated_at, enrichment, *data) = (
        RecordRow(*row[: len(RecordRow._fields)]),
        row[len(RecordRow._fields) : -12],
    )
    view = record(state, *(_whole(conn, state, stores, at, data[at], row[at * 4 - 12 :]) for at in range(3)))
    return view.model_copy(update={"created_at": created_at, "updated_at": updated_at, "enrichment": enrichment})


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
    """Return those of `keys` (eval_id, event_id) that are in the event log. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        cursor.execute(_APPLIED, [[eval_id for eval_id, _ in keys], [event_id for _, event_id in keys]])
        return set(cursor.fetchall())


_EXISTING: Final = "SELECT eval_id FROM evaluations WHERE eval_id = ANY(%s::text[])"
_UNLOCKED: Final = f"{_EXISTING} FOR NO KEY UPDATE SKIP LOCKED"


def locked(conn: Connection, eval_ids: Sequence[str]) -> set[str]:
    """Return those of these evaluations whose record another transaction has locked now. Do not wait for locks.

    Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        existing = {eval_id for (eval_id,) in cursor.execute(_EXISTING, [eval_ids])}
        # Citus refuses to lock several rows in one statement.
        groups = [[eval_id] for eval_id in existing] if sessions.has_citus(database.driver(conn)) else [[*existing]]
        return existing - {eval_id for of in groups for (eval_id,) in cursor.execute(_UNLOCKED, [of])}


_COUNT: Final = "SELECT status, count(*) FROM evaluations GROUP BY status"


def count_by_status(conn: Connection) -> dict[str, int]:
    """Count the evaluations by status. Reads every record. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        return dict(cursor.execute(_COUNT).fetchall())
