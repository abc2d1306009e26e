"""Dramatiq's own Redis broker and middleware; an actor that stores each message in a transaction of its own."""

import os
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from sqlalchemy import create_engine

from bench import rows
from bench.sides.evalstore import fill
from models.settings import settings

__all__ = ["fill", "send", "store_evaluation"]

broker = RedisBroker(url=settings().redis_url.get_secret_value())
dramatiq.set_broker(broker)
engine = create_engine(
    settings().database_url.get_secret_value().replace("postgresql://", "postgresql+psycopg://"),
    pool_size=int(os.environ.get("BENCH_THREADS", "8")),
)


@dramatiq.actor(queue_name="evaluations")
def store_evaluation(event: dict[str, Any]) -> None:
    with engine.begin() as conn:
        rows.store(conn, event)


def send(event: dict[str, Any]) -> None:
    """Send one event as a gateway does."""
    store_evaluation.send(event)
