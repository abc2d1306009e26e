"""Asking a worker to send dead letters again; which ones, and how, is in the database."""

from pathlib import Path
from typing import Final
from uuid import UUID

import redis
from dramatiq import Message

from models.errors import RedisOutage
from models.jobs import QUEUE
from tasks.broker import SendingBroker, encode

ACTOR: Final = "redrive_dead_letters"
# How the id in Redis begins under which a dead letter is sent again.
REDRIVEN: Final = b"dead-letter:"
_ENQUEUE: Final = Path(__file__).parent / "lua" / "enqueue.lua"


def job_id(redrive_id: UUID) -> str:
    """The id in Redis of the message that asks for it: while that is there, asking again changes nothing."""
    return f"redrive:{redrive_id}"


def ask(broker: SendingBroker, redrive_id: UUID) -> None:
    """Ask a worker to go on with a redrive, once however often this is called. Raises RedisOutage (the sweep asks again)."""
    options = {"redis_message_id": job_id(redrive_id)}
    message = Message[None](queue_name=QUEUE, actor_name=ACTOR, args=(str(redrive_id),), kwargs={}, options=options)
    keys = broker.keys(QUEUE)
    try:
        broker.script(_ENQUEUE)(keys=[keys.queue, keys.bodies], args=[job_id(redrive_id), encode(message)])
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error
