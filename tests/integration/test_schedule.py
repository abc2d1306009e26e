"""Periodic jobs run once per tick, in however many copies, and their last run is told."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dramatiq
import msgspec
import pendulum
import pytest
from dramatiq.middleware import Retries
from periodiq import Scheduler, cron

from evalstore.local.servers import Valkey
from models.errors import DatabaseOutage
from models.jobs import JOBS, QUEUE
from models.settings import Settings
from tasks.redrives import ACTOR
from tests.integration.commands import python
from worker import schedule
from worker.broker import Broker
from worker.verified_database import VerifiedDatabase

ROOT = Path(__file__).parents[2]
NOON = pendulum.datetime(2026, 6, 1, 12, 0, 1, tz="UTC")


@pytest.fixture
def broker(redis_url: str) -> Iterator[Broker]:
    made = Broker(url=redis_url, middleware=[Retries(min_backoff=10, max_backoff=10)])
    schedule.declare(made, VerifiedDatabase.of(Settings()), Settings())
    yield made
    made.client.close()


def jobs(broker: Broker) -> list[Any]:
    return [broker.actors[job.name] for job in JOBS]


def test_a_job_is_sent_once_for_a_tick_however_many_schedule_it(broker: Broker, redis_url: str) -> None:
    another = Broker(url=redis_url, middleware=[Retries()])
    schedule.declare(another, VerifiedDatabase.of(Settings()), Settings())

    for copy in (broker, another):
        Scheduler(jobs(copy)).send_actors(jobs(copy), NOON)
        Scheduler(jobs(copy)).send_actors(jobs(copy), NOON.add(seconds=40))  # A restart within the same minute.
    assert broker.counts(QUEUE)["ready"] == len(JOBS)

    Scheduler(jobs(broker)).send_actors(jobs(broker), NOON.add(minutes=1))
    assert broker.counts(QUEUE)["ready"] == 2 * len(JOBS)
    another.client.close()


def test_the_scheduler_outlives_an_outage(valkey_server: Valkey) -> None:
    broker = Broker(url=valkey_server.url(), timeout_s=0.5, middleware=[Retries()])
    schedule.declare(broker, VerifiedDatabase.of(Settings()), Settings())
    valkey_server.kill()

    Scheduler(jobs(broker)).send_actors(jobs(broker), NOON)

    valkey_server.start()
    Scheduler(jobs(broker)).send_actors(jobs(broker), NOON.add(minutes=1))
    assert broker.counts(QUEUE)["ready"] == len(JOBS)


@pytest.mark.parametrize("job", JOBS, ids=[job.name for job in JOBS])
def test_no_schedule_says_more_than_minutes(job: Any) -> None:
    """periodiq is wrong about Sundays, about hours around a change of clocks, and about the rest of a day it is started in."""
    minutes, *rest = job.schedule.split()
    assert rest == ["*"] * 4
    due, line = NOON, cron(job.schedule)
    for _ in range(48 * 60):
        following = line.next_valid_date(due)
        assert due < following <= due.add(minutes=60)
        assert line.validate(following)
        due = following
    assert minutes == "*" or minutes.startswith("*/")


def test_a_job_that_failed_is_tried_again_however_late(broker: Broker, eventually: Callable[..., None]) -> None:
    runs = []

    def fails_twice() -> None:
        runs.append(datetime.now(UTC))
        if len(runs) < 3:
            raise RuntimeError("not yet")

    broker.actors["relay_confirmations"].fn = schedule._record_run(
        broker, broker.metrics, "here|0", "relay_confirmations", fails_twice
    )
    yesterday = pendulum.instance(datetime.now(UTC) - timedelta(days=1))
    broker.actors["relay_confirmations"].send_with_options(scheduled_at=str(yesterday))
    worker = dramatiq.Worker(broker, worker_threads=1)
    worker.start()
    try:
        eventually(lambda: len(runs) == 3, what="the third run")
        eventually(lambda: last_run(broker)["outcome"] == "ok", what="its outcome")
    finally:
        worker.stop()


def test_a_job_that_an_outage_stops_is_left_to_its_next_tick(broker: Broker, eventually: Callable[..., None]) -> None:
    """Those of an hour without PostgreSQL would be tried every few seconds, each with its traceback in the log."""

    def finds_nobody() -> None:
        raise DatabaseOutage("away")

    broker.actors["relay_confirmations"].fn = schedule._record_run(
        broker, broker.metrics, "here|0", "relay_confirmations", finds_nobody
    )
    broker.actors["relay_confirmations"].send()
    worker = dramatiq.Worker(broker, worker_threads=1)
    worker.start()
    try:
        eventually(lambda: last_run(broker)["outcome"] == "failed", what="its outcome")
        eventually(lambda: not any(broker.counts(QUEUE).values()), what="that it is done with")
    finally:
        worker.stop()


def test_a_job_that_can_never_run_is_a_dead_letter(broker: Broker, eventually: Callable[..., None]) -> None:
    broker.actors[ACTOR].send()  # The message names no redrive.
    worker = dramatiq.Worker(broker, worker_threads=1)
    worker.start()
    try:
        eventually(lambda: broker.counts(QUEUE)["dead"] == 1, what="the letter")
    finally:
        worker.stop()


def last_run(broker: Broker) -> dict[str, Any]:
    told = broker.client.hget(broker.names.last_runs, "relay_confirmations")
    return dict(msgspec.json.decode(told)) if told else {"outcome": None}


def test_a_failed_run_is_told_as_such(broker: Broker) -> None:
    def fails() -> None:
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError):
        schedule._record_run(broker, broker.metrics, "here|0", "relay_confirmations", fails)()

    assert last_run(broker)["outcome"] == "failed"
    assert last_run(broker)["error"] == "RuntimeError: no luck"


def evalstore(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*python(), "-m", "evalstore.cli.app", *words]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60)


def test_cron_runs_a_job_now_and_lists_how_it_went(database_url: str, redis_url: str) -> None:
    addresses = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}
    worker = subprocess.Popen(
        [sys.executable, "-m", "dramatiq", "worker.tasks", "-p", "1", "-t", "2"],
        env={**os.environ, **addresses},
        stderr=subprocess.DEVNULL,
    )
    try:
        ran = evalstore("cron", "run", "mark_lost_evaluations", **addresses)
        assert ran.returncode == 0, ran.stderr
        listed = evalstore("cron", "ls", "-o", "json", **addresses)
        rows = {row["job"]: row for row in msgspec.json.decode(listed.stdout)}
        assert set(rows) == {job.name for job in JOBS}
        assert rows["mark_lost_evaluations"]["outcome"] == "ok"
        assert rows["mark_lost_evaluations"]["result"] == {"lost": 0}
        assert datetime.fromisoformat(rows["mark_lost_evaluations"]["next_run"]) > datetime.now(UTC)
    finally:
        worker.terminate()
        worker.wait(timeout=20)


def test_cron_run_of_an_unknown_job_says_which_there_are(redis_url: str) -> None:
    refused = evalstore("cron", "run", "nonsense", EVALSTORE_REDIS_URL=redis_url)

    assert refused.returncode == 3
    assert "mark_lost_evaluations" in refused.stderr


def test_a_scheduler_handles_the_order_to_stop(database_url: str, redis_url: str, tmp_path: Path, eventually: Any) -> None:
    """As the first process of a container it would otherwise ignore it until it is killed."""
    log = tmp_path / "scheduler.log"
    environment = {**os.environ, "EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}
    command = [sys.executable, "-c", "from periodiq import entrypoint; entrypoint()", "worker.tasks"]
    with log.open("wb") as output, subprocess.Popen(command, cwd=ROOT, env=environment, stderr=output) as scheduler:
        try:
            eventually(lambda: "Scheduling Actor(move_dead_letters)" in log.read_text(), what="its first jobs", within_s=60)
            scheduler.terminate()
            assert scheduler.wait(timeout=30) == 0
        finally:
            scheduler.kill()
