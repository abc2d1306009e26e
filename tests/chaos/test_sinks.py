"""Under random deaths each sink has every event, in commit order for each evaluation; one that is away delays no other.

The whole of it: EVALSTORE_TEST_SINK_EVENTS=200000 EVALSTORE_TEST_SINK_RATE=3000 EVALSTORE_TEST_SINK_AWAY_S=300
"""

import json
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from confluent_kafka import Consumer, TopicPartition

from evalstore.local.servers import Postgres, Valkey
from evalstore.storage import migrations
from models.errors import Outage
from tasks.actor import store_evaluation
from tasks.broker import SendingBroker
from tests import kafka
from tests.chaos.world import Workers
from tests.polling import looks
from tests.sinks import Runner, firsts, received, versions

EVENTS = int(os.environ.get("EVALSTORE_TEST_SINK_EVENTS", "6000"))
RATE = int(os.environ.get("EVALSTORE_TEST_SINK_RATE", "300"))
AWAY_S = float(os.environ.get("EVALSTORE_TEST_SINK_AWAY_S", "20"))
PARTITIONS = 3


class World:
    """PostgreSQL, Valkey, Kafka, a worker and two runners, of which any may be killed."""

    def __init__(self, folder: Path, broker: kafka.Kafka) -> None:
        self.folder, self.kafka = folder, broker
        self.postgres = Postgres(folder / "postgres", settings={"synchronous_commit": "on"})
        self.valkey = Valkey(folder / "valkey")
        self._next: list[str] = []

    def __enter__(self) -> "World":
        self.postgres.start()
        self.valkey.start()
        self.kafka.start()
        migrations.upgrade(self.postgres.url())
        environment = {"EVALSTORE_DATABASE_URL": self.postgres.url(), "EVALSTORE_REDIS_URL": self.valkey.url()}
        self.workers = Workers(self.folder, environment, "worker.tasks", 1, 2)
        self.runners: list[Runner] = []
        for number in range(2):
            folder = self.folder / f"runner-{number}"
            folder.mkdir()
            self.runners.append(Runner(folder, environment, self.sinks()))
        self.workers.start()
        for runner in self.runners:
            runner.start()
        return self

    def sinks(self) -> str:
        address = f'bootstrap_servers = "{self.kafka.address}"\ncreate_topics = true\nreplication_factor = 1\n'
        tables = [
            f'[{name}]\ntype = "kafka"\ntopic = "{name}"\npartitions = {PARTITIONS}\ntransactional = {once}\n{address}'
            for name, once in (("plain", "false"), ("once", "true"))
        ]
        own = [f'[{name}]\ntype = "steered"\npath = "{self.folder / name}"\n' for name in ("own", "away")]
        return "".join([*tables, *own])

    def __exit__(self, *_: object) -> None:
        for runner in self.runners:
            runner.kill()
            print(f"--- {runner.log}\n{runner.log.read_text()[-3000:]}")
        self.workers.kill()
        for server in (self.kafka, self.valkey, self.postgres):
            server.stop()

    def kill_one(self, chance: random.Random) -> str:
        """Kill something at random, and start it again after a moment."""
        if not self._next:
            self._next = ["runner", "worker", "runner", "postgres", "kafka"]
            chance.shuffle(self._next)
        what = self._next.pop()
        victim: Any = {"runner": chance.choice(self.runners), "worker": self.workers}.get(what) or getattr(self, what)
        victim.kill()
        time.sleep(chance.uniform(0.1, 1.0))
        victim.start(**({"wait": False} if what == "worker" else {}))
        return what


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    broker = kafka.broker(tmp_path / "kafka")
    if type(broker) is not kafka.Kafka:
        pytest.skip(f"kills need Apache Kafka: {kafka.described()}")
    with World(tmp_path, broker) as made:
        yield made


def consumed(server: kafka.Kafka, topic: str) -> list[dict[str, Any]]:
    """All committed messages of a topic, by partition and offset."""
    given = {"bootstrap.servers": server.address, "group.id": str(uuid4()), "isolation.level": "read_committed"}
    consumer = Consumer(given | {"enable.auto.commit": False, "enable.partition.eof": True})
    found: list[dict[str, Any]] = []
    try:
        for partition in range(PARTITIONS):
            consumer.assign([TopicPartition(topic, partition, 0)])
            while True:
                message = consumer.poll(20)
                assert message is not None, f"{topic}/{partition} does not end"
                if message.error():
                    break
                found.append(json.loads(message.value() or b"null"))
    finally:
        consumer.close()
    return found


