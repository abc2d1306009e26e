"""Ask a worker to redrive dead letters. The database holds which ones, and at which rate."""

from pathlib import Path
from typing import Final
from uuid import UUID

import redis
from dramatiq import Message

from models.errors import RedisOutage
from models.jobs import QUEUE
from tasks.broker import SendingBroker, encode

ACTOR: Final = "redrive_dead_letters"
# The prefix of the Redis message id of a redriven dead letter.
REDRIVEN: Final = b"dead-letter:"
_ENQUEUE: Final = Path(__file__).parent / "lua" / "enqueue.lua"


def job_id(redrive_id: UUID) -> str:
    """Return the Redis message id of the request. While the request waits, asking again changes nothing."""
    return f"redrive:{redrive_id}"


def ask(broker: SendingBroker, redrive_id: UUID) -> None:
    """Ask a worker to continue a redrive. Raises RedisOutage: a periodic job asks again."""
    options = {"redis_message_id": job_id(redrive_id)}
    message = Message[None](queue_name=QUEUE, actor_name=ACTOR, args=(str(redrive_id),), kwargs={}, options=options)
    keys = broker.keys(QUEUE)
    try:
        broker.script(_ENQUEUE)(keys=[keys.queue, keys.bodies], args=[job_id(redrive_id), encode(message)])
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error
