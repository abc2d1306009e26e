"""The operations of one process on one queue in Redis. Each method is one script or command."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import redis

from tasks.broker import SendingBroker
from tasks.connections import as_bytes
from worker.scripts import Scripts


class Fetched(NamedTuple):
    """The answer to a fetch: messages by id, groups in quarantine, remaining messages, seconds until a delayed one is due."""

    bodies: dict[bytes, bytes]
    quarantined: int
    left: int
    next_due_s: float | None


class QueueClient:
    """Moves messages of `queue` between the queue, the process's unacknowledged set, the delayed and the dead messages.

    All methods raise RedisError; call them again then. Methods that settle ignore messages that another process has reclaimed.
    """

    def __init__(self, broker: SendingBroker, scripts: Scripts, queue: str, process: str) -> None:
        self._broker, self._scripts = broker, scripts
        self.queue, self.process = queue, process
        self.keys = broker.keys(queue)
        self.unacked = self.keys.unacked_prefix + process
        self._answered = 0

    def fetch(self, max_messages: int, max_bytes: int) -> Fetched:
        """Take messages from the head of the queue. Return the same messages again until `mark_answered` is called."""
        keys = self.keys
        places = [keys.queue, keys.bodies, self.unacked, keys.delayed, keys.suspects]
        places += [keys.stock_delayed, keys.stock_delayed_bodies, keys.processes, keys.woken]
        quarantined, next_due_ms, left, ids, *along = self._scripts.run(
            "fetch", places, self._answered + 1, max_messages, max_bytes, self.process
        )
        bodies: list[Any] = along[0] if along else self._broker.client.hmget(keys.bodies, ids) if ids else []
        if without_body := [redis_id for redis_id, body in zip(ids, bodies, strict=True) if body is None]:
            self.settle(without_body)
        found = {as_bytes(one): as_bytes(body) for one, body in zip(ids, bodies, strict=True) if body is not None}
        return Fetched(found, quarantined, left, None if next_due_ms < 0 else next_due_ms / 1000)

    def fetch_quarantined(self) -> dict[bytes, bytes]:
        """Take the next group in quarantine. Return the same group again until `mark_answered` is called."""
        places = [self.keys.suspects, self.keys.bodies, self.unacked, self.keys.processes]
        found = self._scripts.run("fetch_quarantined", places, self._answered + 1, self.process)
        return {as_bytes(redis_id): as_bytes(body) for redis_id, body in zip(found[::2], found[1::2], strict=True)}

    def mark_answered(self) -> None:
        """Record that the reply to the last fetch arrived."""
        self._answered += 1

    def held(self) -> list[bytes]:
        """Return the messages that Redis assigns to this process, except those of an unanswered fetch."""
        unanswered = (self._answered + 1) * 65536  # In the unit of the scores: see lua/fetch.lua.
        found: list[bytes] = self._broker.client.zrangebyscore(self.unacked, "-inf", f"({unanswered}")  # type: ignore[assignment]
        return found

    def wait_for_message(self, seconds: float) -> None:
        """Block until the queue has a message, or until the time is up. One message wakes one waiting process.

        The message moves to a list that the next fetch of any process reads. So it survives the death of this process.
        """
        wait_s: Any = max(0.001, seconds)
        self._broker.client.blmove(self.keys.queue, self.keys.woken, wait_s, "LEFT", "RIGHT")

    def settle(self, redis_ids: Sequence[bytes]) -> None:
        """Acknowledge messages."""
        self._scripts.run("settle", [self.unacked, self.keys.bodies, self.keys.deaths], *redis_ids)

    def dead_letter(self, causes: dict[bytes, bytes]) -> None:
        """Make dead letters of messages. `causes` has the cause of each as JSON, by id."""
        keys = self.keys
        places = [self.unacked, keys.bodies, keys.dead, keys.dead_bodies, keys.causes, keys.deaths]
        self._scripts.run("dead_letter", places, *_flat(causes))

    def retry(self, redis_id: bytes, body: bytes, delay_ms: int) -> None:
        """Acknowledge a message and schedule its next attempt, with another body."""
        self._scripts.run("retry", [self.unacked, self.keys.bodies, self.keys.delayed], redis_id, body, delay_ms)

    def retry_later(self, delays_ms: dict[bytes, int]) -> None:
        """Schedule messages unchanged. The delays are by message id."""
        self._scripts.run("retry_later", [self.unacked, self.keys.delayed], *_flat(delays_ms))

    def requeue(self, redis_ids: list[bytes]) -> int:
        """Put messages of this process back at the head of the queue, in their order. Return their number."""
        given: int = self._scripts.run("requeue", [self.unacked, self.keys.queue], *redis_ids)
        return given

    def heartbeat(self, state: str, status: bytes) -> dict[str, str]:
        """Write this process's state and its status as JSON. Return the state of all processes."""
        answer = self._scripts.run("heartbeat", [self.keys.processes, self.keys.workers], self.process, state, status)
        texts = [part.decode(errors="surrogateescape") if isinstance(part, bytes) else part for part in answer]
        return dict(zip(texts[::2], texts[1::2], strict=True))

    def reclaim(self, process: str, state: str, max_deaths: int, cause: bytes) -> tuple[int, int]:
        """Take over the messages of `process`, which died in `state`. Return the number of messages, and of new dead letters.

        The number of messages is -1 if the process has written another heartbeat, or another process has reclaimed it.
        """
        keys = self.keys
        places = [keys.processes, keys.unacked_prefix + process, keys.queue, keys.bodies, keys.suspects]
        places += [keys.deaths, keys.dead, keys.dead_bodies, keys.causes, keys.workers]
        was_working = int(state.startswith("working"))
        held, dead = self._scripts.run("reclaim", places, process, state, was_working, max_deaths, cause)
        return held, dead

    def deregister(self) -> None:
        """Put back all messages of the process, and remove the process."""
        client = self._broker.client
        left: list[bytes] = client.zrange(self.unacked, 0, -1)  # type: ignore[assignment]
        if left:
            self.requeue(left)
        client.hdel(self.keys.workers, self.process)
        client.hdel(self.keys.processes, self.process)  # Last, because other processes clean up after listed processes only.

    def reset_if_readonly(self, error: redis.RedisError) -> None:
        """Drop connections to a server that is no longer the primary."""
        self._broker.reset_if_readonly(error)


def _flat(pairs: dict[bytes, Any]) -> list[Any]:
    return [part for pair in pairs.items() for part in pair]
