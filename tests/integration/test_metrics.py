"""What the endpoints show is true: each metric says what a test did, also after restarts, and nothing is off the list."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any
from uuid import UUID

import pytest
import redis

from evalstore.local.servers import Postgres, Valkey
from evalstore.storage.migrations import upgrade
from models.logs import LOGS
from models.metrics import METRICS, TYPES
from tests.integration.commands import python
from tests.integration.watched import SCHEDULER, STICKING, WORKER, Seen, Watched
from tests.integration.watched import seen as read

Start = Callable[..., Watched]
Eventually = Callable[..., None]
# Like `uvicorn --workers 2`, at a port that the test knows.
TWO_SERVICES = """
import os, uvicorn
if __name__ == "__main__":
    uvicorn.run("evalstore.api.app:app", host="127.0.0.1", port=int(os.environ["EVALSTORE_API_PORT"]), workers=2)
"""
EVENTS = "evalstore_events_total"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(WORKER, NAME=value, …)`: those processes, with these settings."""
    with ExitStack() as running:

        def start_one(command: tuple[str, ...], **environment: str) -> Watched:
            role = "SCHEDULER_METRICS" if command is SCHEDULER else "METRICS"
            log = tmp_path / f"{role}.log"
            given = {"EVALSTORE_RUNTIME_DIR": str(tmp_path / "run"), **environment}
            one = Watched(command, given, log, f"EVALSTORE_{role}_PORT")
            running.callback(one.stop)
            return one.start()

        yield start_one


def addresses(database_url: str, redis_url: str) -> dict[str, str]:
    return {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}


def send(redis_url: str, *events: object) -> None:
    """As any sender does, without a check."""
    with redis.Redis.from_url(redis_url) as client:
        for event in events:
            message_id = str(UUID(bytes=os.urandom(16)))
            fields: dict[str, Any] = {
                "queue_name": "evaluations",
                "actor_name": "store_evaluation",
                "args": [event],
                "kwargs": {},
            }
            fields |= {"options": {"redis_message_id": message_id}, "message_id": message_id}
            fields |= {"message_timestamp": int(time.time() * 1000)}
            client.hset("dramatiq:evaluations.msgs", message_id, json.dumps(fields))
            client.rpush("dramatiq:evaluations", message_id)


def queued(number: int, **fields: Any) -> dict[str, Any]:
    common = {"type": "evaluation:queued", "eval_id": f"e{number}", "event_id": str(UUID(int=number + 1)), "code": "c"}
    return common | {"occurred_at": "2026-01-31T09:30:00Z"} | fields


def ended(number: int, event: int, **fields: Any) -> dict[str, Any]:
    return {**queued(number), "event_id": str(UUID(int=10_000 + event)), **fields} | {"code": None}


def evalstore(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*python(), "-m", "evalstore.cli.app", *words]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60)


