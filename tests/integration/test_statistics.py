"""Runs and statistics equal what SQL computes from the tables, in whatever order events came, and however often."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row
from sqlalchemy import Connection, text

from evalstore.sinks.statistics import Round, catch_up
from evalstore.storage import database, event_store, event_writer, rollups, runs, sink_cursors, statistics, summaries
from evalstore.storage.summaries import Summary
from models.events import parse
from tests.factories import unique_event
from tests.integration.shell import Operator
from tests.sinks import Runner

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
ALWAYS = statistics.Query(BEGIN - timedelta(days=1), BEGIN + timedelta(days=30), "hour")
STATUSES = ("queued", "running", "completed", "failed", "timed_out", "cancelled", "lost")


def at(hours: float) -> str:
    return (BEGIN + timedelta(hours=hours)).isoformat()


def put(conn: Connection, *events: dict[str, Any]) -> None:
    event_store.store(conn, [parse(event) for event in events])


def ended(eval_id: str, hours: float = 0, **fields: Any) -> dict[str, Any]:
    return unique_event("completed", eval_id, occurred_at=at(hours), **{"exit_code": 0, **fields})


def queued(eval_id: str, **fields: Any) -> dict[str, Any]:
    return unique_event("queued", eval_id, occurred_at=at(-1), code="", **fields)


def erase(conn: Connection, eval_id: str) -> None:
    """Delete an evaluation with its confirmation, as `evalstore erase` does."""
    with conn.begin():
        raw = database.driver(conn)
        stored = event_writer.records(event_writer.lock(raw, [eval_id])).get(eval_id)
        if stored is not None:
            for table in ("evaluation_events", "evaluations"):
                raw.execute(f"DELETE FROM {table} WHERE eval_id = %s".encode(), [eval_id])
            event_store.confirm_change(raw, "storage:evaluation:erased", stored.record)


def rows(conn: Connection, query: str) -> list[dict[str, Any]]:
    with conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query.encode()).fetchall()


def assert_equal_to_sql(conn: Connection) -> None:
    """Compare every dimension with a GROUP BY of the table of evaluations, and every run."""
    records = rows(conn, "SELECT * FROM evaluations")
    dimensions: list[tuple[str | None, str | None]] = [(None, None), *rollups.DIMENSIONS.items()]
    for dimension, column in dimensions:
        expected: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for record in records:
            if record["finished_at"] is not None:
                hour = record["finished_at"].replace(minute=0, second=0, microsecond=0)
                expected[hour, column and record[column]].append(record)
        asked = statistics.Query(ALWAYS.since, ALWAYS.until, "hour", dimension)  # type: ignore[arg-type]
        found = {(row["bucket"], row[dimension] if dimension else None): row for row in statistics.read(conn, asked)}
        assert found.keys() == expected.keys()
        for key, some in expected.items():
            assert_sums(found[key], some)
    of_runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["run_id"] is not None:
            of_runs[record["run_id"]].append(record)
    found_runs = {row["run_id"]: row for row in runs.page(conn, runs.RunFilter(), limit=1000)[0]}
    assert {run_id for run_id, row in found_runs.items() if row["evaluations"]} == of_runs.keys()
    for run_id, some in of_runs.items():
        assert_sums(found_runs[run_id], some)


def assert_sums(found: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    by_status = {status: sum(one["status"] == status for one in records) for status in STATUSES}
    judged = sum(by_status[status] for status in ("completed", "failed", "timed_out", "lost"))
    passed = sum(one["status"] == "completed" and one["exit_code"] == 0 for one in records)
    scores = [one["score"] for one in records if one["score"] is not None]
    assert (found["evaluations"], found["by_status"]) == (len(records), by_status)
    assert found["pass_rate"] == (passed / judged if judged else None)
    assert found["mean_score"] == (pytest.approx(math.fsum(scores) / len(scores), rel=1e-12, abs=1e-12) if scores else None)
    for name in ("duration_ms", "memory_bytes"):
        values = sorted(one[name] for one in records if one[name] is not None)
        for quantile, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            exact = values[math.ceil(share * len(values)) - 1] if values else None
            assert found[name][quantile] == (exact if exact is None else pytest.approx(exact, rel=0.01))


numbers = st.none() | st.floats(min_value=-1e9, max_value=1e9) | st.floats(allow_nan=False, allow_infinity=False)
some_events = st.lists(
    st.one_of(
        st.tuples(st.just("queued"), st.sampled_from("abc"), st.integers(1, 2), st.sampled_from(["r1", "r2", None]), numbers),
        st.tuples(st.just("started"), st.sampled_from("abc"), st.integers(1, 2), st.none(), numbers),
        st.tuples(st.just("completed"), st.sampled_from("abc"), st.integers(1, 2), st.sampled_from([0, 1]), numbers),
        st.tuples(st.just("failed"), st.sampled_from("abc"), st.integers(1, 2), st.none(), numbers),
        st.tuples(st.just("erase"), st.sampled_from("abc"), st.none(), st.none(), st.none()),
        st.tuples(st.just("count"), st.none(), st.none(), st.none(), st.none()),
        st.tuples(st.just("again"), st.none(), st.none(), st.none(), st.none()),
        st.tuples(st.just("sweep"), st.none(), st.none(), st.none(), st.none()),
    ),
    max_size=25,
)


@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=some_events, hours=st.lists(st.integers(0, 3), min_size=25, max_size=25))
def test_sums_equal_sql_after_late_repeated_and_erased_events_in_any_order(
    conn: Connection, steps: list[tuple[Any, ...]], hours: list[int]
) -> None:
    with conn.begin():
        conn.execute(
            text("TRUNCATE evaluations, evaluation_events, confirmations, runs, statistics, counted_evaluations, sinks")
        )
    sent: list[dict[str, Any]] = []
    for (what, eval_id, attempt, extra, number), hour in zip(steps, hours, strict=False):
        if what == "erase":
            erase(conn, eval_id)
        elif what == "count":
            catch_up(conn)
        elif what == "sweep":
            with conn.begin():
                conn.execute(text("UPDATE sinks SET missed = 1"))
        elif what == "again":
            put(conn, *sent[-2:])
        else:
            event = unique_event(what, eval_id, occurred_at=at(hour), attempt=attempt)
            if what == "queued":
                event |= {"code": "", "run_id": extra, "submitter": extra, "language": f"l{hour}"}
            elif what != "started":
                event |= {"duration_ms": number, "memory_bytes": hour * 7, "executor_id": f"x{hour}", "error": "e"}
            if what == "completed":
                event |= {"exit_code": extra, "score": number}
            sent.append(event)
            put(conn, event)
    catch_up(conn)
    assert_equal_to_sql(conn)


def test_a_page_of_the_outbox_counts_once_although_its_process_died_before_the_commit(conn: Connection) -> None:
    put(conn, queued("a", run_id="r"), ended("a", duration_ms=5))
    sink_cursors.create(conn, rollups.NAME, rollups.NAME)
    for number in range(2):
        lease = sink_cursors.claim(conn, rollups.NAME, f"process {number}")
        assert lease is not None
        if number == 0:  # another process took the lease over: nothing of the first one's work stays
            with conn.begin():
                conn.execute(text("UPDATE sinks SET lease_token = lease_token + 1, lease_until = NULL"))
            with pytest.raises(sink_cursors.LeaseLost):
                Round(lease).run(conn, lease.cursor)
            assert rows(conn, "SELECT * FROM counted_evaluations") == []
        else:
            Round(lease).run(conn, lease.cursor)
            Round(lease).run(conn, lease.cursor)
    assert_equal_to_sql(conn)


def confirmations(conn: Connection) -> list[tuple[str, str]]:
    lines = [line for row in rows(conn, "SELECT body FROM confirmations ORDER BY id") for line in row["body"].split("\n")]
    return [(one["type"], one["state"]) for one in map(json.loads, lines) if one["type"].startswith("storage:run:")]


def test_a_run_that_is_closed_finishes_once_and_again_after_a_late_event_reopened_it(conn: Connection) -> None:
    put(conn, queued("a", run_id="r"), queued("b", run_id="r"), ended("a"))
    runs.declare(conn, "r", {"closed": True})
    catch_up(conn)
    assert confirmations(conn) == []
    put(conn, ended("b"))
    for _ in range(3):
        catch_up(conn)
    assert confirmations(conn) == [("storage:run:finished", "finished")]
    put(conn, unique_event("started", "b", attempt=2, occurred_at=at(1)))
    catch_up(conn)
    assert confirmations(conn)[1:] == [("storage:run:updated", "open")]
    found = runs.get(conn, "r")
    assert found is not None
    assert (found["state"], found["unfinished"], found["finished_at"]) == ("open", 1, None)
    put(conn, ended("b", 2, attempt=2))
    catch_up(conn)
    put(conn, ended("a", -0.5, exit_code=1))  # earlier, so the result is another one
    catch_up(conn)
    assert confirmations(conn)[2:] == [("storage:run:finished", "finished"), ("storage:run:updated", "finished")]


def test_a_run_finishes_when_as_many_as_expected_have_ended(conn: Connection) -> None:
    runs.declare(conn, "r", {"expected": 2})
    put(conn, queued("a", run_id="r"), ended("a"))
    catch_up(conn)
    assert confirmations(conn) == []
    put(conn, queued("b", run_id="r"), ended("b"))
    catch_up(conn)
    assert confirmations(conn) == [("storage:run:finished", "finished")]


def test_what_is_erased_leaves_no_run_and_no_statistics(conn: Connection) -> None:
    put(conn, queued("a", run_id="r", submitter="s"), ended("a"))
    catch_up(conn)
    erase(conn, "a")
    catch_up(conn)
    for table in ("runs", "statistics", "counted_evaluations"):
        assert rows(conn, f"SELECT * FROM {table}") == []


def test_evaluations_from_before_the_first_start_are_counted(conn: Connection) -> None:
    for number in range(20):
        put(conn, queued(f"e{number}", run_id="r"), ended(f"e{number}", number % 3))
    with conn.begin():
        conn.execute(text("TRUNCATE confirmations"))
    catch_up(conn)
    assert_equal_to_sql(conn)


def test_any_number_of_submitters_is_counted_and_a_large_answer_is_refused(
    conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "x" * 999
    put(conn, *(event for n in range(50) for event in (queued(f"e{n}", submitter=f"{long}{n % 10}"), ended(f"e{n}"))))
    catch_up(conn)
    assert_equal_to_sql(conn)
    monkeypatch.setattr(statistics, "MOST_ROWS", 9)
    with pytest.raises(statistics.TooMuch):
        statistics.read(conn, statistics.Query(ALWAYS.since, ALWAYS.until, "all", "submitter"))


@pytest.mark.parametrize("values", [[5.0], [0.0, -3.5, 7e300, 5e-324, -1e308], [float(n) for n in range(1, 1000)]])
def test_a_quantile_is_within_one_percent_of_the_value_of_that_rank(values: list[float]) -> None:
    summary = Summary()
    for value in values:
        summary.count(summaries.Fact(None, None, None, None, "completed", BEGIN, True, None, value, None))
    ordered = sorted(values)
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        exact = ordered[math.ceil(share * len(ordered)) - 1]
        assert summary.as_json()["duration_ms"][name] == pytest.approx(exact, rel=0.01)


@pytest.fixture
def start(tmp_path: Path, database_url: str, redis_url: str) -> Iterator[Callable[[], Runner]]:
    """`start()`: a process of `evalstore sinks run` without sinks of its own."""
    made: list[Runner] = []

    def begin() -> Runner:
        folder = tmp_path / f"runner-{len(made)}"
        folder.mkdir()
        made.append(Runner(folder, {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}, ""))
        made[-1].start()
        return made[-1]

    yield begin
    for runner in made:
        runner.kill()
        print(f"--- {runner.log}\n{runner.log.read_text()[-4000:]}")


def test_the_sinks_process_keeps_statistics_and_another_takes_over_when_it_is_killed(
    start: Callable[[], Runner], conn: Connection, eventually: Callable[..., None]
) -> None:
    runs.declare(conn, "r", {"expected": 40})

    def counted() -> int:
        found = runs.get(conn, "r")
        return int(found["evaluations"]) if found else 0

    first = start()
    put(conn, *(event for n in range(20) for event in (queued(f"e{n}", run_id="r"), ended(f"e{n}", n % 3))))
    eventually(lambda: counted() == 20)
    first.kill()
    start()
    put(conn, *(event for n in range(20, 40) for event in (queued(f"e{n}", run_id="r"), ended(f"e{n}", n % 3))))
    eventually(lambda: counted() == 40, within_s=40)
    assert_equal_to_sql(conn)
    eventually(lambda: confirmations(conn) == [("storage:run:finished", "finished")])


def test_runs_and_statistics_are_shown_on_the_command_line(conn: Connection, operator: Operator) -> None:
    put(conn, *(event for n in range(4) for event in (queued(f"e{n}", run_id="r", submitter="s"), ended(f"e{n}", score=n))))
    catch_up(conn)
    (listed,) = operator.evalstore("runs", "ls", "-o", "json").json
    assert (listed["run_id"], listed["evaluations"], listed["mean_score"]) == ("r", 4, 1.5)
    assert operator.evalstore("runs", "ls", "--run-id-prefix", "x").status == 3
    assert operator.evalstore("runs", "show", "r", "--watch", "-o", "json").json["pass_rate"] == 1.0
    assert operator.evalstore("runs", "show", "absent").status == 3
    since = ("--since", "2025-12-30T00:00:00Z", "--until", "2026-01-03T00:00:00Z")
    (row,) = operator.evalstore("stats", "--group-by", "submitter", *since, "-o", "json").json
    assert (row["submitter"], row["evaluations"]) == ("s", 4)
    assert operator.evalstore("stats", "--bucket", "hour", "--since", "2020-01-01T00:00:00Z").status == 2
    found = operator.evalstore("ls", "--run-id", "r", "--sort", "score", "--oldest-first", "-o", "jsonl")
    assert [json.loads(line)["eval_id"] for line in found.out.splitlines()] == ["e0", "e1", "e2", "e3"]
    assert operator.evalstore("ls", "--status", "failed").status == 3
    assert operator.evalstore("ls", "--sort", "score").status == 2
    assert [one["eval_id"] for one in operator.evalstore("ls", "--eval-id-prefix", "e3", "-o", "json").json] == ["e3"]
