"""Moves dead letters from Redis, where consumers put them with their cause, to PostgreSQL."""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final
from uuid import NAMESPACE_URL, UUID, uuid5

import msgspec
import redis
from sqlalchemy import Connection

from evalstore.storage import dead_letters, redrives
from evalstore.storage.dead_letters import DeadLetterInsert
from models.errors import InvalidEvent, Outage, RedisOutage
from models.events import decode, identified, identity
from models.logs import EventLogger
from tasks.broker import SendingBroker
from tasks.redrives import REDRIVEN
from worker.scripts import Scripts
from worker.verified_database import VerifiedDatabase

log = EventLogger("evalstore.worker")
_CHUNK: Final = 50
_LONGEST_S: Final = 10.0
_CHUNK_BYTES: Final = 32 * 1024 * 1024


def move(conn: Connection, broker: SendingBroker, scripts: Scripts, *, go_on: Callable[[], bool] = lambda: True) -> int:
    """Move the dead letters of all queues, until `go_on` returns False. Return their number.

    Each is committed to the table before it leaves Redis. Moving a dead letter again changes nothing. Raises DatabaseOutage,
    RedisOutage (retry).
    """
    moved = 0
    for queue in sorted(broker.queues):
        for inserts, redis_ids in _chunks(broker, queue):
            dead_letters.write(conn, inserts)
            keys = broker.keys(queue)
            try:
                scripts.run("remove_dead_letters", [keys.dead, keys.dead_bodies, keys.causes], *redis_ids)
            except redis.RedisError as error:
                raise RedisOutage(str(error)) from error
            moved += len(inserts)
            if not go_on():
                return moved
    return moved


def _chunks(broker: SendingBroker, queue: str) -> Iterator[tuple[list[DeadLetterInsert], list[bytes]]]:
    keys = broker.keys(queue)
    try:
        while True:
            found: list[tuple[bytes, float]] = broker.client.zrange(keys.dead, 0, _CHUNK - 1, withscores=True)  # type: ignore[assignment]
            if not found:
                return
            found = _within(broker, keys.dead_bodies, found)
            redis_ids = [redis_id for redis_id, _ in found]
            bodies = broker.client.hmget(keys.dead_bodies, redis_ids)
            causes = broker.client.hmget(keys.causes, redis_ids)
            inserts = [
                _insert_of(queue, redis_id, body, msgspec.json.decode(cause or b"{}"), died_ms)
                for (redis_id, died_ms), body, cause in zip(found, bodies, causes, strict=True)
                if body is not None
            ]
            yield inserts, redis_ids
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error


def _within(broker: SendingBroker, key: str, found: list[tuple[bytes, float]]) -> list[tuple[bytes, float]]:
    """Return the first of `found` whose bodies together fit into memory, but at least one."""
    with broker.client.pipeline(transaction=False) as pipeline:
        for redis_id, _ in found:
            pipeline.hstrlen(key, redis_id)
        sizes = pipeline.execute()
    left, number = _CHUNK_BYTES, 0
    for size in sizes:
        left -= size
        if number and left < 0:
            break
        number += 1
    return found[:number]


def _insert_of(queue: str, redis_id: bytes, body: bytes, cause: dict[str, Any], died_ms: float) -> DeadLetterInsert:
    """Return the row of a dead letter, with all fields that can be read from the message."""
    actor = eval_id = event_id = None
    attempts = 1
    try:
        message = decode(body)
        actor = message["actor_name"][:200].replace("\0", "")
        if isinstance(options := message.get("options"), dict) and isinstance(retries := options.get("retries"), int):
            attempts = retries + 1
        eval_id, event_id = identity(identified(message["args"][0], message["message_id"], message["message_timestamp"]))
    except (InvalidEvent, LookupError, TypeError, ValueError, AttributeError):
        pass
    error_class, error_message = str(cause.get("error_class", "Unknown")), str(cause.get("error_message", ""))
    return DeadLetterInsert(
        id=_dead_letter_id(queue, redis_id),
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


def _dead_letter_id(queue: str, redis_id: bytes) -> UUID:
    """Return the id under which the message was redriven.

    Otherwise return an id that is equal for every move of this message.
    """
    return dead_letter_of(redis_id) or uuid5(NAMESPACE_URL, f"evalstore:dead:{queue}:{redis_id.hex()}")


def dead_letter_of(redis_id: bytes) -> UUID | None:
    """Return the dead letter that was redriven under a Redis id; None for other ids, which senders may make up."""
    if not redis_id.startswith(REDRIVEN):
        return None
    try:
        return UUID(redis_id.removeprefix(REDRIVEN).decode())
    except ValueError:
        return None


def record_stored(connections: VerifiedDatabase, redis_ids: Sequence[bytes]) -> None:
    """Record in their dead letters that redriven messages are stored. Call after their commit and before their acknowledgement.

    An outage is ignored: the redrive sweep finds outcomes that were not recorded.
    """
    letters = [letter for redis_id in redis_ids if (letter := dead_letter_of(redis_id))]
    try:
        with connections.connect(_LONGEST_S) as conn:
            redrives.stored(conn, letters)
    except Outage as error:
        log.warning("redrive_outcome_unsettled", count=len(letters), error=error)
