"""Find stalled evaluations: their result should have come by now."""

from datetime import datetime
from typing import Final
from uuid import NAMESPACE_URL, uuid5

from sqlalchemy import Connection

from evalstore.storage import database
from models.events import EvaluationLost

# An evaluation is stalled by the time at which this database recorded its last sign of life. The event's time is the moment it
# stalled, so every process derives the same event. Senders may send any time limit: a limit beyond the range of an
# interval, or a start at the last possible time, must not fail the query for all evaluations.
_OVERDUE: Final = """
SELECT e.eval_id, e.attempt, sign.event_id, greatest(
    CASE WHEN sign.event_id IS NULL THEN e.updated_at + make_interval(secs => %(queued_limit_s)s)
        ELSE sign.recorded_at + make_interval(secs => greatest(least(coalesce(e.timeout_s, %(running_limit_s)s), 3e9), 0)) END
        + make_interval(secs => %(grace_s)s),
    sign.occurred_at + interval '1 microsecond') AS overdue_at
FROM evaluations e
LEFT JOIN LATERAL (
    SELECT s.event_id, s.recorded_at, s.occurred_at FROM evaluation_events s
    WHERE s.eval_id = e.eval_id AND s.attempt = e.attempt AND s.type = 'evaluation:started'
    ORDER BY s.occurred_at DESC, s.event_id DESC LIMIT 1
) sign ON true
WHERE e.status IN ('queued', 'running') AND e.created_at < now() - make_interval(secs => %(grace_s)s)
    AND e.updated_at < now() - make_interval(secs => %(grace_s)s)
    AND CASE WHEN sign.event_id IS NULL THEN e.updated_at + make_interval(secs => %(queued_limit_s)s)
        ELSE sign.recorded_at + make_interval(secs => greatest(least(coalesce(e.timeout_s, %(running_limit_s)s), 3e9), 0)) END
        + make_interval(secs => %(grace_s)s) < now()
    AND coalesce(sign.occurred_at < '9999-12-31T23:59:59.999999Z', true)
ORDER BY e.updated_at LIMIT %(limit)s
"""


def find(
    conn: Connection, *, grace_s: float, queued_limit_s: float, running_limit_s: float, limit: int = 1000
) -> list[EvaluationLost]:
    """Return lost events, not yet stored, for the longest stalled evaluations.

    A running evaluation is stalled after its `timeout_s` (or `running_limit_s` without one) plus the grace. A queued
    evaluation is stalled after `queued_limit_s` plus the grace. Raises DatabaseOutage (retry).
    """
    limits = {"grace_s": grace_s, "queued_limit_s": queued_limit_s, "running_limit_s": running_limit_s, "limit": limit}
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        rows = cursor.execute(_OVERDUE, limits).fetchall()
    return [_lost(*row) for row in rows]


def _lost(eval_id: str, attempt: int, sign_id: object, overdue_at: datetime) -> EvaluationLost:
    judged = f"evalstore:lost:{eval_id}:{attempt}:{sign_id or 'queued'}:{overdue_at.isoformat()}"
    event_id = uuid5(NAMESPACE_URL, judged)
    return EvaluationLost(eval_id=eval_id, event_id=event_id, occurred_at=overdue_at, attempt=attempt)
