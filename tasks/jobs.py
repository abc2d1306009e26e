"""Put requests for work into the queue of jobs."""

from pathlib import Path
from typing import Final

import redis
from dramatiq import Message

from models.errors import RedisOutage
from models.jobs import QUEUE
from tasks.broker import SendingBroker, encode

_ENQUEUE: Final = Path(__file__).parent / "lua" / "enqueue.lua"


def ask(broker: SendingBroker, actor: str, args: tuple[str | int, ...], job_id: str) -> None:
    """Ask a worker to run an actor. While a request with the same `job_id` waits, asking again changes nothing.

    Raises RedisOutage (retry).
    """
    message = Message[None](queue_name=QUEUE, actor_name=actor, args=args, kwargs={}, options={"redis_message_id": job_id})
    keys = broker.keys(QUEUE)
    try:
        broker.script(_ENQUEUE)(keys=[keys.queue, keys.bodies], args=[job_id, encode(message)])
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error
