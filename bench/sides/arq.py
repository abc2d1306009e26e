"""arq: a coroutine that stores each message in a transaction of its own."""

import asyncio
import os
from collections.abc import Iterable
from typing import Any, ClassVar

from arq import create_pool
from arq.connections import RedisSettings
from sqlalchemy.ext.asyncio import create_async_engine

from bench import rows
from models.settings import settings

_REDIS = RedisSettings.from_dsn(settings().redis_url.get_secret_value())
_JOBS = int(os.environ.get("BENCH_THREADS", "10"))


async def store_evaluation(ctx: dict[str, Any], event: dict[str, Any]) -> None:
    async with ctx["engine"].begin() as conn:
        await rows.store_async(conn, event)


async def _startup(ctx: dict[str, Any]) -> None:
    url = settings().database_url.get_secret_value().replace("postgresql://", "postgresql+psycopg://")
    ctx["engine"] = create_async_engine(url, pool_size=_JOBS)


class WorkerSettings:
    functions: ClassVar = [store_evaluation]
    on_startup = _startup
    redis_settings = _REDIS
    max_jobs = _JOBS
    keep_result = 0
    poll_delay = 0.05


def fill(events: Iterable[dict[str, Any]]) -> None:
    async def enqueue() -> None:
        pool = await create_pool(_REDIS)
        for event in events:
            await pool.enqueue_job("store_evaluation", event)
        await pool.aclose()

    asyncio.run(enqueue())
