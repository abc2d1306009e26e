"""Evaluations whose result is overdue are given up, and only those; a result that still comes counts all the same."""

import time
from datetime import UTC, datetime
from typing import Any

import pytest
from dramatiq import Message
from sqlalchemy import Connection, Engine, text

from evalstore.storage import event_store, stalled
from evalstore.telemetry import backlog, queues
from models.events import parse
from models.settings import Settings
from tasks.keys import QUEUE
from tests.factories import unique_event
from worker import lost
from worker.broker import Broker

LIMITS = Settings(lost_grace_s=60, running_limit_s=3600, queued_limit_s=7200)


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return unique_event(kind, **{"occurred_at": datetime.now(UTC).isoformat(), **fields})


def stored(conn: Connection, *events: dict[str, Any], recorded_s_ago: float) -> None:
    """Store these as if that long ago."""
    event_store.store(conn, [parse(one) for one in events])
    times = ("evaluation_events", "recorded_at"), ("evaluations", "created_at"), ("evaluations", "updated_at")
    with conn.begin():
        for table, column in times:
            conn.execute(text(f"UPDATE {table} SET {column} = now() - make_interval(secs => :ago)"), {"ago": recorded_s_ago})


def status(conn: Connection) -> str:
    record = event_store.get(conn, "e")
    assert record is not None
    return record.status


@pytest.mark.parametrize(
    ("kind", "fields", "limit_s"),
    [
        ("started", {"timeout_s": 30}, 30 + 60),
        ("started", {}, 3600 + 60),
        ("queued", {"code": ""}, 7200 + 60),
    ],
    ids=["running beyond its timeout", "running without one", "queued"],
)
def test_an_evaluation_is_lost_once_it_is_stalled_and_not_before(
    conn: Connection, broker: Broker, kind: str, fields: dict[str, Any], limit_s: float
) -> None:
    stored(conn, event(kind, **fields), recorded_s_ago=limit_s - 5)
    assert lost.run_once(conn, broker, LIMITS, broker.metrics) == {"lost": 0}

    stored(conn, recorded_s_ago=limit_s + 1)
    assert lost.run_once(conn, broker, LIMITS, broker.metrics) == {"lost": 1}
    assert status(conn) == "lost"
    assert lost.run_once(conn, broker, LIMITS, broker.metrics) == {"lost": 0}


def test_a_started_event_postpones_lost(conn: Connection, broker: Broker) -> None:
    stored(conn, event("started", timeout_s=30), recorded_s_ago=1000)
    event_store.store(conn, [parse(event("started"))])

    assert lost.run_once(conn, broker, LIMITS, broker.metrics) == {"lost": 0}


def test_two_processes_make_the_same_lost_event(conn: Connection, broker: Broker) -> None:
    stored(conn, event("started", timeout_s=1), recorded_s_ago=1000)
    limits = {"grace_s": 60, "queued_limit_s": 7200, "running_limit_s": 3600}
    first, second = stalled.find(conn, **limits), stalled.find(conn, **limits)

    assert first == second
    assert event_store.store(conn, first).outcomes == ["applied"]
    assert event_store.store(conn, second).outcomes == ["duplicate"]


def test_an_evaluation_that_started_in_the_future_is_lost_too(conn: Connection, broker: Broker) -> None:
    stored(conn, event("started", timeout_s=1, occurred_at="2999-01-01T00:00:00Z"), recorded_s_ago=1000)

    assert lost.run_once(conn, broker, LIMITS, broker.metrics) == {"lost": 1}
    assert status(conn) == "lost"


@pytest.mark.parametrize("timeout_s", [0, -1, -1e12, -1e300])
def test_a_time_limit_below_zero_is_one_of_zero(conn: Connection, broker: Broker, timeout_s: float) -> None:
    stored(conn, event("started", timeout_s=timeout_s), recorded_s_ago=59)
    assert lost.run_once(conn, broker, LIMITS, broker.metrics) == {"lost": 0}
    stored(conn, recorded_s_ago=61)
    assert lost.run_once(conn, broker, LIMITS, broker.metrics) == {"lost": 1}


@pytest.mark.parametrize(
    "odd", [{"timeout_s": 1e300}, {"timeout_s": 1, "occurred_at": "9999-12-31T23:59:59.999999Z"}], ids=["no end", "no later"]
)
def test_an_evaluation_that_can_never_be_lost_does_not_block_others(
    conn: Connection, broker: Broker, odd: dict[str, Any]
) -> None:
    stored(conn, event("started", eval_id="odd", **odd), event("started", timeout_s=1), recorded_s_ago=1000)

    assert lost.run_once(conn, broker, LIMITS, broker.metrics) == {"lost": 1}
    assert status(conn) == "lost"


def test_the_search_for_stalled_evaluations_reads_no_event_log(conn: Connection, engine: Engine, broker: Broker) -> None:
    stored(conn, event("queued", code=""), event("started", timeout_s=1), event("started", timeout_s=1), recorded_s_ago=1000)

    with engine.connect() as other, other.begin():
        other.execute(text("LOCK TABLE evaluation_events IN ACCESS EXCLUSIVE MODE"))
        [found] = stalled.find(conn, grace_s=60, queued_limit_s=7200, running_limit_s=3600)

    assert event_store.store(conn, [found]).outcomes == ["applied"]
    assert status(conn) == "lost"


