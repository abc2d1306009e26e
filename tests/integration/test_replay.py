"""`evalstore replay`: records that are not what their events give are found, and repaired."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
import redis
from psycopg.rows import dict_row
from sqlalchemy import Engine

from evalstore.storage import event_store, replay
from evalstore.storage.row_statements import RECORD
from models import Event
from models.events import parse
from tasks.confirmations import Confirmations
from tests.integration.shell import Operator

Json = dict[str, Any]
START = datetime(2026, 1, 1, tzinfo=UTC)
COLUMNS = [name for name in RECORD if name not in {"eval_id", "merge_state", "merge_version"}]
OTHERS = {
    "merge_state": "'\\xff00'",
    "merge_version": "merge_version + 1",
    "metadata": """'{"a": true}'""",
    "metadata_truncated": "NOT metadata_truncated",
    "status": "'lost'",
}
OF_TYPE = {
    "text": "'other'",
    "integer": "coalesce({0}, 0) + 1",
    "bigint": "coalesce({0}, 0) + 1",
    "double precision": "coalesce({0}, 0) + 0.5",
    "timestamp with time zone": "coalesce({0}, now()) + interval '1 microsecond'",
    "uuid": "gen_random_uuid()",
}


@pytest.fixture
def plain(database_url: str) -> Iterator[psycopg.Connection[Json]]:
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as conn:
        yield conn


def events_of(eval_id: str, number: int) -> list[Event]:
    given: list[Json] = [
        {"type": "evaluation:queued", "code": "c", "metadata": {"a": 1}, "run_id": f"r{number % 2}", "submitter": "s"},
        {"type": "evaluation:started", "executor_id": "x", "timeout_s": 5},
        {"type": "evaluation:completed", "exit_code": 0, "duration_ms": 1.5, "score": 0.5, "metadata": {"b": [1.0, None]}},
    ]
    return [
        parse({**one, "eval_id": eval_id, "event_id": UUID(int=at + 1), "occurred_at": START + timedelta(seconds=at)})
        for at, one in enumerate(given)
    ]


def store(engine: Engine, events: list[Event]) -> None:
    with engine.connect() as conn:
        event_store.store(conn, events)


def corrupt(plain: psycopg.Connection[Json], eval_id: str, column: str) -> None:
    query = "SELECT data_type FROM information_schema.columns WHERE table_name = 'evaluations' AND column_name = %s"
    row = plain.execute(query, [column]).fetchone()
    assert row is not None
    value = OTHERS.get(column) or OF_TYPE[row["data_type"]].format(column)
    done = plain.execute(f"UPDATE evaluations SET {column} = {value} WHERE eval_id = %s".encode(), [eval_id])
    assert done.rowcount == 1


def test_a_corrupted_value_in_any_column_is_found_and_repaired(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json]
) -> None:
    columns = [*COLUMNS, "merge_state", "merge_version"]
    ids = [f"e{number:03}" for number in range(200)]
    store(engine, [one for number, eval_id in enumerate(ids) for one in events_of(eval_id, number)])
    before = plain.execute("SELECT * FROM evaluations ORDER BY eval_id").fetchall()
    for at, column in enumerate(columns):
        corrupt(plain, ids[at * 7], column)
    checked = operator.evalstore("replay", "--all", "-o", "json")
    assert (checked.status, checked.json["evaluations"], checked.json["equal"]) == (1, 200, 200 - len(columns))
    found = {one["eval_id"]: one["field"] for one in checked.json["differences"]}
    assert {ids[at * 7]: column for at, column in enumerate(columns)} == found
    assert len(checked.json["differences"]) == checked.json["different"] == len(columns)
    repaired = operator.evalstore("replay", "--all", "--write", "--reason", "a drill", "-o", "json")
    assert (repaired.status, repaired.json) == (0, checked.json)
    again = operator.evalstore("replay", "--all", "--check", "-o", "json")
    assert (again.status, again.json) == (0, {"evaluations": 200, "equal": 200, "different": 0, "differences": []})
    changed = {"updated_at": 0, "repairs": 0}
    after = plain.execute("SELECT * FROM evaluations ORDER BY eval_id").fetchall()
    assert [one | changed for one in after] == [one | changed for one in before]
    assert sum(one["repairs"] for one in after) == len(columns)
    actions = plain.execute("SELECT actor, verb, reason, details FROM operator_actions ORDER BY id").fetchall()
    assert len(actions) == len(columns)
    first = {"eval_id": ids[0], "fields": [columns[0]]}
    assert actions[0] == {"actor": "ada", "verb": "replay", "reason": "a drill", "details": first}


def test_a_repair_is_confirmed_and_changes_the_etag_at_the_same_version(api: Any, operator: Operator) -> None:
    operator.env |= {"EVALSTORE_DATABASE_URL": api.database_url, "EVALSTORE_REDIS_URL": api.redis_url}
    made = api.both.post("/storage/evaluations", json={"eval_id": "e", "code": "c", "run_id": "r"})
    with psycopg.connect(api.database_url, autocommit=True, row_factory=dict_row) as plain:
        corrupt(plain, "e", "submitter")
        assert api.read.get("/storage/evaluations/e").json()["submitter"] == "other"
        assert operator.evalstore("replay", "e", "--write").status == 0
        row = plain.execute("SELECT body FROM confirmations ORDER BY id DESC LIMIT 1").fetchone()
    assert row is not None
    told = json.loads(row["body"])
    assert told.pop("recorded_at").endswith("Z")
    expected = {"type": "storage:evaluation:repaired", "eval_id": "e", "version": 1, "status": "queued", "run_id": "r"}
    assert told == {**expected, "event_ids": []}
    read = api.read.get("/storage/evaluations/e", headers={"If-None-Match": made.headers["etag"]})
    assert (read.status_code, read.json()["submitter"], read.headers["etag"]) == (200, None, '"1-1"')
    put = {"json": {"status": "running"}, "headers": {"If-Match": '"1-1"'}}
    assert api.both.put("/storage/evaluations/e", **put).status_code == 200
    assert (
        api.both.put(
            "/storage/evaluations/e", json={"status": "failed", "error": "x"}, headers={"If-Match": '"1-1"'}
        ).status_code
        == 412
    )


def test_a_consumer_is_given_a_repair_of_a_version_that_it_has_seen(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        for type_ in ("created", "repaired", "updated", "erased"):
            line = json.dumps({"type": f"storage:evaluation:{type_}", "eval_id": "e", "version": 1})
            client.xadd("evalstore:confirmations", {"confirmation": line})
        seen = [one["type"].rpartition(":")[2] for one in Confirmations("group", client=client, idle_s=0.1)]
    assert seen == ["created", "repaired", "erased"]


# Each leads to a wrong record, now or when a worker of an earlier release counts another event.
WRONG = {
    "the state is gone": "merge_state = NULL",
    "the version is gone": "merge_version = NULL",
    "empty": "merge_state = '\\x'",
    "cut": "merge_state = substr(merge_state, 1, length(merge_state) - 1)",
    "longer": "merge_state = merge_state || '\\x00'",
    "first bit": "merge_state = set_bit(merge_state, 0, 1 - get_bit(merge_state, 0))",
    "last bit": "merge_state = overlay(merge_state PLACING '\\xfe' FROM length(merge_state))",
    "of another": "merge_state = (SELECT merge_state FROM evaluations WHERE eval_id = 'other')",
    "a later version": "merge_version = version + 1",
    "version 0": "merge_version = 0",
    "both": "merge_state = '\\xff', merge_version = version + 7",
}
# The next event rebuilds the record from the log. Workers of releases before merge states leave such records.
REBUILT = {
    "both are gone": "merge_state = NULL, merge_version = NULL",
    "an earlier version": "merge_version = version - 1",
    "an earlier version of another": "merge_state = '\\x01', merge_version = 1",
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_merge_state_that_is_corrupted_in_any_way_is_found_and_repaired(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], change: str
) -> None:
    store(engine, [*events_of("e", 0), *events_of("f", 1), *events_of("other", 0)[:2]])
    before = plain.execute("SELECT merge_state, merge_version FROM evaluations ORDER BY eval_id").fetchall()
    assert plain.execute(f"UPDATE evaluations SET {change} WHERE eval_id = 'e'".encode()).rowcount == 1
    assert plain.execute("SELECT merge_state, merge_version FROM evaluations ORDER BY eval_id").fetchall() != before
    with engine.connect() as conn:
        compared = replay.compare(conn, replay.Selection())
    assert compared is not None
    assert list(compared.different) == ["e"]
    assert {one.field for one in compared.different["e"]} <= {"merge_state", "merge_version"}
    assert operator.evalstore("replay", "--all", "--write").status == 0
    assert plain.execute("SELECT merge_state, merge_version FROM evaluations ORDER BY eval_id").fetchall() == before


@pytest.mark.parametrize("change", REBUILT.values(), ids=REBUILT)
def test_a_merge_state_that_the_next_event_rebuilds_is_no_difference(
    engine: Engine, plain: psycopg.Connection[Json], change: str
) -> None:
    """It changes nothing that is stored later, even if it was no worker of an earlier release that left it."""
    columns = ", ".join(name for name in RECORD if name != "eval_id")
    for eval_id in ("e", "same"):
        store(engine, events_of(eval_id, 0)[1:])
    plain.execute(f"UPDATE evaluations SET {change} WHERE eval_id = 'e'".encode())
    with engine.connect() as conn:
        compared = replay.compare(conn, replay.Selection())
    assert compared is not None
    assert compared.different == {}
    for eval_id in ("e", "same"):
        store(engine, events_of(eval_id, 0)[:1])
    rows = plain.execute(f"SELECT {columns} FROM evaluations".encode()).fetchall()
    assert rows[0] == rows[1]


def test_filters_choose_records_and_another_run_goes_on_after_the_last(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json]
) -> None:
    for number in range(4):
        store(engine, events_of(f"e{number}", number))
    plain.execute("UPDATE evaluations SET created_at = '2026-01-01T00:00:00Z' WHERE eval_id IN ('e0', 'e1')")

    def count(*words: str) -> int:
        done = operator.evalstore("replay", *words, "-o", "json")
        assert done.status == 0
        return int(done.json["evaluations"])

    assert count("e1", "e3") == 2
    assert count("--run-id", "r0") == 2
    assert count("--since", "2026-01-01T00:00:00Z", "--until", "2026-01-02T00:00:00Z") == 2
    assert count("--since", "1h", "--run-id", "r1") == 1
    assert count("--all", "--after", "e2", "--rate", "100") == 1
    assert operator.evalstore("replay", "e9").status == 3
    assert operator.evalstore("replay").status == 2
    assert operator.evalstore("replay", "--all", "e1").status == 2
    assert operator.evalstore("replay", "--since", "yesterday").status == 2


def test_among_5000_records_exactly_the_corrupted_ones_are_found_while_events_are_stored(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json], eventually: Callable[..., None]
) -> None:
    columns = [*COLUMNS, "merge_state", "merge_version"]
    ids = [f"e{number:04}" for number in range(5000)]
    for start in range(0, 5000, 500):
        store(engine, [one for at in range(start, start + 500) for one in events_of(ids[at], at)])
    corrupted = {ids[at * 50]: columns[at % len(columns)] for at in range(100)}
    for eval_id, column in corrupted.items():
        corrupt(plain, eval_id, column)
    stop, stored = threading.Event(), [0]

    def go_on() -> None:
        while not stop.is_set():
            stored[0] += 1
            new = events_of(f"d{stored[0]:06}", stored[0])
            later = [
                parse({"type": "evaluation:started", "eval_id": ids[at * 50 + 1], "event_id": UUID(int=1000 + stored[0]),
                       "occurred_at": START + timedelta(seconds=stored[0])})
                for at in range(100)
            ]  # fmt: skip
            store(engine, [*new, *later])

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        eventually(lambda: stored[0] > 2, what="events are stored")
        found = operator.evalstore("replay", "--all", "-o", "json")
        assert (found.status, found.json["different"]) == (1, 100)
        assert {one["eval_id"]: one["field"] for one in found.json["differences"]} == corrupted
        assert operator.evalstore("replay", "--all", "--write").status == 0
        before = stored[0]
        assert operator.evalstore("replay", "--all", "-o", "json").json["different"] == 0
        assert stored[0] > before
    finally:
        stop.set()
        thread.join()


def test_a_record_whose_events_are_gone_is_told_and_left_as_it_is(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json]
) -> None:
    store(engine, events_of("e", 0))
    plain.execute("DELETE FROM evaluation_events")
    done = operator.evalstore("replay", "e", "--write", "-o", "json")
    assert (done.status, done.json["differences"]) == (1, [{"eval_id": "e", "field": "version", "stored": 3, "replayed": None}])
    assert plain.execute("SELECT count(*) AS n FROM evaluations").fetchone() == {"n": 1}


def test_at_most_1000_differences_are_shown_and_all_are_counted(
    operator: Operator, engine: Engine, plain: psycopg.Connection[Json]
) -> None:
    store(engine, [one for number in range(1100) for one in events_of(f"e{number:04}", number)[:1]])
    plain.execute("UPDATE evaluations SET submitter = 'x', reason = 'y'")
    told = operator.evalstore("replay", "--all", "--write", "-o", "json").json
    assert (told["different"], len(told["differences"])) == (1100, 1000)
    assert operator.evalstore("replay", "--all").status == 0


def test_records_that_change_meanwhile_are_never_different(
    engine: Engine, operator: Operator, eventually: Callable[..., None]
) -> None:
    """A snapshot shows a record and its log as of the same moment."""
    stop = threading.Event()
    stored: list[int] = []

    def go_on() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            given = {"type": "evaluation:started", "occurred_at": START + timedelta(seconds=number)}
            store(engine, [parse({**given, "eval_id": f"e{at}", "event_id": UUID(int=number)}) for at in range(50)])
            stored.append(number)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        eventually(lambda: stored, what="the first events")
        before, until = len(stored), time.monotonic() + 3
        with engine.connect() as conn:
            while time.monotonic() < until:
                compared = replay.compare(conn, replay.Selection())
                assert compared is not None
                assert (compared.evaluations, compared.different) == (50, {})
        assert len(stored) > before
    finally:
        stop.set()
        thread.join()
    assert operator.evalstore("replay", "--all").status == 0
