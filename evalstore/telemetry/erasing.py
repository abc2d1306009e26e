"""Checks and services that erasing needs from Redis and this installation, for the command line and the HTTP service."""

from datetime import timedelta
from typing import Final

from evalstore.storage import garbage_collect
from evalstore.storage.erasure import Surroundings
from evalstore.telemetry import backlog, queues
from models.errors import EvalstoreError
from models.settings import Settings
from tasks.broker import SendingBroker

# Workers that know tables of this revision store no event of an evaluation that has a tombstone.
_REVISION: Final = "0012"


class OlderWorkers(EvalstoreError):
    """A worker of an older release runs, which would store events of an erased evaluation anew."""


def refuse_older_workers(broker: SendingBroker) -> None:
    """Raises OlderWorkers, RedisOutage (retry)."""
    if older := queues.older_workers(broker, _REVISION):
        raise OlderWorkers(f"workers of an older release run, and would store late events anew: {', '.join(older[:10])}")


def surroundings(settings: Settings, broker: SendingBroker) -> Surroundings:
    """Return what `erasure.erase` needs besides the database."""
    grace = timedelta(days=settings.sweep_grace_days)
    longest_s = garbage_collect.longest_wait(grace).total_seconds()
    return Surroundings(
        garbage_collect.targets(settings),
        lambda: backlog.snapshot(broker, broker.spool, longest_s=longest_s),
        lambda eval_id, event_ids: queues.forget_evaluation(broker, eval_id, event_ids),
        grace,
    )
