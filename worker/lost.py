"""Mark stalled evaluations as lost. A result that still arrives counts."""

from collections.abc import Callable

from sqlalchemy import Connection

from evalstore.storage import event_store, stalled
from evalstore.telemetry.backlog import oldest_age_s
from models.settings import Settings
from tasks.broker import SendingBroker
from tasks.keys import QUEUE
from worker.metrics import WorkerMetrics

_MOST = 1000


def run_once(
    conn: Connection,
    broker: SendingBroker,
    limits: Settings,
    metrics: WorkerMetrics,
    *,
    go_on: Callable[[], bool] = lambda: True,
) -> dict[str, int]:
    """Mark stalled evaluations as lost, until `go_on` returns False. Return their number.

    Marks none while a message has waited for longer than the grace: the message may hold the result. Raises DatabaseOutage,
    RedisOutage (retry: the same events are built again, and stored once).
    """
    marked = 0
    while oldest_age_s(broker, QUEUE) <= limits.lost_grace_s:
        found = stalled.find(
            conn,
            grace_s=limits.lost_grace_s,
            queued_limit_s=limits.queued_limit_s,
            running_limit_s=limits.running_limit_s,
            limit=_MOST,
        )
        if found:
            applied = event_store.store(conn, found).outcomes.count("applied")
            metrics.lost(applied)
            marked += applied
        if len(found) < _MOST:
            return {"lost": marked}
        if not go_on():
            return {"lost": marked, "more": 1}
    return {"lost": marked, "held_back": 1}