def test_what_was_done_is_what_is_counted_after_restarts_too(
    start: Start, database_url: str, redis_url: str, eventually: Eventually
) -> None:
    servers = addresses(database_url, redis_url)
    worker = start(WORKER, **servers)
    settled: Any = {"eventually": eventually, "what": "the counts"}
    first = worker.until(lambda seen: seen("evalstore_consumers", queue="evaluations") == 2, **settled)
    check_list(first, {"worker", "any", "servers"})
    assert {first(EVENTS, outcome=outcome, type=type_) for outcome in ("applied", "duplicate", "dead") for type_ in TYPES} == {
        0
    }

    send(redis_url, *(queued(number) for number in range(200)))
    worker.until(lambda seen: seen(EVENTS, outcome="applied", type="evaluation:queued") == 200, **settled)
    send(redis_url, *(queued(number) for number in range(7)))  # Repeats.
    send(redis_url, queued(3, code="another-code"), *(queued(number, surprise=1, eval_id="") for number in range(36)))
    send(redis_url, ended(1, 1, type="evaluation:completed", exit_code=0), ended(1, 2, type="evaluation:failed", error="no"))

    def is_counted(seen: Seen) -> bool:
        return (
            seen(EVENTS, outcome="duplicate", type="evaluation:queued") == 7
            and seen(EVENTS, outcome="dead", type="evaluation:queued") == 37
            and seen(EVENTS, outcome="applied", type="evaluation:completed") == 1
            and seen(EVENTS, outcome="applied", type="evaluation:failed") == 1
            and seen("evalstore_conflicting_results_total") == 1
            and seen("evalstore_dead_letters", reason="InvalidEvent", state="dead") == 36
            and seen("evalstore_dead_letters", reason="EventIdReused", state="dead") == 1
            and seen("evalstore_queue_messages", queue="evaluations", state="dead") == 37
            and seen("evalstore_queue_messages", queue="evaluations", state="ready") == 0
            and seen("evalstore_queue_oldest_age_seconds", queue="evaluations") == 0
            and (seen("evalstore_confirmations_relayed_total") or 0) >= 201
            and seen("evalstore_confirmations_pending") == 0
            and seen("evalstore_evaluations_open", status="queued") == 199
        )

    seen = worker.until(is_counted, **settled)
    assert seen("evalstore_event_latency_seconds_count", since="occurred") == pytest.approx(202)
    assert seen("evalstore_event_latency_seconds_count", since="sent") == pytest.approx(202)
    # The event occurred in January.
    assert (seen("evalstore_event_latency_seconds_bucket", since="occurred", le="86400.0") or 0) == 0
    assert (seen("evalstore_event_latency_seconds_bucket", since="sent", le="60.0") or 0) == pytest.approx(202)
    assert seen("evalstore_batch_events_sum") == 200 + 7 + 37 + 2
    phases = ("decode", "connect", "write", "commit", "acknowledge")
    assert all((seen("evalstore_store_duration_seconds_count", phase=phase) or 0) > 0 for phase in phases)
    assert seen("evalstore_dead_letters_oldest_age_seconds", reason="InvalidEvent") != 0

    (endpoint := worker.endpoint).kill()
    endpoint.wait()
    worker.until(is_counted, **settled)  # Another process answers for the group.
    assert "the metrics endpoint exited" in worker.log.read_text()
    worker.workers[0].send_signal(SIGKILL)  # Dramatiq's master then ends all workers, and a supervisor restarts it.
    eventually(lambda: worker.process and worker.process.poll() is not None, within_s=30, what="the end of the worker")
    worker.start()
    worker.until(is_counted, **settled)
    send(redis_url, *(queued(number, eval_id="/") for number in range(3)))
    worker.until(lambda seen: seen(EVENTS, outcome="dead", type="evaluation:queued") == 40, **settled)

    worker.kill()
    scheduler = start(SCHEDULER, **servers)
    send(redis_url, *(queued(number) for number in range(300, 305)))
    seen = scheduler.until(lambda seen: seen("evalstore_consumers", queue="evaluations") == 0, **settled)  # nobody consumes
    check_list(seen, {"any", "servers"})
    assert seen("evalstore_queue_messages", queue="evaluations", state="ready") == 5
    assert 0 < (seen("evalstore_queue_oldest_age_seconds", queue="evaluations") or 0) < 60
    assert seen("evalstore_queue_messages", queue="evaluations", state="dead") == 40
    assert (seen("evalstore_queue_messages", queue="jobs", state="ready") or 0) >= 3  # Messages of the scheduler.
    worker.start()
    worker.until(lambda seen: seen(EVENTS, outcome="applied", type="evaluation:queued") == 205, **settled)
    redriven = evalstore("dlq", "redrive", "--error-class", "InvalidEvent", "--yes", "--reason", "to see", **servers)
    assert redriven.returncode == 1, redriven.stderr  # All died again.
    seen = worker.until(lambda seen: seen("evalstore_redriven_letters_total", outcome="died") == 39, **settled)
    assert seen("evalstore_redrives_running") == 0
    seen = worker.until(lambda seen: seen.total("evalstore_job_runs_total", outcome="ok") >= 3, **settled)
    check_log(worker.log.read_text())
    assert time.time() - (seen("evalstore_job_last_success_timestamp_seconds", job_name="relay_confirmations") or 0) < 120
    assert 0 < (seen("evalstore_job_next_run_timestamp_seconds", job_name="relay_confirmations") or 0) - time.time() <= 60


def check_log(log: str) -> None:
    """JSON but for what Dramatiq's master says; dead letters are named, and nothing is told of what they hold."""
    lines = [json.loads(line) for line in log.splitlines() if not line.startswith("[")]
    told = [line for line in lines if line["event"] == "dead_letter"]
    assert {"InvalidEvent", "EventIdReused"} <= {line["error_class"] for line in told}
    assert {line["eval_id"] for line in told if line["error_class"] == "EventIdReused"} == {"e3"}
    assert {line["event"] for line in lines} <= {entry.name for entry in LOGS} | {"library"}
    assert "another-code" not in log


