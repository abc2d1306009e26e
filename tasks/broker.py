"""The sending half of the broker. Imported at the first send: it imports redis."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal
from uuid import uuid4

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import CurrentMessage, Retries, ShutdownNotifications

from models.errors import RedisOutage
from models.settings import settings


class Broker(RedisBroker):
    """Dramatiq's Redis broker, with a bulk send."""

    def enqueue_many(self, messages: Sequence[dramatiq.Message[Any]]) -> None:
        """Enqueue all in one transaction and one round trip. Raises RedisOutage; then all or none were."""
        if not messages:
            return
        copies = [message.copy(options={"redis_message_id": str(uuid4())}) for message in messages]
        pipeline = self.client.pipeline(transaction=True)
        for queue in {message.queue_name for message in copies}:
            bodies = {m.options["redis_message_id"]: m.encode() for m in copies if m.queue_name == queue}
            pipeline.hset(f"{self.namespace}:{queue}.msgs", mapping=bodies)
            pipeline.rpush(f"{self.namespace}:{queue}", *bodies)
        for message in copies:
            self.emit_before("enqueue", message, None)
        try:
            pipeline.execute()
        except redis.RedisError as error:
            raise RedisOutage(str(error)) from error
        for message in copies:
            self.emit_after("enqueue", message, None)

    def held(self, queue: str) -> Iterator[tuple[Literal["ready", "delayed", "dead"], bytes]]:
        """Every message that Redis holds for `queue`, acknowledged last: those waiting or being worked on, delayed, dead.

        A message that moves meanwhile may be given twice. Raises RedisOutage.
        """
        keys: list[tuple[Literal["ready", "delayed", "dead"], str]] = [
            ("ready", f"{queue}.msgs"),
            ("delayed", f"{queue}.DQ.msgs"),
            ("ready", f"{queue}.msgs"),  # again, for what was due in the meantime
            ("dead", f"{queue}.XQ.msgs"),
        ]
        try:
            for state, key in keys:
                for _, body in self.client.hscan_iter(f"{self.namespace}:{key}", count=500):
                    yield state, body
        except redis.RedisError as error:
            raise RedisOutage(str(error)) from error

    def counts(self, queue: str) -> dict[str, int]:
        """How many messages of `queue` are ready, in flight, delayed and dead. Raises RedisOutage."""
        pipeline = self.client.pipeline(transaction=True)
        name = f"{self.namespace}:{queue}"
        pipeline.llen(name)
        for key in ("msgs", "DQ.msgs", "XQ.msgs"):
            pipeline.hlen(f"{name}.{key}")
        try:
            ready, held, delayed, dead = pipeline.execute()
        except redis.RedisError as error:
            raise RedisOutage(str(error)) from error
        return {"ready": ready, "inflight": held - ready, "delayed": delayed, "dead": dead}


@cache
def broker() -> Broker:
    """This process's broker, made at the first call; no connection is opened before something is sent."""
    from tasks.evaluations import store_evaluation

    made = Broker(  # type: ignore[no-untyped-call]
        url=settings().redis_url.get_secret_value(),
        middleware=[ShutdownNotifications(), Retries(min_backoff=1_000, max_backoff=60_000), CurrentMessage()],
        # Dead letters wait for an operator, however long that takes.
        dead_message_ttl=100 * 365 * 86_400_000,
    )
    made.declare_actor(store_evaluation)
    return made
