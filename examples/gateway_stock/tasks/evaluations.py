"""The sending half of evalstore's actor, by stock Dramatiq: its name and its queue are all that must agree."""

import os
from collections.abc import Mapping
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker

# No maintenance from here: it would apply this broker's idea of when dead letters expire to everybody's.
broker = RedisBroker(url=os.environ["EVALSTORE_REDIS_URL"], maintenance_chance=0)


@dramatiq.actor(broker=broker, actor_name="store_evaluation", queue_name="evaluations")
def store_evaluation(_event: Mapping[str, Any]) -> None:
    """Never runs here: evalstore's workers take what is sent."""
    raise NotImplementedError