def check_list(seen: Seen, sources: set[str]) -> None:
    """What is shown is on the list, with the labels and type that this says; and nothing is missing."""
    shown = {name if kind != "counter" else f"{name}_total": kind for name, kind in seen.types.items()}
    listed = {one.name: one.kind for one in METRICS if one.source in sources and not re.search("_(spool|disk|sink)_", one.name)}
    assert shown == listed
    labels = {one.name: set(one.labels) for one in METRICS}
    for name, having in seen.values:
        family = next(one for one in labels if name in {one, f"{one}_bucket", f"{one}_sum", f"{one}_count"})
        assert {label for label, _ in having} - {"le"} == labels[family], name


def test_a_server_that_is_stopped_or_frozen_shows_and_nothing_else_does(
    start: Start, postgres_server: Postgres, valkey_server: Valkey, eventually: Eventually
) -> None:
    upgrade(postgres_server.url())
    servers = addresses(postgres_server.url(), valkey_server.url())
    worker, scheduler = start(WORKER, **servers), start(SCHEDULER, **servers)
    both = (worker, scheduler)
    for one in both:
        eventually(lambda one=one: one.health("ready") == 200, within_s=60, what="the start")

    def shows(name: str, still: str) -> None:
        for one in both:
            eventually(lambda one=one: one.health("ready") == 503, within_s=20, what=f"that {name} is away")
            seen = one.scrape()
            assert seen("evalstore_server_up", server=name) == 0
            assert seen("evalstore_server_up", server=still) == 1
            assert seen.seconds < 5
            held = {"redis": "evalstore_consumers", "postgresql": "evalstore_confirmations_pending"}
            assert seen.total(held[still]) == {"redis": 4, "postgresql": 0}[still]  # Two processes and two queues.
            assert held[name] not in seen.types
        assert evalstore("health", "--ready", **servers).returncode == 7

    def comes_back() -> None:
        for one in both:
            eventually(lambda one=one: one.health("ready") == 200, within_s=30, what="the recovery")

    for server, name, still in ((postgres_server, "postgresql", "redis"), (valkey_server, "redis", "postgresql")):
        server.kill()
        shows(name, still)
        server.start()
        comes_back()
    send(valkey_server.url(), queued(1))
    worker.until(lambda seen: seen.total(EVENTS, outcome="applied") == 1, eventually=eventually, what="the event")

    frozen_at = time.monotonic()
    postgres_server.freeze()
    send(valkey_server.url(), queued(3))  # So that a thread waits with messages in flight.
    with redis.Redis.from_url(valkey_server.url()) as client:
        eventually(lambda: client.llen("dramatiq:evaluations") == 0, what="that the event is taken")
    valkey_server.freeze()
    try:
        send_later = queued(2)
        while time.monotonic() < frozen_at + 35:
            time.sleep(1)  # Nothing may change.
            assert [one.health("live") for one in both] == [200, 200]
            assert evalstore("health", "--live", EVALSTORE_RUNTIME_DIR=worker.env["EVALSTORE_RUNTIME_DIR"]).returncode == 0
        assert [one.health("ready") for one in both] == [503, 503]
    finally:
        for server in (valkey_server, postgres_server):
            server.thaw()
    comes_back()
    send(valkey_server.url(), send_later)
    seen = worker.until(lambda seen: seen.total(EVENTS, outcome="applied") == 3, eventually=eventually, what="the events")
    assert (seen("evalstore_outage_seconds_total", server="redis") or 0) > 25
    worker.until(lambda seen: seen.total("evalstore_outage") == 0, eventually=eventually, what="the end of the outages")


