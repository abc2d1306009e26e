"""What waits to be stored, as Redis and this machine's spool show it: how old it is, and which objects it needs."""

import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec
import redis

from evalstore.telemetry import queues
from models.content import objects_named
from models.errors import RedisOutage
from tasks.broker import SendingBroker
from tasks.keys import QUEUE
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


def oldest_age_s(broker: SendingBroker, queue: str) -> float:
    """For how long the oldest message of a queue has waited, in seconds; infinite where that cannot be told.

    A few short requests. Raises RedisOutage (retry).
    """
    keys, client = broker.keys(queue), broker.client
    try:
        if client.llen(keys.suspects):
            return float("inf")
        ids = queues.oldest_messages(broker, queue, redriven=True)
        # Those that wait for an object or a lock come again and again, in no order of age.
        now_s: int = client.time()[0]
        ids += client.zrangebyscore(keys.delayed, "-inf", (now_s + _SOON_S) * 1000, start=0, num=_MOST_DELAYED)
        return queues.waited_s(broker, queue, ids) if len(ids) <= _MOST_DELAYED else float("inf")
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error


def snapshot(broker: SendingBroker, spool: Spool | None, *, longest_s: float) -> Backlog:
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
