"""Runs and statistics over HTTP, and the process that keeps them."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection

from evalstore.client import NotFound, StorageClient
from evalstore.sinks.statistics import catch_up
from evalstore.storage import api_keys, database, event_store
from evalstore.storage.visibility import Visibility
from models.events import parse
from tests.factories import unique_event
from tests.integration.conftest import BOTH

R, S = "/storage/runs", "/storage/stats"
AT = "2026-01-01T10:20:00Z"


@pytest.fixture
def conn(api: Any) -> Iterator[Connection]:
    engine = database.engine(api.database_url)
    with engine.connect() as made:
        yield made
    engine.dispose()


def put(conn: Connection, run_id: str, count: int, *, submitter: str = "s", ends: bool = True) -> None:
    events = []
    for number in range(count):
        eval_id = f"{run_id}-{number}"
        fields = {"occurred_at": AT, "run_id": run_id, "submitter": submitter, "language": "python"}
        events.append(unique_event("queued", eval_id, code="", **fields))
        if ends:
            given = {"exit_code": number % 2, "score": number, "duration_ms": 100, "memory_bytes": 1000, "executor_id": "x"}
            events.append(unique_event("completed", eval_id, occurred_at=AT, **given))
    event_store.store(conn, [parse(event) for event in events])


def test_a_run_shows_the_sums_of_its_evaluations(api: Any, conn: Connection) -> None:
    put(conn, "r", 4)
    catch_up(conn)
    found = api.read.get(f"{R}/r").json()
    assert {name: found[name] for name in ("run_id", "state", "evaluations", "pass_rate", "mean_score", "unfinished")} == {
        "run_id": "r", "state": "open", "evaluations": 4, "pass_rate": 0.5, "mean_score": 1.5, "unfinished": 0,
    }  # fmt: skip
    assert found["by_status"]["completed"] == 4
    assert found["duration_ms"] == {name: pytest.approx(100, rel=0.01) for name in ("p50", "p95", "p99")}
    assert found["first_at"] <= found["last_at"]
    assert api.read.get(f"{R}/absent").status_code == 404
    assert api.read.get(f"{R}/%20").status_code == 404


def test_a_run_may_be_declared_before_its_first_event(api: Any, conn: Connection) -> None:
    declared = api.both.put(f"{R}/r", json={"expected": 2})
    assert (declared.status_code, declared.json()["expected"], declared.json()["evaluations"]) == (200, 2, 0)
    put(conn, "r", 2)
    catch_up(conn)
    assert api.read.get(f"{R}/r").json()["state"] == "finished"
    assert api.both.put(f"{R}/r", json={"expected": 3}).json()["state"] == "open"
    assert api.both.put(f"{R}/r", json={"closed": True}).json()["expected"] == 3
    assert api.read.put(f"{R}/r", json={"closed": True}).status_code == 403


@pytest.mark.parametrize(
    ("body", "field"),
    [({"expected": -1}, "expected"), ({"expected": "2"}, "expected"), ({"expected": True}, "expected"),
     ({"closed": 1}, "closed"),
     ({"done": True}, "done"), ({}, "body"), ([], "body"), ({"expected": 2**60}, "expected"), ({"closed": None}, "closed")],
)  # fmt: skip
def test_a_declaration_that_is_wrong_is_named(api: Any, body: Any, field: str) -> None:
    answer = api.both.put(f"{R}/r", json=body)
    assert (answer.status_code, [fault["field"] for fault in answer.json()["faults"]]) == (422, [field])
    assert api.read.get(f"{R}/r").status_code == 404


def test_a_restricted_key_gets_the_sums_of_its_own_alone(api: Any, conn: Connection, eventually: Any) -> None:
    for run_id, submitter in (("team-1", "ann"), ("team-2", "bob"), ("x", "ann"), ("team-3", "ann")):
        put(conn, run_id, 2, submitter=submitter)
    other = unique_event("queued", "of-another-submitter", code="", run_id="team-3", submitter="bob")
    event_store.store(conn, [parse(other)])
    catch_up(conn)
    for visibility, own, counted in (
        (Visibility(submitter="ann"), {"team-1", "x"}, 6),
        (Visibility(run_prefix="team-"), {"team-1", "team-2", "team-3"}, 6),
        (Visibility("ann", "team-"), {"team-1"}, 4),
    ):
        key, _ = api_keys.create(conn, "test", ["read", "write"], visibility=visibility)
        client = api.client(key)
        eventually(lambda client=client: client.get(R).status_code == 200)
        assert {run["run_id"] for run in client.get(R).json()["runs"]} == own
        for run_id in ("team-1", "team-2", "team-3", "x"):
            status = 200 if run_id in own else 404
            assert client.get(f"{R}/{run_id}").status_code == status
            assert client.put(f"{R}/{run_id}", json={"closed": False}).status_code == status
        assert client.put(f"{R}/other", json={"closed": True}).status_code == 404
        rows = client.get(S, params={"since": "2026-01-01T00:00:00Z", "until": "2026-01-02T00:00:00Z", "bucket": "all"}).json()
        assert [row["evaluations"] for row in rows["rows"]] == [counted]
    assert api.read.get(f"{R}/other").status_code == 404


def test_runs_are_listed_by_cursor_and_filtered(api: Any, conn: Connection) -> None:
    for number in range(7):
        put(conn, f"r{number}", 1, submitter=f"s{number % 2}")
    put(conn, "r0", 2, submitter="other")  # r0-1 is of another submitter
    catch_up(conn)

    def walk(**query: Any) -> list[str]:
        found, cursor = [], ""
        while cursor is not None:
            page = api.read.get(R, params={**query, "cursor": cursor, "limit": 2}).json()
            found += [run["run_id"] for run in page["runs"]]
            cursor = page["next"]
        return found

    assert walk() == [f"r{number}" for number in range(6, -1, -1)]
    assert walk(submitter="s0") == ["r6", "r4", "r2"]
    assert walk(run_id_prefix="r3") == ["r3"]
    cursor = api.read.get(R, params={"limit": 2}).json()["next"]
    assert api.read.get(R, params={"cursor": cursor, "submitter": "s0"}).status_code == 422
    assert api.read.get("/storage/evaluations", params={"cursor": cursor}).status_code == 422


def test_statistics_have_a_row_for_each_bucket_and_value(api: Any, conn: Connection) -> None:
    put(conn, "r", 4)
    put(conn, "q", 2, submitter="t")
    catch_up(conn)
    query = {"since": "2026-01-01T00:00:00Z", "until": "2026-01-03T00:00:00Z"}
    by_hour = api.read.get(S, params={**query, "bucket": "hour", "group_by": "submitter"}).json()
    assert [(row["bucket"], row["submitter"], row["evaluations"]) for row in by_hour["rows"]] == [
        ("2026-01-01T10:00:00Z", "s", 4),
        ("2026-01-01T10:00:00Z", "t", 2),
    ]
    for group in ("status", "language", "executor", "run"):
        rows = api.read.get(S, params={**query, "group_by": group}).json()["rows"]
        assert sum(row["evaluations"] for row in rows) == 6
    (only,) = api.read.get(S, params={**query, "bucket": "all", "group_by": "run", "value": "q"}).json()["rows"]
    assert (only["run"], only["evaluations"], only["bucket"]) == ("q", 2, None)
    assert api.read.get(S).json()["rows"] == []


@pytest.mark.parametrize(
    ("query", "field"),
    [("bucket=minute", "bucket"), ("group_by=code", "group_by"), ("since=yesterday", "since"), ("x=1", "x"),
     ("value=1", "value"),
     ("bucket=hour&since=2020-01-01T00:00:00Z&until=2026-01-01T00:00:00Z", "since"),
     ("since=2026-01-02T00:00:00Z&until=2026-01-01T00:00:00Z", "until"), ("until=0001-01-01T00:00:00Z", "until"),
     ("bucket=month&since=2026-01-01T00:00:00Z&until=9999-12-31T23:00:00Z", "until")],
)  # fmt: skip
def test_a_question_for_statistics_that_is_wrong_is_named(api: Any, query: str, field: str) -> None:
    answer = api.read.get(f"{S}?{query}")
    assert (answer.status_code, [fault["field"] for fault in answer.json()["faults"]]) == (422, [field])


@pytest.mark.parametrize("query", ["sort=x", "limit=0", "cursor=x", "until=x", "run_id_prefix=%2F"])
def test_a_question_for_runs_that_is_wrong_is_named(api: Any, query: str) -> None:
    answer = api.read.get(f"{R}?{query}")
    assert (answer.status_code, [fault["field"] for fault in answer.json()["faults"]]) == (422, [query.partition("=")[0]])


def test_a_ten_thousandth_of_hours_is_answered_and_one_more_is_not(api: Any) -> None:
    until = "2026-01-01T00:00:00Z"
    most = api.read.get(S, params={"bucket": "hour", "since": "2024-11-10T08:00:00Z", "until": until})
    more = api.read.get(S, params={"bucket": "hour", "since": "2024-11-10T07:59:00Z", "until": until})
    assert (most.status_code, more.status_code) == (200, 422)


def test_the_client_reads_runs_and_statistics(api: Any, conn: Connection) -> None:
    put(conn, "r", 4)
    put(conn, "q", 1)
    with StorageClient(api.url, BOTH) as storage:
        assert storage.declare_run("r", expected=4).state == "open"
        catch_up(conn)
        found = storage.get_run("r")
        assert (found.state, found.evaluations, found.pass_rate, found.mean_score) == ("finished", 4, 0.5, 1.5)
        assert [run.run_id for run in storage.list_runs(page_size=1)] == ["q", "r"]
        (row,) = storage.get_statistics(group_by="run", value="r", bucket="all", since="2026-01-01T00:00:00Z")
        assert row["evaluations"] == 4
        listed = storage.list_evaluations(run_id="r", status="completed", sort="score", order="oldest", page_size=3)
        assert [one.eval_id for one in listed] == ["r-0", "r-1", "r-2", "r-3"]
        with pytest.raises(NotFound):
            storage.get_run("absent")
