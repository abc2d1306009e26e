"""RQ: a job that stores each message in a transaction of its own."""

from collections.abc import Iterable
from functools import cache
from itertools import islice
from typing import Any

import redis
from rq import Queue
from sqlalchemy import Engine, create_engine

from bench import rows
from models.settings import settings


@cache
def engine() -> Engine:
    return create_engine(settings().database_url.get_secret_value().replace("postgresql://", "postgresql+psycopg://"))


def store_evaluation(event: dict[str, Any]) -> None:
    with engine().begin() as conn:
        rows.store(conn, event)


def fill(events: Iterable[dict[str, Any]]) -> None:
    remaining = iter(events)
    with redis.Redis.from_url(settings().redis_url.get_secret_value()) as client:
        queue = Queue("evaluations", connection=client)
        while some := list(islice(remaining, 500)):
            queue.enqueue_many([Queue.prepare_data(store_evaluation, (event,), result_ttl=0) for event in some])
