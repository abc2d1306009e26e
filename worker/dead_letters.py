"""Moving dead letters from Redis, where the broker puts them with their cause, to the table that keeps them."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final
from uuid import NAMESPACE_URL, UUID, uuid5

import msgspec
import redis
from sqlalchemy import Connection

from models.errors import InvalidEvent, RedisOutage
from models.events import identified, identity
from storage import dead_letters
from storage.dead_letters import Burial
from worker.batches import read
from worker.broker import Broker

_CHUNK: Final = 50
REDRIVEN: Final = b"dead-letter:"


def move(conn: Connection, broker: Broker) -> int:
    """Move all there are; returns how many. Each is in the table before it leaves Redis, and there once however often moved.

    Raises DatabaseOutage, RedisOutage (retry).
    """
    moved = 0
    for queue in sorted(broker.queues):
        for burials, redis_ids in _chunks(broker, queue):
            dead_letters.write(conn, burials)
            keys = broker.keys(queue)
            try:
                broker.run("forget_dead", [keys.dead, keys.dead_bodies, keys.causes], *redis_ids)
            except redis.RedisError as error:
                raise RedisOutage(str(error)) from error
            moved += len(burials)
    return moved


def _chunks(broker: Broker, queue: str) -> Iterator[tuple[list[Burial], list[bytes]]]:
    keys = broker.keys(queue)
    try:
        while True:
            found: list[tuple[bytes, float]] = broker.client.zrange(keys.dead, 0, _CHUNK - 1, withscores=True)  # type: ignore[assignment]
            if not found:
                return
            redis_ids = [redis_id for redis_id, _ in found]
            bodies = broker.client.hmget(keys.dead_bodies, redis_ids)
            causes = broker.client.hmget(keys.causes, redis_ids)
            burials = [
                _burial(queue, redis_id, body or b"", msgspec.json.decode(cause or b"{}"), died_ms)
                for (redis_id, died_ms), body, cause in zip(found, bodies, causes, strict=True)
            ]
            yield burials, redis_ids
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error


def _burial(queue: str, redis_id: bytes, body: bytes, cause: dict[str, Any], died_ms: float) -> Burial:
    actor = eval_id = event_id = None
    attempts = 1
    try:
        message = read(body)
        actor, attempts = message.actor_name[:200].replace("\0", ""), int(message.options.get("retries", 0)) + 1
        eval_id, event_id = identity(identified(message.args[0], message.message_id, message.message_timestamp))
    except (InvalidEvent, LookupError, TypeError, ValueError):
        pass  # what cannot be read is kept all the same
    error_class, error_message = str(cause.get("error_class", "Unknown")), str(cause.get("error_message", ""))
    return Burial(
        id=_letter_id(queue, redis_id),
        queue=queue,
        actor=actor,
        eval_id=eval_id,
        event_id=event_id,
        message=body,
        error_class=error_class,
        error_message=error_message,
        traceback=str(cause.get("traceback", "")),
        signature=dead_letters.signature(error_class, error_message),
        attempts=attempts,
        died_at=datetime.fromtimestamp(died_ms / 1000, UTC),
        host=cause.get("host"),
        release=cause.get("release"),
    )


def _letter_id(queue: str, redis_id: bytes) -> UUID:
    """The letter's own id if the message was redriven under it, else one that every move of this message agrees on."""
    if redis_id.startswith(REDRIVEN):
        return UUID(redis_id.removeprefix(REDRIVEN).decode())
    return uuid5(NAMESPACE_URL, f"evalstore:dead:{queue}:{redis_id.hex()}")
