"""Measure how fast a Kafka sink delivers a backlog, beside a plain loop over the same rows with the same client.

    python -m bench.sinks [EVENTS]

It starts a PostgreSQL and, from .tools/kafka, a broker of its own. The numbers are those of one run; their ratio is the result.
"""

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
from tests import kafka

_BATCH = 2000


def main() -> None:
    """Print events a second of both."""
    events = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder, Postgres(Path(folder, "postgres")) as postgres:
        broker = kafka.broker(Path(folder, "kafka"))
        if broker is None:
            sys.exit("there is no broker: run .ci/run once, which fetches one")
        with broker:
            migrations.upgrade(postgres.url())
            engine = database.engine(postgres.url())
            rest_the_collector()  # for both sides
            with engine.connect() as conn:
                sink_cursors.create(conn, "main", "kafka")
            _fill(engine, events)
            plain = _plain(engine, broker.address)
            for transactional in ("false", "true"):
                rate = _sink(engine, broker.address, events, transactional, Path(folder))
                print(
                    f"transactional = {transactional}: {rate:,.0f} events/s, {rate / plain:.2f} of a plain loop's {plain:,.0f}"
                )


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


def _sink(engine: Engine, address: str, events: int, transactional: str, folder: Path) -> float:
    with engine.begin() as conn:
        conn.exec_driver_sql("UPDATE sinks SET position = 0, delivered = 0, lease_until = NULL, generation = generation + 1")
    path = folder / "sinks.toml"
    path.write_text(
        f'[main]\ntype = "kafka"\nbootstrap_servers = "{address}"\ntopic = "t-{transactional}"\ncreate_topics = true\n'
        f"replication_factor = 1\ntransactional = {transactional}\n"
    )
    runner = Runner(config.load(path), engine)
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
