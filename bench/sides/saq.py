"""SAQ: a coroutine that stores each message in a transaction of its own."""

import asyncio
import os
from collections.abc import Iterable
from typing import Any

from saq import Queue
from sqlalchemy.ext.asyncio import create_async_engine

from bench import rows
from models.settings import settings

_JOBS = int(os.environ.get("BENCH_THREADS", "10"))
queue = Queue.from_url(settings().redis_url.get_secret_value())


async def store_evaluation(ctx: dict[str, Any], *, event: dict[str, Any]) -> None:
    async with ctx["engine"].begin() as conn:
        await rows.store_async(conn, event)


async def _startup(ctx: dict[str, Any]) -> None:
    url = settings().database_url.get_secret_value().replace("postgresql://", "postgresql+psycopg://")
    ctx["engine"] = create_async_engine(url, pool_size=_JOBS)


worker_settings = {"queue": queue, "functions": [store_evaluation], "concurrency": _JOBS, "startup": _startup}


def fill(events: Iterable[dict[str, Any]]) -> None:
    async def enqueue() -> None:
        await queue.connect()
        for event in events:
            await queue.enqueue("store_evaluation", event=event, ttl=-1, retries=3)
        await queue.disconnect()

    asyncio.run(enqueue())
