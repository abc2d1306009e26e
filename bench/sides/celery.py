"""Celery on Redis: a task stores each message in its own transaction and acknowledges it afterwards."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from celery import Celery
from sqlalchemy import Engine, create_engine

from bench import rows
from models.settings import settings

app = Celery("bench", broker=settings().redis_url.get_secret_value())
# Recommended for many short tasks: docs.celeryq.dev/en/stable/userguide/optimizing.html
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    worker_prefetch_multiplier=128,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
)


@cache
def engine() -> Engine:
    """Make an engine for each worker process, after the fork."""
    return create_engine(settings().database_url.get_secret_value().replace("postgresql://", "postgresql+psycopg://"))


@app.task  # type: ignore[untyped-decorator]
def store_evaluation(event: dict[str, Any]) -> None:
    with engine().begin() as conn:
        rows.store(conn, event)


def fill(events: Iterable[dict[str, Any]]) -> None:
    with app.producer_pool.acquire(block=True) as producer:
        for event in events:
            store_evaluation.apply_async((event,), producer=producer)
