"""What becomes of an event can be followed in one trace, from its sender to whoever is told; where nobody asks, nothing is."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from evalstore.local.servers import Postgres
from evalstore.storage import migrations
from tests.chaos.relay import ROOT
from tests.chaos.world import KEYS, World, wait_until
from tests.integration.conftest import Api
from tests.integration.otlp import Collector, Read, a_collector
from tests.integration.shell import Operator, body, event

collector = pytest.fixture(a_collector)

# Where OpenTelemetry is installed, redis-py imports some of it by itself.
GATEWAY = """
import json, redis, sys
before = set(sys.modules)
from tasks import store_evaluation, store_evaluations
events = json.loads(sys.argv[1])
store_evaluation.send(events[0]) if len(events) == 1 else store_evaluations(events)
print(*(name for name in set(sys.modules) - before if name.startswith("opentelemetry")))
"""
WORKER = """
import redis, sys
before = set(sys.modules)
from dramatiq import Worker
from worker.tasks import broker
worker = Worker(broker, worker_threads=1)
worker.start()
broker.join("evaluations")
worker.stop()
assert not [name for name in set(sys.modules) - before if name.startswith("opentelemetry")]
"""
STARTED = """
import sys
from dramatiq import Worker
from worker.tasks import broker
worker = Worker(broker, worker_threads=1)
worker.start()
print("opentelemetry.sdk.trace" in sys.modules)
worker.stop()
"""
CONSUMER = """
import sys
from opentelemetry import trace
from tasks.confirmations import Confirmations
for confirmation in Confirmations("billing", idle_s=0.1):
    print(confirmation["eval_id"], format(trace.get_current_span().get_span_context().trace_id, "032x"))
