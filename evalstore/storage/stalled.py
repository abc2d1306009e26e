"""Find stalled evaluations: their result should have come by now. No event log is read, so the cost depends on their number."""

from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import NAMESPACE_URL, UUID, uuid5

import psycopg
from sqlalchemy import Connection

from evalstore.storage import database, rebuild
from evalstore.storage.event_writer import StoredRecord
from evalstore.storage.row_statements import RECORD, columns
from models import merge_state
from models.events import EvaluationLost
from models.fold import Folded

# An evaluation is stalled by the time at which this database last changed its record. The event's time is the moment it
# stalled, so every process derives the same event. Senders may send any time limit: a limit beyond the range of an
# interval must not fail the query for all evaluations. A record is never changed before it is created, so that an index by
# creation time bounds the search.
_OVERDUE: Final = f"""
SELECT {columns(RECORD)}, created_at, overdue_at FROM (
    SELECT *, updated_at + make_interval(secs => %(queued_limit_s)s) + make_interval(secs => %(grace_s)s) AS overdue_at
    FROM evaluations
    WHERE status = 'queued' AND created_at < now() - make_interval(secs => %(grace_s)s + %(queued_limit_s)s)
    UNION ALL
    SELECT *, updated_at + make_interval(secs => greatest(least(coalesce(timeout_s, %(running_limit_s)s), 3e9), 0))
        + make_interval(secs => %(grace_s)s)
    FROM evaluations
    WHERE status = 'running' AND created_at < now() - make_interval(secs => %(grace_s)s)
) unfinished
WHERE updated_at < now() - make_interval(secs => %(grace_s)s) AND overdue_at < now()
    AND (created_at, eval_id) > (%(created_at)s, %(eval_id)s)
ORDER BY created_at, eval_id LIMIT %(limit)s
"""
_LAST_TIME: Final = datetime.max.replace(tzinfo=UTC)


def find(
    conn: Connection, *, grace_s: float, queued_limit_s: float, running_limit_s: float, limit: int = 1000
) -> list[EvaluationLost]:
    """Return up to `limit` lost events, not yet stored, for the oldest stalled evaluations.

    A running evaluation is stalled if no event came for its `timeout_s` (or `running_limit_s` without one) plus the grace. A
    queued evaluation is stalled after `queued_limit_s` plus the grace. An evaluation that started at the last possible time is
    left out, because no event can be later. Raises DatabaseOutage (retry).
    """
    limits = {"grace_s": grace_s, "queued_limit_s": queued_limit_s, "running_limit_s": running_limit_s, "limit": limit}
    after: dict[str, Any] = {"created_at": datetime(1970, 1, 1, tzinfo=UTC), "eval_id": ""}
    found: list[EvaluationLost] = []
    with database.errors(), conn.begin():
        raw = database.driver(conn)
        while len(found) < limit:
            rows = raw.cursor(binary=True).execute(_OVERDUE, {**limits, **after}).fetchall()
            started = _last_started(raw, [StoredRecord.of(row[:-2]) for row in rows])
            found += [
                _lost(row[0], row[RECORD.index("attempt")], last, row[-1])
                for row, last in zip(rows, started, strict=True)
                if last is None or last[0] < _LAST_TIME
            ]
            if len(rows) < limit:
                break
            after = {"created_at": rows[-1][-2], "eval_id": rows[-1][0]}
    return found[:limit]


def _last_started(raw: psycopg.Connection[Any], records: list[StoredRecord]) -> list[merge_state.Moment | None]:
    """Return the last started event of each record, from its merge state.

    The log of a record that a worker of an older release changed is read.
    """
    usable = {one.record.eval_id: folded for one in records if isinstance(folded := one.add([]), Folded)}
    if stale := {one.record.eval_id: one.record.version for one in records if one.record.eval_id not in usable}:
        usable |= rebuild.fold_logs(raw, stale)
    found = [usable.get(one.record.eval_id) for one in records]
    return [folded and merge_state.last_started(folded.record, folded.merge_state) for folded in found]


def _lost(eval_id: str, attempt: int, started: tuple[datetime, UUID] | None, overdue_at: datetime) -> EvaluationLost:
    sign_id = started[1] if started else "queued"
    overdue_at = max(overdue_at, started[0] + timedelta(microseconds=1)) if started else overdue_at
    judged = f"evalstore:lost:{eval_id}:{attempt}:{sign_id}:{overdue_at.isoformat()}"
    event_id = uuid5(NAMESPACE_URL, judged)
    return EvaluationLost(eval_id=eval_id, event_id=event_id, occurred_at=overdue_at, attempt=attempt)