def test_what_is_stuck_shows_within_half_a_minute(
    start: Start, database_url: str, redis_url: str, eventually: Eventually
) -> None:
    servers = addresses(database_url, redis_url)
    worker, scheduler = start(STICKING, **servers), start(SCHEDULER, **servers)
    runtime = {"EVALSTORE_RUNTIME_DIR": worker.env["EVALSTORE_RUNTIME_DIR"]}
    for one in (worker, scheduler):
        eventually(lambda one=one: one.health("live") == 200, within_s=60, what="the start")
    health = evalstore("health", "--live", **runtime)
    assert health.returncode == 0
    assert scheduler.process
    assert f" {scheduler.process.pid} " in health.stdout  # In the form that `kill` accepts.

    frozen, minute = [worker.workers[0], scheduler.process], time.time() // 60
    for process in frozen:
        process.send_signal(SIGSTOP)
    eventually(lambda: worker.health("live") == 503, within_s=30, what="that a process of the worker is frozen")
    assert worker.health("ready") == 200
    assert worker.scrape()("evalstore_processes", role="worker", state="stuck") == 1
    eventually(
        lambda: evalstore("health", "--live", "--of", "scheduler", **runtime).returncode == 1, within_s=30, what="and its"
    )
    scheduled = scheduler.log.read_text().count("Scheduling")
    eventually(lambda: time.time() // 60 > minute, within_s=61, what="the time of a tick, which it sleeps through")
    for process in frozen:
        process.send_signal(SIGCONT)
    # At once, or a minute later if it was frozen before it set its alarm.
    eventually(lambda: scheduler.log.read_text().count("Scheduling") > scheduled, within_s=70, what="that tick, late")
    for one in (worker, scheduler):
        eventually(lambda one=one: one.health("live") == 200, within_s=20, what="that it goes on")

    send(redis_url, {**queued(1), "eval_id": "stick"})
    eventually(lambda: worker.health("live") == 503, within_s=45, what="that a thread of the worker is stuck")
    told = worker.get("/health/live")
    assert told
    assert any("Thread" in thread for threads in told.json()["stuck"].values() for thread in threads)
    assert [worker.health("ready"), scheduler.health("live")] == [200, 200], scheduler.get("/health/live").text  # type: ignore[union-attr]
    assert evalstore("health", "--live", "--of", "worker", **runtime).returncode == 1
    assert evalstore("health", "--live", "--of", "scheduler", **runtime).returncode == 0


def test_a_taken_port_is_a_warning_and_storing_goes_on(
    start: Start, database_url: str, redis_url: str, eventually: Eventually
) -> None:
    first = start(WORKER, **addresses(database_url, redis_url))
    eventually(lambda: first.health("live") == 200, within_s=60, what="the start")
    second = start(WORKER, **addresses(database_url, redis_url))
    second.stop()
    second.env["EVALSTORE_METRICS_PORT"] = str(first.port)
    second.start()
    eventually(lambda: "cannot serve metrics at 127.0.0.1" in second.log.read_text(), within_s=60, what="the warning")
    first.stop()
    send(redis_url, queued(1))
    eventually(lambda: _is_stored(database_url), within_s=30, what="the event")
    eventually(lambda: first.health("live") == 200, within_s=30, what="an answer, by the second, at the port that is free now")


def _is_stored(database_url: str) -> bool:
    found = evalstore("get", "e1", EVALSTORE_DATABASE_URL=database_url)
    return found.returncode == 0


def test_the_services_processes_count_together(start_api: Callable[..., Any], eventually: Eventually) -> None:
    api = start_api(command=("-c", TWO_SERVICES))
    created = [api.both.post("/storage/evaluations", json={"eval_id": f"e{number}", "code": "c"}) for number in range(20)]
    assert {answer.status_code for answer in created} == {201}
    for status in ("completed", "failed"):
        body = {"status": status, "exit_code": 0} if status == "completed" else {"status": status, "error": "no"}
        assert api.both.put("/storage/evaluations/e1", json=body).status_code == 200
    for _ in range(30):  # Each connection may reach either process.
        with api.client("both-key-0001") as client:
            assert client.get("/storage/evaluations/e2").status_code == 200
    assert api.nobody.get("/storage/evaluations/e2").status_code == 401

    scraped = read(api.nobody.get("/metrics"))
    check_list(scraped, {"api", "any"})
    record, requests = "/storage/evaluations/{eval_id}", "evalstore_http_requests_total"
    assert scraped(requests, method="POST", route="/storage/evaluations", status="201") == 20
    assert scraped(requests, method="PUT", route=record, status="200") == 2
    assert scraped(requests, method="GET", route=record, status="200") == 30
    assert scraped(requests, method="GET", route=record, status="401") == 1
    assert scraped("evalstore_http_request_duration_seconds_count", method="GET", route=record) == 31
    assert scraped("evalstore_http_events_total", outcome="applied") == 22
    assert scraped("evalstore_conflicting_results_total") == 1
    assert scraped.total("evalstore_http_record_reads_total") >= 30
    eventually(lambda: read(api.nobody.get("/metrics"))("evalstore_processes", role="api", state="live") == 2, what="both")
