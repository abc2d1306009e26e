"""Store for the other sides the rows that evalstore stores, in one transaction for each message.

The transaction has an insert, an upsert that accepts an evaluation's events in any order, and a row in the outbox. Metadata is
merged in order of arrival, and two results of one attempt are not told apart. evalstore's rule costs more than this.
"""

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import Connection, case, func, literal_column
from sqlalchemy.dialects.postgresql import insert

from evalstore.storage.tables import confirmations, evaluation_events, evaluations

if TYPE_CHECKING:  # It needs greenlet, which only the peers' environment has.
    from sqlalchemy.ext.asyncio import AsyncConnection

_STATUS: Final = {"evaluation:queued": "queued", "evaluation:started": "running", "evaluation:completed": "completed"}
_KEPT: Final = (
    *("language", "submitter", "executor_id", "container_id", "timeout_s", "exit_code", "duration_ms", "memory_bytes"),
    *("queued_at", "started_at", "finished_at", "code_event_id", "result_event_id"),
)
_COLUMNS: Final = {column.name for column in evaluation_events.columns}

LOG: Final = insert(evaluation_events).values(dict.fromkeys(_COLUMNS - {"recorded_at"})).on_conflict_do_nothing()


def _upsert() -> Any:
    new = insert(evaluations).values(dict.fromkeys(["eval_id", "status", "attempt", "version", "metadata", *_KEPT]))
    excluded = new.excluded
    is_later = case({"queued": 0, "running": 1}, value=excluded.status, else_=2) > case(
        {"queued": 0, "running": 1}, value=evaluations.c.status, else_=2
    )
    changed: dict[str, Any] = {name: func.coalesce(evaluations.c[name], excluded[name]) for name in _KEPT}
    changed["status"] = case((is_later, excluded.status), else_=evaluations.c.status)
    changed["version"] = evaluations.c.version + 1
    changed["metadata"] = evaluations.c.metadata.concat(excluded.metadata)
    changed["updated_at"] = func.now()
    return new.on_conflict_do_update(index_elements=["eval_id"], set_=changed).returning(
        evaluations.c.version, evaluations.c.status, literal_column("evaluations.xmax = 0")
    )


RECORD: Final = _upsert()
OUTBOX: Final = insert(confirmations)


class Rows(NamedTuple):
    """The values of an event's rows in the log and in the table of records."""

    log: dict[str, Any]
    record: dict[str, Any]


def rows(event: dict[str, Any]) -> Rows:
    """Return the rows of one event."""
    at = datetime.fromisoformat(event["occurred_at"])
    log = dict.fromkeys(_COLUMNS - {"recorded_at"}) | event
    event_id = UUID(event["event_id"])
    log |= {"event_id": event_id, "occurred_at": at, "code": _bytes(event.get("code")), "output": _bytes(event.get("output"))}
    record = {name: event.get(name) for name in _KEPT}
    record |= {"eval_id": event["eval_id"], "status": _STATUS[event["type"]], "attempt": event["attempt"], "version": 1}
    record["metadata"] = event.get("metadata") or {}
    match event["type"]:
        case "evaluation:queued":
            record |= {"queued_at": at, "code_event_id": event_id}
        case "evaluation:started":
            record["started_at"] = at
        case _:
            record |= {"finished_at": at, "result_event_id": event_id}
    return Rows(log, record)


def confirmation(event: dict[str, Any], version: int, status: str, *, created: bool) -> dict[str, Any]:
    """Return the row of the outbox."""
    body = {
        "type": "storage:evaluation:created" if created else "storage:evaluation:updated",
        "eval_id": event["eval_id"],
        "version": version,
        "status": status,
        "event_ids": [event["event_id"]],
    }
    return {"count": 1, "body": msgspec.json.encode(body).decode()}


def store(conn: Connection, event: dict[str, Any]) -> None:
    """Store one event in the caller's transaction."""
    values = rows(event)
    if conn.execute(LOG, values.log).rowcount == 0:
        return
    version, status, created = conn.execute(RECORD, values.record).one()
    conn.execute(OUTBOX, confirmation(event, version, status, created=created))


async def store_async(conn: "AsyncConnection", event: dict[str, Any]) -> None:
    """Do as `store` does, for queues that run on an event loop."""
    values = rows(event)
    if (await conn.execute(LOG, values.log)).rowcount == 0:
        return
    version, status, created = (await conn.execute(RECORD, values.record)).one()
    await conn.execute(OUTBOX, confirmation(event, version, status, created=created))


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode()
