"""Periodic jobs. periodiq schedules them and workers run them, once for each tick however many schedulers run."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Final
from uuid import uuid4

import dramatiq
import msgspec
import redis
from dramatiq import Actor, Message
from periodiq import cron

from evalstore.storage import outbox as stored_confirmations
from evalstore.storage import overview_samples
from evalstore.storage.archive import Archive
from evalstore.telemetry import queues
from models.errors import PASSING
from models.jobs import JOBS, QUEUE
from models.logs import EventLogger
from models.settings import Settings
from tasks.broker import SendingBroker, encode
from worker import archive_jobs, confirmation_relay, dead_letter_mover, lake_job, lost, redrive_job, replay_job
from worker.broker import Broker
from worker.metrics import WorkerMetrics
from worker.time_budget import time_budget
from worker.verified_database import VerifiedDatabase

# Less than WORK_S, with the time to connect.
_LONGEST_S: Final = 15.0
# Longer than other turns, because each search for stalled evaluations reads all running evaluations. Less than _LONGEST_S.
_LOST_TURN_S: Final = 10.0

log = EventLogger("evalstore.worker")


class _Periodic(dramatiq.Middleware):
    """Allows the option that periodiq reads. periodiq's own middleware drops retried jobs as too old."""

    @property
    def actor_options(self) -> set[str]:
        return {"periodic"}


class _TickActor(Actor[[], None]):
    """An actor whose scheduled message is sent once for each minute, however many schedulers run."""

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
            broker.lua.run("tick", [tick, keys.queue, keys.bodies], redis_id, encode(message))
        except redis.RedisError as error:
            # An exception would end the scheduler. The next tick does the same work.
            log.warning("job_not_scheduled", job=self.actor_name, error=error)
        return message


def declare(
    broker: Broker, connections: VerifiedDatabase, settings: Settings, *, on_tick: Callable[[], None] = lambda: None
) -> None:
    """Declare the periodic jobs on `broker`. `on_tick` is called whenever this process schedules one."""
    broker.add_middleware(_Periodic())
    jobs = _Jobs(broker, connections, settings)
    for job in JOBS:
        declared = dramatiq.actor(
            actor_name=job.name, actor_class=_TickActor, queue_name=QUEUE, broker=broker, periodic=cron(job.schedule)
        )
        actor: Any = declared(_record_run(broker, broker.metrics, broker.process, job.name, getattr(jobs, job.name)))
        actor.on_tick = on_tick
    redrive_job.declare(broker, connections, broker.lua, broker.in_flight)
    replay_job.declare(broker, connections, broker.in_flight, archive_jobs.Progress(connections, broker.metrics))


class _Jobs:
    """The work of each job, by its name. Each run is bounded in time, and leaves the rest to the next run."""

    def __init__(self, broker: Broker, connections: VerifiedDatabase, settings: Settings) -> None:
        self._broker, self._connections, self._settings = broker, connections, settings
        self._metrics, self._scripts = broker.metrics, broker.lua
        self._progress = archive_jobs.Progress(connections, broker.metrics)

    def relay_confirmations(self) -> dict[str, int]:
        counters = self._metrics.counters
        with self._connections.connect(_LONGEST_S) as conn:
            return {
                "relayed": confirmation_relay.relay(conn, self._broker.names, self._scripts, counters, go_on=time_budget()),
                "forgotten": stored_confirmations.forget(conn, max_age_s=self._settings.outbox_max_age_s),
            }

    def mark_lost_evaluations(self) -> dict[str, int]:
        with self._connections.connect(_LONGEST_S) as conn:
            return lost.run_once(conn, self._broker, self._settings, self._metrics, go_on=time_budget(_LOST_TURN_S))

    def archive_large_outputs(self) -> dict[str, Any]:
        self._progress.begin()
        with self._connections.connect(archive_jobs.STEP_S) as conn:
            return archive_jobs.move(conn, self._archive, self._broker.in_flight, self._metrics, self._progress)

    def sweep_objects(self) -> dict[str, Any]:
        self._progress.begin()
        with self._connections.connect(archive_jobs.STEP_S) as conn:
            return archive_jobs.sweep(conn, self._broker, self._settings, self._progress)

    def maintain_lake(self) -> dict[str, Any]:
        return lake_job.maintain(self._settings, self._metrics)

    def move_dead_letters(self) -> dict[str, int]:
        with self._connections.connect(_LONGEST_S) as conn:
            moved = dead_letter_mover.move(conn, self._broker, self._scripts, go_on=time_budget())
            return {"moved": moved, **redrive_job.sweep(conn, self._broker, self._settings.max_content_bytes)}

    def continue_replays(self) -> dict[str, int]:
        with self._connections.connect(_LONGEST_S) as conn:
            return replay_job.run_once(conn, self._broker)

    def sample_overview(self) -> dict[str, float]:
        seen = queues.snapshot(self._broker)
        with self._connections.connect(_LONGEST_S) as conn:
            return overview_samples.add(conn, queues.totals(seen))

    @cached_property
    def _archive(self) -> Archive | None:
        return archive_jobs.archive_of(self._settings)


def _record_run(
    broker: SendingBroker, metrics: WorkerMetrics, process: str, name: str, work: Callable[[], Any]
) -> Callable[[], None]:
    """Return a function that does `work` and records the run in Redis: its start, its duration and its outcome."""

    def run() -> None:
        started = time.time()
        told = {"started_at": datetime.now(UTC), "host": process.partition("|")[0]}
        try:
            told |= {"outcome": "ok", "result": work()}
        except Exception as error:
            told |= {"outcome": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
            # The next tick tries again. Dramatiq's retry would log a traceback each time.
            if not isinstance(error, PASSING):
                raise
        finally:
            told["seconds"] = round(time.time() - started, 3)
            metrics.counters.add("evalstore_job_runs_total", name, str(told["outcome"]))
            try:
                broker.client.hset(broker.names.last_runs, name, msgspec.json.encode(told))
                if told["outcome"] == "ok":
                    broker.client.hset(broker.names.last_successes, name, time.time())
            except redis.RedisError as error:
                log.warning("job_status_not_published", job=name, error=error)

    run.__module__, run.__name__ = __name__, name
    return run
