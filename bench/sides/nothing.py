"""Dramatiq's own Redis broker and middleware, with an actor that does nothing."""

from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from bench.sides.evalstore import fill
from models.settings import settings

__all__ = ["fill", "store_evaluation"]

broker = RedisBroker(url=settings().redis_url.get_secret_value())
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name="evaluations")
def store_evaluation(_event: dict[str, Any]) -> None:
    """Do nothing."""
