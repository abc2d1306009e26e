"""The queues and the workers, as Redis holds them. Only erasing writes here."""

import time
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import msgspec
import redis

from models.content import objects_named
from models.errors import InvalidEvent, RedisOutage
from models.events import decode, identified, identity
from models.metrics import QUEUES
from tasks.broker import SendingBroker
from tasks.keys import QUEUE
from tasks.redrives import REDRIVEN

# A worker writes a heartbeat every two seconds (worker/heartbeat.py).
SILENT_AFTER_S: Final = 15.0


class Queue(NamedTuple):
    """A snapshot of a queue. `oldest_age_s` is the age of the oldest message that is ready or in flight; 0 without one."""

    name: str
    messages: dict[str, int]
    oldest_age_s: float
    consumers: int


class QueueStats(NamedTuple):
    """A snapshot of Redis. `workers` has the status of each worker by name. `jobs` has each job's last run and last successful
    run.

    The memory is 0 if the server forbids INFO.
    """

    queues: list[Queue]
    workers: dict[str, dict[str, Any]]
    jobs: dict[str, dict[str, Any]]
    successes: dict[str, float]
    memory_bytes: int
    memory_limit_bytes: int


def snapshot(broker: SendingBroker) -> QueueStats:
    """Read the state of all queues, workers and jobs. Raises RedisOutage."""
    client: Any = broker.client
    try:
        seconds, micros = client.time()
        workers: dict[str, dict[str, Any]] = {}
        queues = []
        for name in QUEUES:
            living = _live_workers(client.hgetall(broker.keys(name).workers), seconds + micros / 1e6)
            workers |= living
            queues.append(Queue(name, broker.counts(name), oldest_age_s(broker, name), len(living)))
        memory = _memory(client)
        told = client.hgetall(broker.names.last_runs)
        successes = client.hgetall(broker.names.last_successes)
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error
    return QueueStats(
        queues,
        workers,
        {name.decode(): msgspec.json.decode(one) for name, one in told.items()},
        {name.decode(): float(at) for name, at in successes.items()},
        int(memory.get("used_memory", 0)),
        int(memory.get("maxmemory", 0)),
    )


def _memory(client: Any) -> dict[str, Any]:
    try:
        return dict(client.info("memory"))
    except redis.ResponseError:  # Some servers forbid INFO as a dangerous command.
        return {}


def _live_workers(told: dict[bytes, bytes], now: float) -> dict[str, dict[str, Any]]:
    """Return the workers with a recent heartbeat, by the clock of Redis."""
    found = {}
    for name, line in told.items():
        at_ms, _, json = line.partition(b" ")
        if now - int(at_ms) / 1000 < SILENT_AFTER_S:
            found[name.decode(errors="replace")] = dict(msgspec.json.decode(json))
    return found


def older_workers(broker: SendingBroker, revision: str) -> list[str]:
    """Return host and process id of each worker whose release does not know this revision of the tables. Raises RedisOutage."""
    workers = snapshot(broker).workers.values()
    return sorted({f"{one['host']} {one['pid']}" for one in workers if str(one.get("revision", "")) < revision})


_DELETED_AT_ONCE: Final = 1000
_SCANNED_AT_ONCE: Final = 20


def forget_evaluation(broker: SendingBroker, eval_id: str, event_ids: Iterable[str]) -> None:
    """Delete what Redis holds of an evaluation besides its messages. Raises RedisOutage (retry)."""
    keys = [broker.names.cached_record(eval_id), *(broker.names.given_time(eval_id, event_id) for event_id in event_ids)]
    try:
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            broker.client.unlink(*keys[start : start + _DELETED_AT_ONCE])
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error


def forget_dead_letters(broker: SendingBroker, eval_id: str) -> tuple[int, set[bytes]]:
    """Delete the dead letters of an evaluation that no worker has moved to the database yet.

    Return their number, and the SHA-256 of the objects that they named. Reads all dead letters in Redis: these are few, because
    workers move them within seconds. Raises RedisOutage (retry).
    """
    keys, deleted = broker.keys(QUEUE), 0
    objects: set[bytes] = set()
    try:
        for redis_id, body in broker.client.hscan_iter(keys.dead_bodies, count=_SCANNED_AT_ONCE):
            if _eval_id(body) != eval_id:
                continue
            with broker.client.pipeline(transaction=True) as pipeline:
                pipeline.zrem(keys.dead, redis_id)
                pipeline.hdel(keys.dead_bodies, redis_id)
                pipeline.hdel(keys.causes, redis_id)
                deleted += pipeline.execute()[1]
            objects |= objects_named(body)
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error
    return deleted, objects


def _eval_id(body: bytes) -> str | None:
    try:
        message = decode(body)
        return identity(identified(message["args"][0], message["message_id"], message["message_timestamp"]))[0]
    except (InvalidEvent, LookupError, TypeError, ValueError, AttributeError):
        return None


def oldest_age_s(broker: SendingBroker, queue: str) -> float:
    """Return the age in seconds of the oldest message in a queue. Raises redis.RedisError.

    Redriven messages do not count: their sending time is old, but they have not waited.
    """
    return waited_s(broker, queue, oldest_messages(broker, queue, redriven=False))


def oldest_messages(broker: SendingBroker, queue: str, *, redriven: bool) -> list[Any]:
    """Return the first ids of each list that keeps the order of sending: the queue, and the messages of each process.

    `redriven` includes messages that an operator sent again. Raises redis.RedisError.
    """
    keys, client = broker.keys(queue), broker.client
    places: list[Any] = [client.lrange(keys.woken, 0, -1), client.lrange(keys.queue, 0, 99)]
    processes: list[Any] = list(client.hkeys(keys.processes))
    places += [client.zrange(keys.unacked_prefix + one.decode(errors="surrogateescape"), 0, 99) for one in processes]
    waiting = ([one for one in place if redriven or not one.startswith(REDRIVEN)] for place in places)
    return [one for place in waiting for one in place[:1]]


def waited_s(broker: SendingBroker, queue: str, ids: list[Any]) -> float:
    """Return the age of the oldest of these messages by its timestamp, or 0 without messages. Raises redis.RedisError."""
    found = [0.0]
    for start in range(0, len(ids), 50):  # In small groups, because Redis blocks while it reads a group.
        sent: list[bytes] = broker.waiting(keys=[broker.keys(queue).bodies], args=ids[start : start + 50])
        found += [time.time() - float(at) / 1000 for at in sent]
    return max(found)
