"""Measure how fast a sink delivers a backlog; Kafka beside a plain loop over the same rows with the same client.

    python -m bench.sinks [EVENTS] [kafka|clickhouse|bigquery]

It starts a PostgreSQL and the other server: a broker from .tools/kafka, or a stand-in of tests/. The numbers are those of one
run; the ratio to the plain loop is the result.
"""

import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from uuid import uuid4

import msgspec
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]
from sqlalchemy import Engine

from evalstore.local.servers import Postgres
from evalstore.sinks import config
from evalstore.sinks.runner import Runner, rest_the_collector
from evalstore.storage import database, event_store, migrations, sink_cursors
from evalstore.telemetry.counters import Counters, Schema, counted_by
from models.events import parse
from models.settings import settings
from tests import bigquery, clickhouse, kafka
from tests.sinks import table

_BATCH = 2000


def main() -> None:
    """Print events a second."""
    events = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    kind = sys.argv[2] if len(sys.argv) > 2 else "kafka"
    with tempfile.TemporaryDirectory() as name, Postgres(Path(name, "postgres")) as postgres:
        migrations.upgrade(postgres.url())
        engine = database.engine(postgres.url())
        rest_the_collector()  # for both sides
        with engine.connect() as conn:
            sink_cursors.create(conn, "main", kind)
        _fill(engine, events)
        {"kafka": _kafka, "clickhouse": _clickhouse, "bigquery": _bigquery}[kind](engine, events, Path(name))


def _kafka(engine: Engine, events: int, folder: Path) -> None:
    broker = kafka.broker(folder / "kafka")
    if broker is None:
        sys.exit("there is no broker: run .ci/run once, which fetches one")
    with broker:
        plain = _plain(engine, broker.address)
        for transactional in (False, True):
            keys = {"bootstrap_servers": broker.address, "topic": f"t-{transactional}", "transactional": transactional}
            rate = _sink(engine, events, folder, type="kafka", create_topics=True, replication_factor=1, **keys)
            print(f"transactional = {transactional}: {rate:,.0f} events/s, {rate / plain:.2f} of a plain loop's {plain:,.0f}")


def _clickhouse(engine: Engine, events: int, folder: Path) -> None:
    with clickhouse.ClickHouse(folder / "clickhouse") as server:
        os.environ["CLICKHOUSE_PASSWORD"] = clickhouse.PASSWORD
        keys = {"url": server.url, "user": clickhouse.USER, "password_env": "CLICKHOUSE_PASSWORD"}
        print(f"{_sink(engine, events, folder, type='clickhouse', create=True, **keys):,.0f} events/s")


def _bigquery(engine: Engine, events: int, folder: Path) -> None:
    with bigquery.BigQuery(folder / "bigquery") as server:
        server.client().create_dataset("d")
        print(f"{_sink(engine, events, folder, dataset='d', create=True, **server.keys):,.0f} events/s")


def _fill(engine: Engine, events: int) -> None:
    padding = "x" * 700
    with engine.connect() as conn:
        for start in range(0, events, _BATCH):
            made = [
                {
                    "type": "evaluation:completed",
                    "eval_id": f"run-{number % 20_000}",
                    "event_id": uuid4(),
                    "occurred_at": "2026-01-01T00:00:00Z",
                    "exit_code": 0,
                    "output": padding,
                    "metadata": {"n": number},
                }
                for number in range(start, start + _BATCH)
            ]
            event_store.store(conn, [parse(event) for event in made])


def _plain(engine: Engine, address: str) -> float:
    """Read the log and produce JSON, without a cursor and without order."""
    admin = AdminClient({"bootstrap.servers": address})
    admin.create_topics([NewTopic("plain", 12, 1)])["plain"].result()
    producer = Producer({"bootstrap.servers": address, "enable.idempotence": True, "acks": "all", "compression.type": "lz4"})
    began, sent = time.perf_counter(), 0
    with engine.connect() as conn, database.driver(conn).cursor(name="plain") as cursor:
        cursor.itersize = 2000
        query = """
SELECT eval_id, to_jsonb(e) - 'output' || jsonb_build_object('output', convert_from(output, 'UTF8')) FROM evaluation_events e
"""
        for eval_id, document in cursor.execute(query):
            while True:
                try:
                    producer.produce("plain", msgspec.json.encode(document), eval_id)
                    break
                except BufferError:
                    producer.poll(0.1)
            sent += 1
    producer.flush()
    return sent / (time.perf_counter() - began)


def _sink(engine: Engine, events: int, folder: Path, **keys: object) -> float:
    with engine.begin() as conn:
        conn.exec_driver_sql("UPDATE sinks SET position = 0, delivered = 0, lease_until = NULL, generation = generation + 1")
    path = folder / "sinks.toml"
    path.write_text(table(**keys))
    runner = Runner(config.load(path, settings()), engine)
    thread = threading.Thread(target=runner.run, args=(Counters(Schema(counted_by("sinks"), {})),))
    began = time.perf_counter()
    thread.start()
    with engine.connect() as conn:
        while sink_cursors.statuses(conn)[0].delivered < events:
            time.sleep(0.1)
        took = time.perf_counter() - began
    runner.stop()
    thread.join()
    return events / took


if __name__ == "__main__":
    settings()
    main()
