"""Checks and services that erasing needs from Redis and this installation, for the command line and the HTTP service."""

from datetime import timedelta
from typing import Final

from sqlalchemy import Connection

from evalstore.storage import clients, garbage_collect
from evalstore.storage.erasure import Surroundings
from evalstore.telemetry import backlog, queues
from models.errors import EvalstoreError
from models.settings import Settings
from tasks.broker import SendingBroker

# Processes that know tables of this revision store no event of an evaluation that has a tombstone.
_REVISION: Final = "0012"


class OlderProcesses(EvalstoreError):
    """A process of an older release runs. It would store events of an erased evaluation anew."""


def refuse_older_processes(conn: Connection, broker: SendingBroker) -> None:
    """Raise OlderProcesses if a process of an older release runs: workers by their heartbeats, others by their connections.

    Raises RedisOutage, DatabaseOutage (retry).
    """
    older = queues.older_workers(broker, _REVISION) or clients.older(conn, _REVISION)
    if older:
        raise OlderProcesses(f"processes of an older release run, and would store late events anew: {', '.join(older[:10])}")


def surroundings(settings: Settings, broker: SendingBroker) -> Surroundings:
    """Return what `erasure.erase` needs besides the database."""
    grace = timedelta(days=settings.sweep_grace_days)
    longest_s = garbage_collect.longest_wait(grace).total_seconds()
    return Surroundings(
        garbage_collect.targets(settings),
        lambda: backlog.snapshot(broker, broker.spool, longest_s=longest_s),
        lambda eval_id: queues.forget_dead_letters(broker, eval_id),
        lambda eval_id, event_ids: queues.forget_evaluation(broker, eval_id, event_ids),
        grace,
    )
