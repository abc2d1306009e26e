"""The handler returns what became of each message of a batch, and writes nothing into the batch."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from dramatiq import Message
from pydantic import SecretStr

from models.settings import Settings
from tasks.actor import ACTOR
from tasks.keys import QUEUE
from worker.batches import Batch, BatchOutcome, Delivery
from worker.handler import Handler
from worker.in_flight import InFlight
from worker.metrics import WorkerMetrics
from worker.verified_database import VerifiedDatabase


def delivery(eval_id: str, **fields: Any) -> Delivery:
    event = {"type": "evaluation:started", "eval_id": eval_id, "event_id": str(uuid4()), **fields}
    return Delivery(eval_id.encode(), Message(QUEUE, ACTOR, (event,), {}, {}).encode())


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(database_url=SecretStr(database_url), object_store_url=tmp_path.as_uri())


@pytest.fixture
def connections(settings: Settings) -> Iterator[VerifiedDatabase]:
    made = VerifiedDatabase.of(settings)
    yield made
    made.engine.dispose()


@pytest.fixture
def in_flight() -> InFlight:
    return InFlight()


@pytest.fixture
def handle(connections: VerifiedDatabase, settings: Settings, in_flight: InFlight) -> Handler:
    return Handler(connections, settings, in_flight, WorkerMetrics())


def stored(database_url: str) -> int:
    with psycopg.connect(database_url) as conn:
        [(count,)] = conn.execute("SELECT count(*) FROM evaluation_events").fetchall()
        return int(count)


def test_each_message_of_a_batch_has_an_outcome_of_its_own(handle: Handler, database_url: str) -> None:
    """One that is locked, one whose object is missing and one that is bad hold up no others."""
    handle(Batch([delivery("locked", type="evaluation:queued", code="1")]))
    reference = {"sha256": "0f" * 32, "size": 5, "encoding": "zstd"}
    waits = delivery("waits", type="evaluation:completed", exit_code=0, output_ref=reference)
    odd = [delivery("locked"), waits, delivery("bad", attempt="one")]
    batch = Batch([*(delivery(f"e{n}") for n in range(50)), *odd, *(delivery(f"f{n}") for n in range(50))])

    with psycopg.connect(database_url) as holder:
        holder.execute("SELECT FROM evaluations WHERE eval_id = 'locked' FOR UPDATE")
        outcome = handle(batch)

    assert {redis_id: json.loads(why)["error_class"] for redis_id, why in outcome.dead.items()} == {b"bad": "InvalidEvent"}
    assert outcome.retry_ms.keys() == {b"locked", b"waits"}
    assert all(0 < delay_ms <= 10_000 for delay_ms in outcome.retry_ms.values())
    assert outcome.requeue == []
    ids = [one.redis_id for one in batch]
    assert outcome.stored(ids) == [one for one in ids if one not in {b"locked", b"waits", b"bad"}]
    assert stored(database_url) == 101
    assert batch.outcome == BatchOutcome()


def test_one_bad_event_among_two_thousand_is_found(handle: Handler, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("ALTER TABLE evaluations ADD CHECK (eval_id <> 'culprit')")
    batch = Batch([*(delivery(f"e{n}") for n in range(1234)), delivery("culprit"), *(delivery(f"f{n}") for n in range(765))])

    outcome = handle(batch)

    assert outcome.dead.keys() == {b"culprit"}
    assert (outcome.retry_ms, outcome.requeue) == ({}, [])
    assert stored(database_url) == 1999


def test_when_the_process_stops_only_messages_that_are_not_stored_go_back(
    handle: Handler, in_flight: InFlight, database_url: str
) -> None:
    batch = Batch([delivery("bad", attempt="one"), *(delivery(f"e{n}") for n in range(3))])
    in_flight.close()
    with psycopg.connect(database_url) as holder:
        holder.execute("LOCK TABLE evaluation_events IN SHARE MODE")
        began = time.monotonic()
        outcome = handle(batch)

    assert time.monotonic() - began < 20
    assert outcome.requeue == [b"e0", b"e1", b"e2"]
    assert outcome.dead.keys() == {b"bad"}
    assert stored(database_url) == 0