"""


def run(world: World, program: str, *words: str, **environment: str) -> str:
    """What a program prints that uses the servers of `world`."""
    addresses = {"EVALSTORE_REDIS_URL": world.redis_url, "EVALSTORE_DATABASE_URL": world.database_url}
    env = {**os.environ, **addresses, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", program, *words], env=env, check=True, capture_output=True, text=True)
    return done.stdout


class Traced:
    """A world whose processes send their traces to a collector."""

    def __init__(self, postgres: Postgres, redis_url: str, folder: Path, collector: Collector) -> None:
        migrations.upgrade(postgres.url())
        self.postgres, self.collector = postgres, collector
        self.world = World(postgres.url(), redis_url, folder)
        self.operator = Operator(postgres.url(), redis_url, folder)
        given: dict[str, Any] = {**collector.environment}
        self.workers = self.world.workers(**given)

    def run(self, program: str, *words: str, **environment: str) -> str:
        return run(self.world, program, *words, **environment)

    def send(self, *events: dict[str, Any]) -> str:
        """As a gateway that is traced; returns the id of the trace."""
        before = {one.trace_id for one in self.collector.spans("send evaluations")}
        service = {"OTEL_SERVICE_NAME": "gateway"}
        self.run(GATEWAY, json.dumps(events), **self.collector.environment, **service)
        (new,) = {one.trace_id for one in self.collector.spans("send evaluations")} - before
        return new

    def heard(self) -> list[str]:
        """What a consumer of confirmations, which is traced, prints."""
        service = {"OTEL_SERVICE_NAME": "billing"}
        return self.run(CONSUMER, **self.collector.environment, **service).splitlines()

    def wait_for(self, name: str, number: int, trace_id: str | None = None) -> list[Read]:
        wait_until(lambda: len(self.collector.spans(name, trace_id=trace_id)) >= number, what=f"{number} spans: {name}")
        return self.collector.spans(name, trace_id=trace_id)


@pytest.fixture
def traced(postgres_server: Postgres, redis_url: str, tmp_path: Path, collector: Collector) -> Iterator[Traced]:
    made = Traced(postgres_server, redis_url, tmp_path, collector)
    yield made
    made.world.close()
    for workers in made.world.fleet:
        if workers.log.exists():
            print(workers.log.read_text(errors="replace")[-6000:])


def test_one_trace_tells_it_all_from_sender_to_consumer_through_an_outage_and_a_redrive(traced: Traced) -> None:
    traced.workers.start()
    traced.world.raw(body(traced.world, event(1, output="first")))  # as stock clients send, without a trace
    wait_until(lambda: traced.world.applied() == 1, what="the first is stored")
    traced.postgres.kill()
    trace_id = traced.send(event(1))
    wait_until(lambda: "holding 1 events" in traced.workers.log.read_text(), what="the event is held")
    traced.postgres.start()
    wait_until(lambda: len(traced.operator.letters()) == 1, what="the same event_id with another body is a dead letter")
    with psycopg.connect(traced.world.database_url) as conn:
        conn.execute("DELETE FROM evaluation_events")
        conn.execute("DELETE FROM evaluations")
    for number in (20, 21):  # so that the version to come is above the one that was confirmed
        traced.world.raw(body(traced.world, event(1, event_id=str(UUID(int=number)))))
    wait_until(lambda: traced.world.applied() == 2, what="the others are stored")
    redriven = traced.operator.dlq("redrive", traced.operator.letters()[0]["id"], "--yes")
    assert redriven.status == 0, redriven.err
    died, stored = traced.wait_for("store evaluation", 2, trace_id)
    assert f"run-1 {trace_id}" in traced.heard()

    (sent,) = traced.collector.spans("send evaluations", trace_id=trace_id)
    (heard,) = traced.wait_for("process evalstore:confirmations", 1, trace_id)
    assert len(traced.collector.spans(trace_id=trace_id)) == 4
    assert [one.service for one in (sent, died, stored, heard)] == ["gateway", *["evalstore-worker"] * 2, "billing"]
    assert [one.kind for one in (sent, died, stored, heard)] == ["PRODUCER", *["CONSUMER"] * 3]
    assert [died.parent_id, stored.parent_id, heard.parent_id] == [sent.span_id, sent.span_id, stored.span_id]
    assert heard.links == [stored.key]
    assert [one.is_error for one in (sent, died, stored, heard)] == [False, True, False, False]
    assert set(died.errors) == {"DatabaseOutage", "EventIdReused"}
    assert (died.attributes["evalstore.outcome"], stored.attributes["evalstore.outcome"]) == ("dead", "applied")
    assert stored.attributes["evalstore.redriven"] is True
    assert {one.attributes["evalstore.eval_id"] for one in (sent, died, stored, heard)} == {"run-1"}
    assert sent.attributes["messaging.message.id"] == str(UUID(int=2))
    assert {one.attributes["messaging.destination.name"] for one in (sent, died, stored)} == {"evaluations"}

    batch = next(one for one in traced.collector.spans("process evaluations") if one.key == died.links[0])
    assert batch.links == [sent.key]
    tries = traced.collector.spans("transaction evaluations", trace_id=batch.trace_id)
    assert {one.parent_id for one in tries} == {batch.span_id}
    assert len(tries) >= 2
    assert [one.is_error for one in tries] == [True] * (len(tries) - 1) + [False]
    assert all(one.attributes["db.system.name"] == "postgresql" for one in tries)


def test_a_batch_is_linked_to_every_event_of_it_that_is_traced(traced: Traced) -> None:
    for number in (1, 2):
        traced.send(event(number))
    traced.send(event(3), event(4))
    traced.world.raw(body(traced.world, event(5)))
    for number, traceparent in enumerate(("nonsense", 5, "00-" + "0" * 32 + "-" + "0" * 16 + "-01"), 6):
        traced.world.raw(body(traced.world, event(number), options={"traceparent": traceparent}))
    unsampled = f"00-{'ab' * 16}-{'cd' * 8}-00"
    traced.world.raw(body(traced.world, event(9, output="\ud800"), options={"traceparent": unsampled}))
    traced.workers.start()
    wait_until(lambda: traced.world.applied() == 9, what="all are stored, whatever is wrong with their traces")

    (batch,) = traced.wait_for("process evaluations", 1)
    sent = traced.collector.spans("send evaluations")
    assert batch.kind == "CONSUMER"
    assert batch.attributes["messaging.batch.message_count"] == 9
    assert sorted(batch.links) == sorted(one.key for one in sent)
    assert [one.attributes.get("messaging.batch.message_count") for one in sent] == [None, None, 2]
    each = traced.wait_for("store evaluation", 4)
    assert {(one.parent_id, one.attributes["evalstore.eval_id"]) for one in each} == {
        (span.span_id, f"run-{number}") for span, numbers in zip(sent, ((1,), (2,), (3, 4)), strict=True) for number in numbers
    }
    assert all(one.links == [batch.key] for one in each)
    wait_until(lambda: traced.world.client.xlen("evalstore:confirmations") == 9, what="all are confirmed")
    fields: dict[str, Any] = {}
    for _, entry in traced.world.client.xrange("evalstore:confirmations"):
        fields[json.loads(entry[b"confirmation"])["eval_id"]] = entry.get(b"traceparent")
    assert fields["run-9"] == unsampled.encode()  # passed on as it is
    assert [fields[f"run-{number}"] for number in range(5, 9)] == [None] * 4
    assert {fields["run-1"].decode()[3:35], fields["run-3"].decode()[3:35]} == {sent[0].trace_id, sent[2].trace_id}


def test_a_request_is_traced_by_its_route_and_its_trace_goes_on_in_what_it_writes(
    start_api: Callable[..., Api], database_url: str, redis_url: str, tmp_path: Path, collector: Collector
) -> None:
    service = start_api(**collector.environment)
    given: dict[str, Any] = {**collector.environment}
    world = World(database_url, redis_url, tmp_path)
    try:
        world.workers(**given).start()
        at_once, later = "aa" * 16, "bb" * 16
        headers = {"traceparent": f"00-{at_once}-{'cd' * 8}-01"}
        assert service.both.post("/storage/evaluations", json={"eval_id": "e", "code": "1"}, headers=headers).status_code == 201
        headers = {"traceparent": f"00-{later}-{'cd' * 8}-01", "Prefer": "respond-async"}
        assert service.both.put("/storage/evaluations/e", json={"status": "running"}, headers=headers).status_code == 202
        assert service.both.get("/storage/evaluations/nobody").status_code == 404
        assert service.nobody.get("/health/live").status_code == 200
        wait_until(lambda: world.client.xlen("evalstore:confirmations") == 2, what="both are confirmed")
        run(world, CONSUMER, **collector.environment, OTEL_SERVICE_NAME="billing")
        wait_until(lambda: len(collector.spans("process evalstore:confirmations")) == 2, what="both are read")
        wait_until(lambda: len(collector.spans("store evaluation")) == 1, what="the event is traced")
        wait_until(lambda: collector.spans("GET /storage/evaluations/{eval_id}"), what="the last request is traced")
    finally:
        world.close()

    def chain(trace_id: str) -> list[tuple[str, str, str]]:
        spans = {one.parent_id: one for one in collector.spans(trace_id=trace_id)}
        found, at = [], "cd" * 8
        while at in spans:
            found.append((spans[at].service, spans[at].kind, spans[at].name))
            at = spans[at].span_id
        assert len(found) == len(spans)
        return found

    heard = ("billing", "CONSUMER", "process evalstore:confirmations")
    assert chain(at_once) == [
        ("evalstore-api", "SERVER", "POST /storage/evaluations"),
        ("evalstore-api", "CLIENT", "transaction evaluations"),
        heard,
    ]
    assert chain(later) == [
        ("evalstore-api", "SERVER", "PUT /storage/evaluations/{eval_id}"),
        ("evalstore-api", "PRODUCER", "send evaluations"),
        ("evalstore-worker", "CONSUMER", "store evaluation"),
        heard,
    ]
    served = [one for one in collector.spans() if one.kind == "SERVER"]
    assert [one.attributes["http.response.status_code"] for one in served] == [201, 202, 404]
    assert not any(one.is_error for one in served)


def test_where_nobody_asks_nothing_is_traced_or_imported(traced: Traced) -> None:
    assert traced.run(GATEWAY, json.dumps([event(1)])).split() == []
    (message,) = traced.world.client.hvals(KEYS.bodies)
    assert list(json.loads(message)["options"]) == ["redis_message_id"]
    for off in ({"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}):
        assert traced.run(GATEWAY, json.dumps([event(2)]), **traced.collector.environment, **off).split() == []
    traced.run(WORKER)
    assert traced.world.applied() == 2
    assert traced.collector.spans() == []


def test_a_worker_loads_what_it_traces_with_before_its_first_event(traced: Traced) -> None:
    assert traced.run(STARTED, **traced.collector.environment) == "True\n"
    assert traced.run(STARTED) == "False\n"


def test_a_collector_that_is_away_costs_no_event(traced: Traced, eventually: Callable[..., None]) -> None:
    workers = traced.world.workers(
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", OTEL_BSP_SCHEDULE_DELAY="50", EVALSTORE_BATCH_EVENTS="2"
    )
    workers.start()
    traced.world.send([event(number) for number in range(200)])
    eventually(lambda: traced.world.applied() == 200, within_s=30)
    began = time.monotonic()
    workers.stop()
    assert time.monotonic() - began < 15
