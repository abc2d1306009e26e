"""Giving up evaluations whose result is overdue: watch, compare, act. A result that still comes counts all the same."""

import time
from typing import Any

import redis
from sqlalchemy import Connection

from models.errors import RedisOutage
from models.settings import Settings
from storage import evaluations, overdue
from tasks.evaluations import QUEUE
from worker.batches import read
from worker.broker import Broker

_MOST = 1000


def run_once(conn: Connection, broker: Broker, limits: Settings) -> dict[str, int]:
    """Mark what is overdue as lost; returns how many were.

    Nothing is marked while a message has waited for longer than the grace: the result may be among those that wait.
    Raises DatabaseOutage, RedisOutage (retry: the same events are made again, and stored once).
    """
    marked = 0
    while oldest_age_s(broker, QUEUE) <= limits.lost_grace_s:
        found = overdue.find(
            conn,
            grace_s=limits.lost_grace_s,
            queued_limit_s=limits.queued_limit_s,
            running_limit_s=limits.running_limit_s,
            limit=_MOST,
        )
        if found:
            marked += evaluations.store(conn, found).outcomes.count("applied")
        if len(found) < _MOST:
            return {"lost": marked}
    return {"lost": marked, "held_back": 1}


def oldest_age_s(broker: Broker, queue: str) -> float:
    """For how long the oldest message of a queue has waited, in seconds; infinite where that cannot be told."""
    keys = broker.keys(queue)
    try:
        if broker.client.llen(keys.suspects):
            return float("inf")
        heads: list[Any] = list(broker.client.lrange(keys.queue, 0, 0))
        for process in broker.client.hkeys(keys.processes):
            name = process.decode() if isinstance(process, bytes) else str(process)
            heads += broker.client.zrange(broker.unacked(queue, name), 0, 0)
        bodies: list[Any] = list(broker.client.hmget(keys.bodies, heads)) if heads else []
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error
    sent_ms = [sent for body in bodies if body and (sent := _sent_ms(body))]
    return max([0.0, *(time.time() - sent / 1000 for sent in sent_ms)])


def _sent_ms(body: bytes) -> float | None:
    try:
        return float(read(body).message_timestamp)
    except ValueError:
        return None
