"""The messages that wait to be stored, in Redis and in this machine's spool: their age, and the objects they need."""

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
    """The SHA-256 of each object that a message needs, and the age of the oldest message."""

    objects: set[bytes]
    oldest_age_s: float


class _Sent(msgspec.Struct):
    message_timestamp: float


_MOST_DELAYED: Final = 1000
# Messages that a sender delays for longer are ignored; retries come sooner.
_SOON_S: Final = 300
_SENT: Final = msgspec.json.Decoder(_Sent)


def oldest_age_s(broker: SendingBroker, queue: str) -> float:
    """Return the age of the oldest message of a queue, in seconds; infinite if it is unknown.

    A few short requests. Raises RedisOutage (retry).
    """
    keys, client = broker.keys(queue), broker.client
    try:
        if client.llen(keys.suspects):
            return float("inf")
        ids = queues.oldest_messages(broker, queue, redriven=True)
        # Delayed messages are not sorted by age: messages that wait for an object or a lock are among them.
        now_s: int = client.time()[0]
        ids += client.zrangebyscore(keys.delayed, "-inf", (now_s + _SOON_S) * 1000, start=0, num=_MOST_DELAYED)
        return queues.waited_s(broker, queue, ids) if len(ids) <= _MOST_DELAYED else float("inf")
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error


def snapshot(broker: SendingBroker, spool: Spool | None, *, longest_s: float) -> Backlog:
    """Read all waiting messages: spooled, queued, delayed, in flight, or dead and not yet in the database.

    Return early if the oldest is older than `longest_s`. Messages move in the order of reading, so a moving message is not
    missed. Raises RedisOutage, OSError (retry).
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
