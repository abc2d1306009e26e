"""taskiq on a Redis stream, its broker that acknowledges: a task that stores each message in a transaction of its own."""

import asyncio
import os
from collections.abc import Iterable
from typing import Any

from sqlalchemy.ext.asyncio import create_async_engine
from taskiq_redis import RedisStreamBroker

from bench import rows
from models.settings import settings

broker = RedisStreamBroker(url=settings().redis_url.get_secret_value(), xread_count=100)
engine = create_async_engine(
    settings().database_url.get_secret_value().replace("postgresql://", "postgresql+psycopg://"),
    pool_size=int(os.environ.get("BENCH_THREADS", "10")),
)


@broker.task
async def store_evaluation(event: dict[str, Any]) -> None:
    async with engine.begin() as conn:
        await rows.store_async(conn, event)


def fill(events: Iterable[dict[str, Any]]) -> None:
    async def enqueue() -> None:
        await broker.startup()
        for event in events:
            await store_evaluation.kiq(event)
        await broker.shutdown()

    asyncio.run(enqueue())
