"""A worker as anyone would write it, on Dramatiq's own Redis broker: what the suite fails on with EVALSTORE_CHAOS_BROKER=stock.

The same transaction, one event a message. Its retries are made quick, in its favour.
"""

import ctypes
import os
import signal
import time
from functools import cache
from pathlib import Path
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from sqlalchemy import Engine

from evalstore.storage import database, event_store
from models.events import parse
from models.settings import settings

broker = RedisBroker(url=settings().redis_url.get_secret_value())
dramatiq.set_broker(broker)


@cache
def engine() -> Engine:
    return database.engine(settings().database_url.get_secret_value(), pool_size=32)


@dramatiq.actor(queue_name="evaluations", min_backoff=200, max_backoff=2_000)
def store_evaluation(event: dict[str, Any]) -> None:
    parsed = parse(event)
    kind = parsed.eval_id.partition("-")[0]
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "segfault":
        ctypes.string_at(0)
    if kind == "slow":
        time.sleep(3)
    with database.errors(), engine().connect() as conn:
        event_store.store(conn, [parsed])
    if kind == "late":
        mark = Path(os.environ["EVALSTORE_CHAOS_FOLDER"], parsed.eval_id)
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@dramatiq.actor(queue_name="jobs", min_backoff=100, max_backoff=200)
def fail_twice(name: str) -> None:
    if broker.client.rpush("runs", name) < 3:
        raise ValueError(f"{name} fails")


@dramatiq.actor(queue_name="jobs")
def take_long(name: str) -> None:
    broker.client.rpush("runs", name)
    time.sleep(10)
