"""Records computed again from the event log: compared with what is stored, and repaired where they differ."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec
import psycopg
from psycopg import Cursor
from sqlalchemy import Connection

from evalstore.storage import database, event_store, event_writer, operator_actions, rebuild
from evalstore.storage.event_writer import StoredRecord
from evalstore.storage.operator_actions import Intent
from evalstore.storage.row_statements import RECORD, columns
from models.fold import Folded
from models.record import RecordRow

CHUNK: Final = 500
MAX_DIFFERENCES: Final = 1000
# Of metadata as it is stored, which may be compressed.
_CHUNK_BYTES: Final = 4 * 1024 * 1024
# A snapshot that lives long keeps VACUUM from removing rows.
_CHUNK_EVENTS: Final = 50_000


class Selection(NamedTuple):
    """A choice of records: they fulfil all conditions that are not None. `since` and `until` are about `created_at`.

    `last` is the greatest `eval_id`.
    """

    eval_ids: tuple[str, ...] | None = None
    run_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    last: str | None = None

    def words(self) -> dict[str, Any]:
        """Return the conditions as an operator gave them, for JSON; `{"all": True}` without conditions."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        return {
            name: value.isoformat() if isinstance(value, datetime) else list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
        } or {"all": True}

    @classmethod
    def of(cls, words: Mapping[str, Any]) -> "Selection":
        """Return the selection with these `words`."""
        since, until = (datetime.fromisoformat(words[name]) if name in words else None for name in ("since", "until"))
        return cls(tuple(words["eval_ids"]) if "eval_ids" in words else None, words.get("run_id"), since, until)


class Difference(NamedTuple):
    """A column whose value is not what the events give. `replayed` is None also where the log holds no event."""

    eval_id: str
    field: str
    stored: Any
    replayed: Any


class Compared(NamedTuple):
    """The records that were compared: how many, the last one's `eval_id`, and the differences by `eval_id`."""

    evaluations: int
    last: str
    different: dict[str, list[Difference]]


_TESTS: Final = {
    "eval_ids": "eval_id = ANY(%s::text[])",
    "run_id": "run_id = %s",
    "since": "created_at >= %s",
    "until": "created_at < %s",
    "last": "eval_id <= %s",
}


def _where(chosen: Selection) -> tuple[str, list[Any]]:
    given = {name: value for name, value in chosen._asdict().items() if value is not None}
    values = [list(value) if isinstance(value, tuple) else value for value in given.values()]
    return " AND ".join(["eval_id > %s", *(_TESTS[name] for name in given)]), values


def count(conn: Connection, chosen: Selection, after: str = "") -> int:
    """Return how many records are chosen; an estimate where all are. Raises DatabaseOutage (retry)."""
    condition, values = _where(chosen)
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        if not values and not after:
            query = "SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = 'evaluations'::regclass"
            return int(cursor.execute(query).fetchall()[0][0])
        return int(cursor.execute(f"SELECT count(*) FROM evaluations WHERE {condition}", [after, *values]).fetchall()[0][0])


def last_id(conn: Connection) -> str:
    """Return the greatest `eval_id`: a replay of all records must not follow the records that are created meanwhile.

    Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        return str(cursor.execute("SELECT coalesce(max(eval_id), '') FROM evaluations").fetchall()[0][0])


def compare(
    conn: Connection,
    chosen: Selection,
    after: str = "",
    limit: int = CHUNK,
    progress: Callable[[], object] = lambda: None,
) -> Compared | None:
    """Compare the next of the chosen records after the `eval_id` `after`. Return None if there is none.

    One snapshot shows records and logs of the same moment, so no lock is needed. `progress` is called after each page of the
    log. Raises DatabaseOutage (retry).
    """
    with database.snapshot(conn) as raw, raw.cursor(binary=True) as cursor:
        found = _next(cursor, chosen, after, min(limit, CHUNK))
        if not found:
            return None
        logs = rebuild.fold_logs(raw, {eval_id: one.record.version for eval_id, one in found.items()}, progress)
    differences = {eval_id: _differences(one, logs.get(eval_id)) for eval_id, one in found.items()}
    return Compared(len(found), max(found), {eval_id: some for eval_id, some in differences.items() if some})


def _next(cursor: Cursor[Any], chosen: Selection, after: str, limit: int) -> dict[str, StoredRecord]:
    condition, values = _where(chosen)
    query = f"""
