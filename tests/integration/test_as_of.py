"""A record as it was at a time, over HTTP and at the command line."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import Engine

from evalstore.storage import as_of, event_store
from models import Event
from models.events import parse
from tests.integration.shell import Operator

START = datetime(2026, 1, 1, tzinfo=UTC)


def event(type_: str, number: int, *, second: int = 0, **fields: Any) -> Event:
    named = {"type": f"evaluation:{type_}", "eval_id": "e", "event_id": UUID(int=number)}
    return parse({**named, "occurred_at": START + timedelta(seconds=second), **fields})


def store(engine: Engine, recorded_at: datetime, events: list[Event]) -> None:
    """Store events as if that had been at `recorded_at`."""
    with engine.connect() as conn:
        event_store.store(conn, events)
        conn.exec_driver_sql(
            "UPDATE evaluation_events SET recorded_at = %s WHERE event_id = ANY(%s)",
            (recorded_at, [one.event_id for one in events]),
        )
        conn.commit()


@pytest.fixture
def stored(engine: Engine) -> list[datetime]:
    """An evaluation whose queued, started and completed events were stored a minute apart; gives the times."""
    times = [START + timedelta(minutes=minute) for minute in range(3)]
    store(engine, times[0], [event("queued", 3, code="print(1)", metadata={"a": 1})])
    store(engine, times[1], [event("started", 2, second=1, executor_id="x", metadata={"b": 1})])
    store(engine, times[2], [event("completed", 1, second=2, exit_code=0, output="y" * 100_000)])
    return times


def shown(operator: Operator, at: datetime, *words: str) -> Any:
    done = operator.evalstore("get", "e", "--as-of", at.isoformat(), *words, "-o", "json")
    assert (done.status, done.err) == (0, "")
    return done.json


def test_a_record_is_shown_as_it_was_after_each_of_its_events(operator: Operator, stored: list[datetime]) -> None:
    queued, started, completed = (shown(operator, at) for at in stored)
    assert [one["status"] for one in (queued, started, completed)] == ["queued", "running", "completed"]
    assert [one["version"] for one in (queued, started, completed)] == [1, 2, 3]
    assert [one["metadata"] for one in (queued, started)] == [{"a": 1}, {"a": 1, "b": 1}]
    assert (queued["code"], queued["output"], completed["output_size"]) == ("print(1)", None, 100_000)
    assert (started["created_at"], started["updated_at"]) == ("2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z")
    assert shown(operator, stored[1] - timedelta(microseconds=1)) == queued
    now = operator.evalstore("get", "e", "-o", "json").json
    assert {**completed, "created_at": 0, "updated_at": 0} == {**now, "created_at": 0, "updated_at": 0}


def test_content_is_that_of_the_record_as_it_was(operator: Operator, engine: Engine, stored: list[datetime]) -> None:
    store(engine, START + timedelta(hours=1), [event("started", 4, attempt=2)])
    assert operator.evalstore("get", "e", "--output").status == 3
    assert operator.evalstore("get", "e", "--output", "--as-of", stored[2].isoformat()).out == "y" * 100_000
    assert operator.evalstore("get", "e", "--output", "--as-of", stored[1].isoformat()).status == 3


def test_before_the_first_event_there_is_no_record(operator: Operator, stored: list[datetime]) -> None:
    before = (stored[0] - timedelta(microseconds=1)).isoformat()
    assert operator.evalstore("get", "e", "--as-of", before).status == 3
    assert operator.evalstore("get", "other", "--as-of", "1h").status == 3


@pytest.mark.parametrize("time", ["yesterday", "2026-01-01T00:00:00", "2026-13-01T00:00:00Z", ""])
def test_a_time_that_is_none_is_wrong_usage(operator: Operator, time: str) -> None:
    done = operator.evalstore("get", "e", "--as-of", time)
    assert (done.status, "--as-of" in done.err) == (2, True)


def test_a_time_within_the_longest_transaction_is_answered_as_provisional(
    operator: Operator, engine: Engine, stored: list[datetime]
) -> None:
    assert "provisional" not in shown(operator, datetime.now(UTC) - timedelta(seconds=as_of.LONGEST_TRANSACTION_S + 60))
    with engine.connect() as conn:
        event_store.store(conn, [event("completed", 5, exit_code=1)])
    done = operator.evalstore("get", "e", "--as-of", datetime.now(UTC).isoformat(), "-o", "json")
    assert (done.status, done.json["version"], done.json["provisional"], "provisional" in done.err) == (0, 4, True, True)


def test_the_pages_of_a_long_log_are_all_read(engine: Engine) -> None:
    events = [event("started", number, second=number, metadata={str(number % 7): number}) for number in range(2500)]
    store(engine, START, events[:2100])
    store(engine, START + timedelta(minutes=1), events[2100:])
    with engine.connect() as conn:
        past = as_of.load(conn, "e", START)
        now = as_of.load(conn, "e", START + timedelta(minutes=1))
    assert past is not None
    assert now is not None
    assert (past.view.fields["version"], now.view.fields["version"]) == (2100, 2500)
    assert past.view.fields["metadata"]["0"] == 2093


def test_the_service_answers_a_record_as_it_was(api: Any) -> None:
    url = "/storage/evaluations/e"
    api.both.post("/storage/evaluations", json={"eval_id": "e", "code": "c" * 100_000})
    with psycopg.connect(api.database_url, autocommit=True) as conn:
        conn.execute("UPDATE evaluation_events SET recorded_at = %s", [START])
    api.both.put(url, json={"status": "running"})
    past = api.read.get(url, params={"as_of": "2026-01-01T00:00:00Z"})
    assert (past.status_code, past.json()["status"], "provisional" in past.json()) == (200, "queued", False)
    assert api.read.get(past.json()["code_url"]).text == "c" * 100_000
    now = api.read.get(url, params={"as_of": datetime.now(UTC).isoformat()}).json()
    assert (now["status"], now["provisional"]) == ("running", True)
    assert api.read.get(url, params={"as_of": "2025-12-31T23:59:59Z"}).status_code == 404
    bad = api.read.get(url, params={"as_of": "yesterday"})
    assert (bad.status_code, [fault["field"] for fault in bad.json()["faults"]]) == (422, ["as_of"])
    assert api.nobody.get(url, params={"as_of": "2026-01-01T00:00:00Z"}).status_code == 401
    assert json.loads(api.read.get(url).text)["status"] == "running"