def test_evaluations_changed_by_an_older_release_are_lost_too(conn: Connection, broker: Broker) -> None:
    stored(conn, event("started", timeout_s=1, occurred_at="2999-01-01T00:00:00Z"), recorded_s_ago=1000)
    with conn.begin():
        conn.execute(text("UPDATE evaluations SET merge_state = NULL, merge_version = NULL"))

    assert lost.run_once(conn, broker, LIMITS, broker.metrics) == {"lost": 1}
    assert status(conn) == "lost"


def test_evaluations_that_can_never_be_lost_do_not_fill_the_search(conn: Connection) -> None:
    odd = {"timeout_s": 1, "occurred_at": "9999-12-31T23:59:59.999999Z"}
    stored(
        conn, *(event("started", eval_id=f"a{n}", **odd) for n in range(5)), event("started", timeout_s=1), recorded_s_ago=1000
    )

    found = stalled.find(conn, grace_s=60, queued_limit_s=7200, running_limit_s=3600, limit=2)

    assert [one.eval_id for one in found] == ["e"]


@pytest.mark.parametrize("kind", ["completed", "started"])
def test_a_result_after_lost_counts(conn: Connection, broker: Broker, kind: str) -> None:
    stored(conn, event("started", timeout_s=1), recorded_s_ago=1000)
    lost.run_once(conn, broker, LIMITS, broker.metrics)

    event_store.store(conn, [parse(event(kind, **({"exit_code": 0} if kind == "completed" else {})))])

    assert status(conn) == {"completed": "completed", "started": "running"}[kind]


@pytest.mark.parametrize("place", ["waiting", "being worked on", "to come again later"])
def test_nothing_is_given_up_while_its_result_may_be_waiting(conn: Connection, broker: Broker, place: str) -> None:
    stored(conn, event("started", timeout_s=1), recorded_s_ago=1000)
    waits_since = int((time.time() - 61) * 1000)
    broker.enqueue(
        Message(QUEUE, "store_evaluation", (event("completed", exit_code=0) | {"event_id": "x"},), {}, {}, "m", waits_since)
    )
    keys = broker.keys(QUEUE)
    if place != "waiting":
        redis_id: Any = broker.client.lpop(keys.queue)
        broker.client.zadd(broker.unacked(QUEUE, "another"), {redis_id: 1})
        broker.client.hset(keys.processes, "another", "working:1")
        if place == "to come again later":
            broker.lua.run("retry_later", [broker.unacked(QUEUE, "another"), keys.delayed], redis_id, 30_000)

    assert lost.run_once(conn, broker, LIMITS, broker.metrics) == {"lost": 0, "held_back": 1}
    assert status(conn) == "running"


def test_one_run_marks_thousands_of_stalled_evaluations_within_its_time(conn: Connection, broker: Broker) -> None:
    for start in range(0, 3000, 1000):
        event_store.store(conn, [parse(event("started", eval_id=f"e{n}", timeout_s=1)) for n in range(start, start + 1000)])
    stored(conn, recorded_s_ago=1000)

    assert lost.run_once(conn, broker, LIMITS, broker.metrics, go_on=lambda: False) == {"lost": 1000, "more": 1}
    counted = "evalstore_events_total", "applied", "evaluation:lost"
    assert broker.metrics.counters.get(*counted) == 1000  # Also if the next thousand fail in an outage.
    assert lost.run_once(conn, broker, LIMITS, broker.metrics) == {"lost": 2000}
    assert broker.metrics.counters.get(*counted) == 3000


def test_how_old_the_oldest_message_is_is_told_alike_to_operators_and_to_who_gives_up_evaluations(broker: Broker) -> None:
    """But for what an operator sent again: it may hold a result, and it is no sign that workers are late."""
    keys, client = broker.keys(QUEUE), broker.client
    sent_ms = int((time.time() - 3600) * 1000)

    def ages() -> list[int]:
        return [round(told(broker, QUEUE) / 60) for told in (queues.oldest_age_s, backlog.oldest_age_s)]

    def put(message_id: str, body: str) -> None:
        client.hset(keys.bodies, message_id, body)
        client.rpush(keys.queue, message_id)

    assert ages() == [0, 0]
    put("dead-letter:1", f'{{"args": [], "message_timestamp": {sent_ms}}}')
    assert ages() == [0, 60]
    client.delete(keys.queue)
    # Another gateway may write fields in another order, with the event last.
    put("of another language", f'{{"message_timestamp" : {sent_ms}, "args": ["{"x" * 1000}"]}}')
    put("younger", f'{{"args": [], "message_timestamp": {int(time.time() * 1000)}}}')
    assert ages() == [60, 60]
    client.delete(keys.queue)
    client.hset(keys.processes, "process", "1")
    client.zadd(keys.unacked_prefix + "process", {"of another language": 0, "younger": 1})
    assert ages() == [60, 60]