SELECT {columns(RECORD)} FROM (
    SELECT {columns(RECORD)}, sum(pg_column_size(metadata)) OVER (ORDER BY eval_id) - pg_column_size(metadata) AS bytes_before,
        sum(version::bigint) OVER (ORDER BY eval_id) - version AS events_before
    FROM (SELECT {columns(RECORD)} FROM evaluations WHERE {condition} ORDER BY eval_id LIMIT %s) chosen
) sized WHERE bytes_before < {_CHUNK_BYTES} AND events_before < {_CHUNK_EVENTS}
"""
    return event_writer.records([cursor.execute(query.encode(), [after, *values, limit])])


def _differences(stored: StoredRecord, replayed: Folded | None) -> list[Difference]:
    record, eval_id = stored.record, stored.record.eval_id
    if replayed is None:
        return [Difference(eval_id, "version", record.version, None)]
    found = [
        Difference(eval_id, name, value, other)
        for name, value, other in zip(RecordRow._fields, record, replayed.record, strict=True)
        if value != other or (name == "metadata" and value and _exact(value) != _exact(other))
    ]
    # Workers of releases before merge states leave an older one or none, which the next event mends.
    if stored.merge_state is None or stored.merge_version is None:
        is_left_behind = stored.merge_state is None and stored.merge_version is None
    else:
        is_left_behind = 1 <= stored.merge_version < record.version
    if not is_left_behind:
        if stored.merge_version != replayed.record.version:
            found.append(Difference(eval_id, "merge_version", stored.merge_version, replayed.record.version))
        if stored.merge_state != replayed.merge_state:
            found.append(Difference(eval_id, "merge_state", _hex(stored.merge_state), _hex(replayed.merge_state)))
    return found


def _exact(metadata: dict[str, Any]) -> bytes:
    """Tell apart 1, 1.0 and true, which are equal in Python."""
    return msgspec.json.encode(metadata, order="deterministic")


def _hex(data: bytes | None) -> str | None:
    return None if data is None else data.hex()


def repair(
    conn: Connection,
    eval_id: str,
    intent: Intent,
    in_transaction: Callable[[psycopg.Connection[Any], Sequence[Difference]], object] = lambda *_: None,
    progress: Callable[[], object] = lambda: None,
) -> Sequence[Difference] | None:
    """Repair a record from its events, under the record's lock. Commit.

    Write a confirmation and an operator's action. `in_transaction` is called with a repaired record's differences, before the
    commit, and `progress` after each page of the log. Return the differences, which may be gone since the comparison. Return
    None if the log holds no event of the evaluation. Raises DatabaseOutage (retry).
    """
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        stored = event_writer.records(event_writer.lock(raw, [eval_id])).get(eval_id)
        if stored is None:
            return []
        replayed = rebuild.fold_logs(raw, {eval_id: stored.record.version}, progress).get(eval_id)
        differences = _differences(stored, replayed)
        if replayed is None:
            return None
        if differences:
            event_writer.update(raw, replayed)
            raw.execute("UPDATE evaluations SET repairs = repairs + 1 WHERE eval_id = %s", [eval_id])
            event_store.confirm_change(raw, "storage:evaluation:repaired", replayed.record)
            details = {"eval_id": eval_id, "fields": [one.field for one in differences]}
            with raw.cursor() as cursor:
                operator_actions.write(cursor, intent, 1, details=details)
            in_transaction(raw, differences)
        return differences
