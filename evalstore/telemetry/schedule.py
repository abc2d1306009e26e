"""The periodic jobs: their last run, their next run, and a run now."""

from typing import Any

import msgspec
import pendulum
import redis
from dramatiq import Message
from periodiq import cron

from models.errors import RedisOutage
from models.jobs import JOBS, QUEUE
from models.record import rfc3339
from tasks.broker import SendingBroker

Run = dict[str, Any]


def last_runs(broker: SendingBroker) -> dict[str, Run]:
    """Return the last run of each job that ran. Raises RedisOutage (retry)."""
    try:
        runs: Any = broker.client.hgetall(broker.names.last_runs)
    except redis.RedisError as error:
        raise RedisOutage(str(error)) from error
    return {name.decode(): msgspec.json.decode(run) for name, run in dict(runs).items()}


def rows(broker: SendingBroker) -> list[Run]:
    """Return each job with its last run, the outcome, and the next run. Raises RedisOutage (retry)."""
    runs = last_runs(broker)
    found: list[Run] = []
    for job in JOBS:
        last = runs.get(job.name, {})
        upcoming = cron(job.schedule).next_valid_date(pendulum.now("UTC"))
        found.append(
            {
                "job": job.name,
                "schedule": job.schedule,
                "last_run": last.get("started_at"),
                "outcome": last.get("outcome"),
                "seconds": last.get("seconds"),
                "result": last.get("result") or last.get("error"),
                "next_run": rfc3339(upcoming),
                "does": job.does,
            }
        )
    return found


def describe(result: object) -> object:
    """Describe the counts of a job, or its error."""
    return ", ".join(f"{count} {name}" for name, count in result.items()) if isinstance(result, dict) else result


def run_now(broker: SendingBroker, name: str) -> None:
    """Queue a run of a job for the next free worker. Raises RedisOutage (retry)."""
    broker.enqueue(Message(queue_name=QUEUE, actor_name=name, args=(), kwargs={}, options={}))
