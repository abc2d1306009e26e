"""What waits to be stored, as Redis and this machine's spool show it: how old it is, and which objects it needs."""

import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec
import redis

from models.content import objects_named
from models.errors import RedisOutage
from tasks.broker import Broker
from tasks.evaluations import QUEUE
from tasks.spool import Spool


class Backlog(NamedTuple):
    """The SHA-256 of every object that some message needs, and for how long the oldest message has waited."""

    objects: set[bytes]
    oldest_age_s: float


class _Sent(msgspec.Struct):
    message_timestamp: float


_MOST_DELAYED: Final = 1000
# What a sender delayed by more than that is not looked at; what waits for something comes again sooner.
_SOON_S: Final = 300
_SENT: Final = msgspec.json.Decoder(_Sent)


def oldest_age_s(broker: Broker, queue: str) -> float:
    """For how long the oldest message of a queue has waited, in seconds; infinite where that cannot be told.

    A few short requests. Raises RedisOutage (retry).
    """
    keys = broker.keys(queue)
    try:
        if broker.client.llen(keys.suspects):
            return float("inf")
        heads: list[Any] = [*broker.client.lrange(keys.woken, 0, -1), *broker.client.lrange(keys.queue, 0, 0)]
        for process in broker.client.hkeys(keys.processes):
            name = process.decode() if isinstance(process, bytes) else str(process)
            heads += broker.client.zrange(keys.unacked_prefix + name, 0, 0)
        # Those that wait for an object or a lock come again and again, in no order of age.
        soon_ms = (broker.client.time()[0] + _SOON_S) * 1000
        heads += broker.client.zrangebyscore(keys.delayed, "-inf", soon_ms, start=0, num=_MOST_DELAYED)
        if len(heads) > _MOST_DELAYED:
            return float("inf")
        bodies: list[Any] = []
        for start in range(0, len(heads), 50):
            bodies += broker.client.hmget(keys.bodies, heads[start : start + 50])
        return _age_s(sent for body in bodies if body and (sent := _sent_ms(body)))
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error


def look(broker: Broker, spool: Spool | None, *, longest_s: float) -> Backlog:
    """All that waits: in the spool, in the queue or delayed, being worked on, or dead and not yet in the database.

    Reads every message, unless one has waited for longer than `longest_s` where that is quickly seen. One that moves on
    meanwhile, in this order or to the database, is seen here or there. Raises RedisOutage, OSError (retry).
    """
    if (age_s := oldest_age_s(broker, QUEUE)) > longest_s:
        return Backlog(set(), age_s)
    needed: set[bytes] = set()
    sent: list[float] = []
    for at_ms, line in spool.lines() if spool else ():
        needed |= objects_named(line)
        if at_ms:
            sent.append(at_ms)
    for state, body in broker.held(QUEUE):
        needed |= objects_named(body)
        if state == "queued" and (at := _sent_ms(body)):
            sent.append(at)
    return Backlog(needed, _age_s(iter(sent)))


def _age_s(sent_ms: Iterator[float]) -> float:
    oldest = min(sent_ms, default=None)
    return 0.0 if oldest is None else max(0.0, time.time() - oldest / 1000)


def _sent_ms(body: bytes) -> float | None:
    try:
        return _SENT.decode(body).message_timestamp
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
