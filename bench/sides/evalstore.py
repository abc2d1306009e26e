"""evalstore as released: `dramatiq worker.tasks`."""

import os
import random
from collections.abc import Iterable
from itertools import islice
from typing import Any
from uuid import uuid4

import msgspec
import redis

from models.settings import settings
from tasks import store_evaluation
from tasks.tracing import is_asked_for


def fill(events: Iterable[dict[str, Any]]) -> None:
    """Enqueue `events` as Dramatiq does, for any worker with an actor `store_evaluation` on the queue `evaluations`."""
    remaining = iter(events)
    with redis.Redis.from_url(settings().redis_url.get_secret_value()) as client:
        while some := list(islice(remaining, 2000)):
            bodies = {redis_id: _message(event, redis_id) for event in some for redis_id in [str(uuid4())]}
            with client.pipeline(transaction=True) as pipeline:
                pipeline.hset("dramatiq:evaluations.msgs", mapping=bodies)
                pipeline.rpush("dramatiq:evaluations", *bodies)
                pipeline.execute()


def _message(event: dict[str, Any], redis_id: str) -> bytes:
    options = {"redis_message_id": redis_id}
    if is_asked_for():
        sampled = random.random() < float(os.environ.get("OTEL_TRACES_SAMPLER_ARG", "1"))  # noqa: S311 - no secret
        options["traceparent"] = f"00-{uuid4().hex}-{uuid4().hex[:16]}-0{int(sampled)}"
    return message(event, options)


def message(event: dict[str, Any], options: dict[str, str]) -> bytes:
    """`event` as Dramatiq's JSON."""
    return msgspec.json.encode(
        {
            "queue_name": "evaluations",
            "actor_name": "store_evaluation",
            "args": [event],
            "kwargs": {},
            "options": options,
            "message_id": event["event_id"],
            "message_timestamp": 1_769_850_000_000,
        }
    )


def send(event: dict[str, Any]) -> None:
    """Send one event as a gateway does."""
    store_evaluation.send(event)
