"""Periodic jobs: declared for `periodiq` to schedule and for workers to run, once per tick in however many copies."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import uuid4

import dramatiq
import msgspec
import redis
from dramatiq import Actor, Message
from periodiq import cron
from sqlalchemy import Connection

from evalstore.storage import outbox as stored_confirmations
from models.errors import PASSING
from models.jobs import JOBS, QUEUE
from models.logs import EventLogger
from models.settings import settings
from tasks.broker import encode
from worker import archive_jobs, confirmation_relay, dead_letter_mover, lost, redrive_job
from worker.broker import Broker, time_budget
from worker.handler import engine

# Less than worker.metrics.WORK_S, with the time it takes to connect.
_LONGEST_S: Final = 15.0
# Each look for what is overdue goes through all that is open, so that a short turn would hardly get on. Less than _LONGEST_S.
_LOST_TURN_S: Final = 10.0

log = EventLogger("evalstore.worker")


class _Periodic(dramatiq.Middleware):
    """Knows the option that periodiq looks for. periodiq's own middleware drops retried jobs as too old."""

    @property
    def actor_options(self) -> set[str]:
        return {"periodic"}


class _TickActor(Actor[[], None]):
    """An actor whose scheduled messages are sent once for each minute, whoever else schedules it."""

    on_tick: Callable[[], None] = staticmethod(lambda: None)

    def send_with_options(
        self,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        delay: timedelta | int | None = None,
        **options: Any,
    ) -> Message[None]:
        scheduled_at = options.pop("scheduled_at", None)
        if scheduled_at is None:
            return super().send_with_options(args=args, kwargs=kwargs, delay=delay, **options)
        self.on_tick()
        minute = datetime.fromisoformat(scheduled_at).astimezone(UTC).strftime("%Y%m%dT%H%MZ")
        redis_id = str(uuid4())
        message = self.message_with_options(redis_message_id=redis_id, **options)
        broker: Any = self.broker
        keys = broker.keys(self.queue_name)
        tick = broker.names.tick(self.actor_name, minute)
        try:
            broker.run("tick", [tick, keys.queue, keys.bodies], redis_id, encode(message))
        except redis.RedisError as error:
            # The scheduler would end, and with it the other jobs. The next tick does what this one would have.
            log.warning("job_not_scheduled", job=self.actor_name, error=error)
        return message


def declare(broker: Broker, *, on_tick: Callable[[], None] = lambda: None) -> None:
    """Declare the periodic jobs on `broker`. `on_tick` is called whenever this process schedules one."""
    broker.add_middleware(_Periodic())
    work: Final[dict[str, Callable[[], Any]]] = {
        "relay_confirmations": lambda: _relay_confirmations(broker),
        "mark_lost_evaluations": lambda: _mark_lost_evaluations(broker),
        "archive_large_outputs": lambda: _archive_large_outputs(broker),
        "sweep_objects": lambda: _sweep_objects(broker),
        "move_dead_letters": lambda: _move_dead_letters(broker),
    }
    for job in JOBS:
        declared = dramatiq.actor(
            actor_name=job.name, actor_class=_TickActor, queue_name=QUEUE, broker=broker, periodic=cron(job.schedule)
        )
        actor: Any = declared(_record_run(broker, job.name, work[job.name]))
        actor.on_tick = on_tick
    redrive_job.declare(broker, engine)


def _relay_confirmations(broker: Broker) -> dict[str, int]:
    with _connection(broker) as conn:
        return {
            "relayed": confirmation_relay.relay(conn, broker, go_on=time_budget()),
            "forgotten": stored_confirmations.forget(conn),
        }


def _mark_lost_evaluations(broker: Broker) -> dict[str, int]:
    with _connection(broker) as conn:
        return lost.run_once(conn, broker, settings(), go_on=time_budget(_LOST_TURN_S))


def _archive_large_outputs(broker: Broker) -> dict[str, Any]:
    with archive_jobs.long_running(broker, engine) as conn:
        return archive_jobs.move(conn, broker)


def _sweep_objects(broker: Broker) -> dict[str, Any]:
    with archive_jobs.long_running(broker, engine) as conn:
        return archive_jobs.sweep(conn, broker)


def _move_dead_letters(broker: Broker) -> dict[str, int]:
    with _connection(broker) as conn:
        return {"moved": dead_letter_mover.move(conn, broker, go_on=time_budget()), **redrive_job.sweep(conn, broker)}


@contextmanager
def _connection(broker: Broker) -> Iterator[Connection]:
    """A connection for a while: a server that is frozen keeps no thread for longer. What is left is for the next run."""
    with engine().connect() as conn, broker.watch.bounded(conn, _LONGEST_S):
        yield conn


def _record_run(broker: Broker, name: str, work: Callable[[], Any]) -> Callable[[], None]:
    """`work`, told of in Redis: when it ran last, for how long, and how it went."""

    def run() -> None:
        started = time.time()
        told = {"started_at": datetime.now(UTC), "host": broker.process.partition("|")[0]}
        try:
            told |= {"outcome": "ok", "result": work()}
        except Exception as error:
            told |= {"outcome": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
            # The next tick does what this one would have. Tried again, all those of an outage would be, each with a traceback.
            if not isinstance(error, PASSING):
                raise
        finally:
            told["seconds"] = round(time.time() - started, 3)
            broker.metrics.counters.add("evalstore_job_runs_total", name, str(told["outcome"]))
            try:
                broker.client.hset(broker.names.last_runs, name, msgspec.json.encode(told))
                if told["outcome"] == "ok":
                    broker.client.hset(broker.names.last_successes, name, time.time())
            except redis.RedisError as error:
                log.warning("job_status_not_published", job=name, error=error)

    run.__module__, run.__name__ = __name__, name
    return run
