"""Giving up evaluations whose result is overdue: watch, compare, act. A result that still comes counts all the same."""

from collections.abc import Callable

from sqlalchemy import Connection

from evalstore.storage import event_store, stalled
from evalstore.telemetry.backlog import oldest_age_s
from models.settings import Settings
from tasks.keys import QUEUE
from worker.broker import Broker

_MOST = 1000


def run_once(conn: Connection, broker: Broker, limits: Settings, *, go_on: Callable[[], bool] = lambda: True) -> dict[str, int]:
    """Mark what is overdue as lost, until `go_on` says no; returns how many were.

    Nothing is marked while a message has waited for longer than the grace: the result may be among those that wait.
    Raises DatabaseOutage, RedisOutage (retry: the same events are made again, and stored once).
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
            broker.metrics.lost(applied)
            marked += applied
        if len(found) < _MOST:
            return {"lost": marked}
        if not go_on():
            return {"lost": marked, "more": 1}
    return {"lost": marked, "held_back": 1}