def send(broker: SendingBroker, count: int, rate: float, sent: dict[str, list[str]]) -> None:
    """Send events of 200 evaluations at a rate, and note their ids."""
    began, number = time.monotonic(), 0
    while number < count:
        due = min(count, int((time.monotonic() - began) * rate) + 1)
        events = []
        for at in range(number, due):
            event_id = str(uuid4())
            eval_id = f"e{at % 200}"
            sent[eval_id].append(event_id)
            events.append({"type": "evaluation:started", "eval_id": eval_id, "event_id": event_id, "metadata": {"n": at}})
        messages = [store_evaluation.message(event) for event in events]
        while messages:
            try:
                broker.enqueue_many(messages)
                break
            except Outage:
                time.sleep(0.2)
        number = max(number, due)
        time.sleep(0.02)


def order_in_database(url: str) -> dict[str, list[str]]:
    """The event ids of each evaluation in commit order."""
    found: dict[str, list[str]] = defaultdict(list)
    with psycopg.connect(url) as conn:
        for (body,) in conn.execute("SELECT body FROM confirmations ORDER BY id"):
            for line in map(json.loads, body.splitlines()):
                found[line["eval_id"]] += line["event_ids"]
    return found


def by_evaluation(events: list[dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for event in events:
        found[event["eval_id"]].append(event["event_id"])
    return found


def test_each_sink_has_every_event_in_order_whatever_is_killed(world: World) -> None:
    chance = random.Random(15)  # noqa: S311 - the same deaths in each run
    sent: dict[str, list[str]] = defaultdict(list)
    broker = SendingBroker(url=world.valkey.url())
    broker.declare_queue("evaluations")
    sender = threading.Thread(target=send, args=(broker, EVENTS, RATE, sent))
    sender.start()
    killed: list[str] = []
    while sender.is_alive() or len(killed) < 5:  # each kind once
        time.sleep(chance.uniform(0.5, 2.0))
        killed.append(world.kill_one(chance))
    sender.join()
    wanted = {eval_id: set(ids) for eval_id, ids in sent.items()}
    for _ in looks(240 + EVENTS / 500):
        if all(_lines(world.folder / name) >= EVENTS for name in ("own", "away")) and all(
            len(firsts(received(world.folder / name))) == EVENTS for name in ("own", "away")
        ):
            break
    expected = order_in_database(world.postgres.url())
    assert {eval_id: set(ids) for eval_id, ids in expected.items()} == wanted, killed
    for name in ("own", "away"):
        lines = firsts(received(world.folder / name))
        assert by_evaluation(lines) == expected, (name, killed)
        assert all(found == sorted(found) for found in versions(lines).values())
    for _ in looks(120 + EVENTS / 500):
        once = consumed(world.kafka, "once")
        plain = by_evaluation(firsts(consumed(world.kafka, "plain")))
        if len(once) == EVENTS and sum(map(len, plain.values())) == EVENTS:
            break
    assert by_evaluation(once) == expected, killed
    assert plain == expected, killed
    print(f"killed: {', '.join(killed)}")


def test_a_sink_that_is_away_for_long_delays_no_other(world: World) -> None:
    sent: dict[str, list[str]] = defaultdict(list)
    broker = SendingBroker(url=world.valkey.url())
    broker.declare_queue("evaluations")
    for _ in looks(60):
        if (world.folder / "runner-0/sinks.log").read_text().count("on from row") >= 4:
            break
    (world.folder / "away.away").touch()
    send(broker, int(AWAY_S * 100), 100, sent)
    total = sum(map(len, sent.values()))
    for _ in looks(30):
        if len(firsts(received(world.folder / "own"))) == total:
            break
    lines = firsts(received(world.folder / "own"))
    assert len(lines) == total
    lags = sorted(line["at"] - _time(line["recorded_at"]) for line in lines)
    p99_s = lags[int(len(lags) * 0.99)]
    print(f"p50 {lags[len(lags) // 2]:.3f} s, p99 {p99_s:.3f} s")
    assert p99_s <= 2
    assert received(world.folder / "away") == []
    (world.folder / "away.away").unlink()
    for _ in looks(60):
        if len(firsts(received(world.folder / "away"))) == total:
            break
    assert by_evaluation(firsts(received(world.folder / "away"))) == by_evaluation(lines)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
