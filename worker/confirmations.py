"""Telling other services what was stored: the Redis stream, and a pub/sub channel for each type."""

import time
from typing import Any, Final

import msgspec
import redis
from sqlalchemy import Connection

from models.errors import RedisOutage
from storage import confirmations

STREAM: Final = "evalstore:confirmations"
KEEP_S: Final = 24 * 3600


def relay(conn: Connection, client: redis.Redis) -> int:
    """Publish all that is pending and forget what was published long ago; returns how many confirmations were published.

    Raises DatabaseOutage, RedisOutage (retry: at worst some are published again).
    """

    def publish(pending: list[dict[str, Any]]) -> None:
        oldest = int((time.time() - KEEP_S) * 1000)
        pipeline = client.pipeline(transaction=False)
        for confirmation in pending:
            body = msgspec.json.encode(confirmation)
            pipeline.xadd(STREAM, {"confirmation": body}, minid=f"{oldest}-0", approximate=True)
            pipeline.publish(confirmation["type"], body)
        try:
            pipeline.execute()
        except redis.RedisError as error:
            raise RedisOutage(str(error)) from error

    published = 0
    while found := confirmations.relay(conn, publish):
        published += found
    confirmations.forget(conn)
    return published
