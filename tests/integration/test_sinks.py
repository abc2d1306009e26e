"""Every committed event reaches each sink, in order, whatever dies or stands still meanwhile."""

import json
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from sqlalchemy import Connection, Engine, text

from evalstore.local.servers import free_port
from evalstore.storage import event_store, outbox, redrives, sink_cursors
from models.events import parse
from models.settings import Settings
from tests.integration.shell import Operator
from tests.sinks import Runner, firsts, installed, received, versions
from worker import redrive_job
from worker.broker import Broker

Eventually = Callable[..., None]
Start = Callable[..., Runner]
AT = "2026-01-01T00:00:00Z"


def store(conn: Connection, *eval_ids: str, **fields: object) -> list[str]:
    """Store an event of each, in one commit; returns their ids."""
    ids = [uuid4() for _ in eval_ids]
    events = [
        {"type": "evaluation:started", "eval_id": eval_id, "event_id": event_id, "occurred_at": AT, **fields}
        for eval_id, event_id in zip(eval_ids, ids, strict=True)
    ]
    event_store.store(conn, [parse(event) for event in events])
    return [str(event_id) for event_id in ids]


@pytest.fixture
def start(tmp_path: Path, database_url: str, redis_url: str) -> Iterator[Start]:
    """`start("one", "two")`: a runner of sinks of these names, which write to files of their names."""
    made: list[Runner] = []

    def begin(*names: str, options: str = "", type_: str = "steered", **environment: str) -> Runner:
        folder = tmp_path / f"runner-{len(made)}"
        folder.mkdir()
        tables = [f'[{name}]\ntype = "{type_}"\npath = "{tmp_path / name}"\n{options}\n' for name in names]
        servers = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}
        made.append(Runner(folder, servers | environment, "".join(tables)))
        made[-1].start()
        return made[-1]

    yield begin
    for runner in made:
        runner.kill()
        print(f"--- {runner.log}\n{runner.log.read_text()[-4000:]}")


@pytest.fixture
def shell(operator: Operator) -> Operator:
    operator.env |= installed(operator.folder)
    return operator


def sinks(shell: Operator) -> dict[str, dict[str, object]]:
    found = {sink["name"]: sink for sink in shell.evalstore("sinks", "ls", "-o", "json").json}
    return defaultdict(lambda: defaultdict(str), found)


def test_a_sink_receives_events_whole_and_in_commit_order(
    start: Start, conn: Connection, tmp_path: Path, eventually: Eventually
) -> None:
    start("one")
    for number in range(30):
        store(conn, *(f"e-{which}" for which in range(number % 5, 5)), metadata={"number": number})
    completed = {"type": "evaluation:completed", "eval_id": "e-0", "event_id": uuid4(), "occurred_at": AT, "exit_code": 0}
    event_store.store(conn, [parse(completed | {"output": "x" * 5000, "error": "y" * 70_000, "score": None})])
    eventually(lambda: len(received(tmp_path / "one")) == 91)
    lines = received(tmp_path / "one")
    assert all(found == list(range(1, len(found) + 1)) for found in versions(lines).values())
    last = lines[-1]
    assert (last["type"], last["eval_id"], last["exit_code"], last["output"]) == ("evaluation:completed", "e-0", 0, "x" * 5000)
    assert last["error_ref"]["size"] == 70_000
    assert "error" not in last
    assert last["occurred_at"] == AT
    assert datetime.fromisoformat(last["recorded_at"]).tzinfo is not None


def test_a_commit_held_open_delays_what_is_behind_it_and_nothing_is_lost(
    start: Start, engine: Engine, tmp_path: Path, eventually: Eventually, shell: Operator
) -> None:
    start("one")
    with engine.connect() as conn, engine.connect() as slow:
        store(conn, "before")
        eventually(lambda: len(received(tmp_path / "one")) == 1)
        raw = slow.connection.driver_connection
        assert isinstance(raw, psycopg.Connection)
        event_id = uuid4()
        raw.execute(
            "INSERT INTO evaluation_events (eval_id, event_id, type, attempt, occurred_at) VALUES ('slow', %s, "
            "'evaluation:started', 1, now())",
            [event_id],
        )
        body = {"type": "storage:evaluation:created", "eval_id": "slow", "version": 1, "event_ids": [str(event_id)]}
        raw.execute("INSERT INTO confirmations (count, body) VALUES (1, %s)", [json.dumps(body)])
        for number in range(1000):
            store(conn, f"after-{number % 100}")
        eventually(lambda: sinks(shell)["one"]["lag_events"] == 1000)
        assert len(received(tmp_path / "one")) == 1
        raw.commit()
        eventually(lambda: len(received(tmp_path / "one")) == 1002)
    lines = received(tmp_path / "one")
    assert lines[1]["eval_id"] == "slow"
    assert all(found == list(range(1, len(found) + 1)) for found in versions(lines).values())
    assert len(firsts(lines)) == len(lines)


def test_a_commit_that_rolled_back_delays_nothing(
    start: Start, engine: Engine, database_url: str, tmp_path: Path, eventually: Eventually
) -> None:
    start("one")
    with (
        engine.connect() as conn,
        psycopg.connect(database_url) as other,
        psycopg.connect(database_url.rpartition("/")[0] + "/postgres") as elsewhere,
    ):
        elsewhere.execute("CREATE TEMPORARY TABLE long AS SELECT 1")  # a transaction of another database
        other.execute("SELECT count(*) FROM confirmations")  # one that stores nothing
        with psycopg.connect(database_url) as fails:
            fails.execute("INSERT INTO confirmations (count, body) VALUES (1, '{}')")
            fails.rollback()
        store(conn, "after")
        eventually(lambda: len(received(tmp_path / "one")) == 1, within_s=15)


def test_lag_is_below_200_ms_at_1000_events_a_second(
    start: Start, conn: Connection, tmp_path: Path, eventually: Eventually
) -> None:
    start("one")
    store(conn, "first")
    eventually(lambda: len(received(tmp_path / "one")) == 1)
    began = time.monotonic()
    for tick in range(60):
        store(conn, *(f"e-{tick}-{number}" for number in range(50)))
        time.sleep(max(0.0, began + (tick + 1) * 0.05 - time.monotonic()))
    eventually(lambda: len(received(tmp_path / "one")) == 3001)
    lags = [line["at"] - datetime.fromisoformat(line["recorded_at"]).timestamp() for line in received(tmp_path / "one")[1:]]
    print(f"lag p50 {statistics.median(lags) * 1000:.0f} ms, max {max(lags) * 1000:.0f} ms")
    assert statistics.median(lags) < 0.2


def test_a_runner_that_is_killed_loses_nothing_and_another_one_takes_over(
    start: Start, conn: Connection, tmp_path: Path, eventually: Eventually
) -> None:
    options = "batch_events = 20"
    runners = [start("one", options=options), start("one", options=options)]
    stored: list[str] = []
    for turn in range(4):
        for _ in range(50):
            stored += store(conn, *(f"e-{number}" for number in range(10)))
        runners[turn % 2].kill()
        runners[turn % 2].start()
    eventually(lambda: len(firsts(received(tmp_path / "one"))) == len(stored), within_s=60)
    lines = received(tmp_path / "one")
    assert {line["event_id"] for line in lines} == set(stored)
    assert all(found == list(range(1, len(found) + 1)) for found in versions(lines).values())


def test_a_frozen_runner_loses_its_lease_and_changes_nothing_when_it_wakes(
    start: Start, conn: Connection, tmp_path: Path, eventually: Eventually, shell: Operator
) -> None:
    first = start("one")
    store(conn, "before")
    eventually(lambda: len(received(tmp_path / "one")) == 1)
    first.freeze()
    start("one")
    expected = store(conn, "after")
    eventually(lambda: len(received(tmp_path / "one")) == 2, within_s=sink_cursors.LEASE_S + 15)
    first.thaw()
    expected += store(conn, "last")
    eventually(lambda: len(received(tmp_path / "one")) >= 3)
    lines = received(tmp_path / "one")
    assert [line["event_id"] for line in lines[1:]] == expected
    assert lines[0]["pid"] != lines[1]["pid"] == lines[2]["pid"]


def test_a_sink_that_hangs_or_is_away_delays_no_other(
    start: Start, conn: Connection, tmp_path: Path, eventually: Eventually, shell: Operator
) -> None:
    (tmp_path / "hung.hangs").touch()
    (tmp_path / "gone.away").touch()
    runner = start("hung", "gone", "good")
    stored = [event_id for number in range(50) for event_id in store(conn, f"e-{number}", "e")]
    eventually(lambda: len(received(tmp_path / "good")) == 100)
    eventually(lambda: sinks(shell)["gone"]["last_error"] == "it is away")
    assert sinks(shell)["hung"]["lag_events"] == 100
    assert not received(tmp_path / "hung")
    (tmp_path / "hung.hangs").unlink()
    (tmp_path / "gone.away").unlink()
    for name in ("hung", "gone"):
        eventually(lambda name=name: len(received(tmp_path / name)) == 100, within_s=15)
        assert {line["event_id"] for line in received(tmp_path / name)} == set(stored)
    eventually(lambda: sinks(shell)["gone"]["last_error"] is None)
    assert runner.stop() == 0


def test_confirmations_that_are_not_passed_on_leave_no_lag(
    start: Start, conn: Connection, tmp_path: Path, eventually: Eventually, shell: Operator
) -> None:
    start("one")
    store(conn, "e")
    with conn.begin():
        body = '{"type":"storage:run:finished","run_id":"r"}'
        conn.execute(text("INSERT INTO confirmations (count, body) VALUES (1, :body)"), {"body": body})
    eventually(lambda: len(received(tmp_path / "one")) == 1, within_s=30)
    eventually(lambda: sinks(shell)["one"]["lag_events"] == 0, within_s=20)
    assert len(received(tmp_path / "one")) == 1


def test_a_runner_with_a_hanging_sink_stops_in_time(
    start: Start, conn: Connection, tmp_path: Path, eventually: Eventually
) -> None:
    (tmp_path / "one.hangs").touch()
    runner = start("one")
    store(conn, "e")
    eventually((tmp_path / "one.hung").exists, within_s=30)
    began = time.monotonic()
    assert runner.stop() == 0
    assert time.monotonic() - began < 10


def test_refused_events_are_dead_letters_of_their_sink_and_can_be_redriven(
    start: Start, conn: Connection, engine: Engine, broker: Broker, tmp_path: Path, eventually: Eventually, shell: Operator
) -> None:
    stored = [event_id for _ in range(100) for event_id in store(conn, *(f"e-{number}" for number in range(100)))]
    refused = stored[::200]
    (tmp_path / "one.refused").write_text("\n".join(refused))
    start("one", "two")
    eventually(lambda: len(received(tmp_path / "one")) >= 9950 and len(received(tmp_path / "two")) == 10_000, within_s=60)
    eventually(lambda: len(shell.letters()) == 50)
    assert {line["event_id"] for line in received(tmp_path / "one")} == set(stored) - set(refused)
    assert len(received(tmp_path / "one")) == 9950
    letters = shell.letters()
    assert {(one["queue"], one["error_class"], one["error_message"]) for one in letters} == {
        ("sink:one", "BadMessage", "it does not fit")
    }
    row = sinks(shell)["one"]
    assert (row["delivered"], row["dead"]) == (9950, 50)

    (tmp_path / "one.refused").unlink()
    done = shell.dlq("redrive", "--queue", "sink:one", "--yes", "--detach", "-o", "json")
    assert done.status == 0, done.err
    with engine.connect() as other:
        redrives.step(other, UUID(done.json["id"]), lambda letters: redrive_job.send(broker, broker.lua, letters))
    eventually(lambda: len(received(tmp_path / "one")) == 10_000)
    eventually(lambda: Counter(one["state"] for one in shell.letters()) == {"stored": 50})
    with engine.connect() as other:
        assert redrive_job.sweep(other, broker, Settings().max_content_bytes)["dead"] == 0
    assert len(received(tmp_path / "two")) == 10_000
    assert shell.dlq("redrives", done.json["id"], "-o", "json").json["state"] == "done"


def test_a_sink_that_refuses_everything_keeps_it_instead_of_making_dead_letters(
    start: Start, conn: Connection, tmp_path: Path, eventually: Eventually, shell: Operator
) -> None:
    stored = store(conn, *(f"e-{number}" for number in range(2000)))
    (tmp_path / "one.refused").write_text("\n".join(stored))
    start("one")
    eventually(lambda: str(sinks(shell)["one"]["last_error"]).startswith("the breaker is open"))
    assert not shell.letters()
    (tmp_path / "one.refused").unlink()
    # Of the attempt that was under way when it was corrected, some may be dead letters.
    eventually(lambda: len(received(tmp_path / "one")) + len(shell.letters()) == 2000)


def test_the_lag_of_a_replay_is_the_age_of_the_oldest_event_to_come(conn: Connection) -> None:
    sink_cursors.create(conn, "one", "own")
    store(conn, "e")
    with conn.begin():
        conn.exec_driver_sql("UPDATE sinks SET replay_at = '2000-01-01', replay_until = clock_timestamp()")
    (one,) = sink_cursors.statuses(conn)
    assert (one.state, one.lag_events > 0, one.lag_s < 60) == ("replaying", True, True)
    with conn.begin():
        conn.exec_driver_sql("UPDATE evaluation_events SET recorded_at = clock_timestamp() - interval '1 hour'")
    assert 3600 <= sink_cursors.statuses(conn)[0].lag_s < 3660


def test_pause_resume_and_rewind_are_kept_with_who_and_why(
    start: Start, conn: Connection, tmp_path: Path, eventually: Eventually, shell: Operator
) -> None:
    start("one")
    first = store(conn, "e", "f")
    eventually(lambda: len(received(tmp_path / "one")) == 2)
    assert shell.evalstore("sinks", "pause", "one", "--reason", "maintenance").status == 0
    eventually(lambda: sinks(shell)["one"]["state"] == "paused")
    time.sleep(1)
    second = store(conn, "e", "f")
    eventually(lambda: sinks(shell)["one"]["lag_events"] == 2)
    shown = shell.evalstore("sinks", "show", "one", "-o", "json").json
    assert (shown["state"], shown["missed"], shown["lag_events"]) == ("paused", 0, 2)
    assert len(received(tmp_path / "one")) == 2
    assert shell.evalstore("sinks", "resume", "one").status == 0
    eventually(lambda: len(received(tmp_path / "one")) == 4)
    assert shell.evalstore("sinks", "rewind", "one", "--to", "start", "--reason", "again").status == 0
    eventually(lambda: len(received(tmp_path / "one")) == 8)
    third = store(conn, "e")
    eventually(lambda: len(received(tmp_path / "one")) == 9)
    lines = received(tmp_path / "one")
    assert [line["event_id"] for line in lines[:4]] == first + second
    assert [(line["eval_id"], line["version"]) for line in lines[4:]] == [("e", 1), ("f", 1), ("e", 2), ("f", 2), ("e", 3)]
    assert lines[8]["event_id"] == third[0]
    eventually(lambda: sinks(shell)["one"]["state"] == "running")
    actions = shell.rows("SELECT actor, verb, reason, filter->>'sink' AS sink FROM operator_actions ORDER BY id")
    assert [tuple(action.values()) for action in actions] == [
        ("ada", "sinks pause", "maintenance", "one"),
        ("ada", "sinks resume", None, "one"),
        ("ada", "sinks rewind", "again", "one"),
    ]
    for verb in (["pause"], ["resume"], ["show"], ["rewind", "--to", "2h"]):
        done = shell.evalstore("sinks", verb[0], "none", *verb[1:])
        assert (done.status, "there is no sink 'none'" in done.err) == (3, True)


def test_a_rewind_to_a_time_begins_there(
    start: Start, conn: Connection, tmp_path: Path, eventually: Eventually, shell: Operator
) -> None:
    start("one")
    store(conn, "old")
    eventually(lambda: len(received(tmp_path / "one")) == 1)
    time.sleep(0.2)
    then = datetime.now(UTC).isoformat()
    new = store(conn, *(f"new-{number}" for number in range(5000)))
    eventually(lambda: len(received(tmp_path / "one")) == 5001)
    assert shell.evalstore("sinks", "rewind", "one", "--to", then).status == 0
    eventually(lambda: len(received(tmp_path / "one")) == 10_001)
    assert {line["event_id"] for line in received(tmp_path / "one")[5001:]} == set(new)


def test_a_paused_sink_is_filled_from_the_log_when_the_outbox_forgot_its_rows(
    start: Start, conn: Connection, tmp_path: Path, eventually: Eventually, shell: Operator
) -> None:
    start("one", "two")
    stored = store(conn, "e")
    eventually(lambda: len(received(tmp_path / "one")) == len(received(tmp_path / "two")) == 1)
    shell.evalstore("sinks", "pause", "one")
    stored += [event_id for number in range(20) for event_id in store(conn, f"e-{number}", "e")]
    eventually(lambda: len(received(tmp_path / "two")) == 41)
    eventually(lambda: all(sinks(shell)[name]["lag_events"] == 0 for name in ("two", "statistics")), within_s=30)
    with conn.begin():
        conn.exec_driver_sql("UPDATE confirmations SET relayed_at = now() - interval '1 hour'")
    assert outbox.forget(conn) == 21
    assert shell.evalstore("sinks", "show", "one", "-o", "json").json["missed"] == 40
    shell.evalstore("sinks", "resume", "one")
    stored += store(conn, "e")
    eventually(lambda: {line["event_id"] for line in received(tmp_path / "one")} == set(stored))
    assert all(found == list(range(1, len(found) + 1)) for found in versions(received(tmp_path / "one")).values())


def test_the_outbox_keeps_what_a_running_sink_needs_up_to_a_bound(conn: Connection) -> None:
    sink_cursors.create(conn, "slow", "steered")
    for number in range(10):
        store(conn, f"e-{number}")
    with conn.begin():
        conn.exec_driver_sql(
            "UPDATE confirmations SET relayed_at = now() - interval '1 day', recorded_at = now() - (20 - id) * interval '1 day'"
        )
        conn.exec_driver_sql("UPDATE sinks SET position = 3")
    assert outbox.forget(conn, max_age_s=1e9) == 3
    (sink,) = sink_cursors.statuses(conn)
    assert (sink.missed, sink.lag_events) == (0, 7)
    assert outbox.forget(conn, max_age_s=14.5 * 86_400) == 2
    (sink,) = sink_cursors.statuses(conn)
    assert (sink.missed, sink.lag_events) == (2, 5)


def test_erasures_reach_sinks_in_their_place(start: Start, conn: Connection, tmp_path: Path, eventually: Eventually) -> None:
    start("one")
    store(conn, "e")
    with conn.begin():
        body = (
            '{"type":"storage:evaluation:erased","eval_id":"e","version":2,"status":"erased","event_ids":[],"recorded_at":""}'
        )
        conn.exec_driver_sql("INSERT INTO confirmations (count, body) VALUES (1, %s)", (body,))
    store(conn, "f")
    eventually(lambda: len(received(tmp_path / "one")) == 3)
    assert [line.get("erased", line["eval_id"]) for line in received(tmp_path / "one")] == ["e", True, "f"]


def test_the_order_of_an_evaluation_holds_under_many_writers(
    start: Start, engine: Engine, tmp_path: Path, eventually: Eventually, shell: Operator
) -> None:
    start("one")

    def write() -> None:
        with engine.connect() as conn:
            for _ in range(60):
                store(conn, "a", "b", "c")

    threads = [threading.Thread(target=write) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: len(received(tmp_path / "one")) == 900, within_s=30)
    assert all(found == list(range(1, 301)) for found in versions(received(tmp_path / "one")).values())
    shell.evalstore("sinks", "rewind", "one", "--to", "start")
    eventually(lambda: len(received(tmp_path / "one")) == 1800, within_s=30)
    again = received(tmp_path / "one")
    assert [line["event_id"] for line in again[900:] if line["eval_id"] == "a"] == [
        line["event_id"] for line in again[:900] if line["eval_id"] == "a"
    ]


def test_metrics_tell_how_each_sink_is(start: Start, conn: Connection, tmp_path: Path, eventually: Eventually) -> None:
    port = free_port()
    (tmp_path / "gone.away").touch()
    start("one", "gone", EVALSTORE_SINKS_METRICS_PORT=str(port))
    store(conn, "e")
    eventually(lambda: len(received(tmp_path / "one")) == 1)

    def shown() -> str:
        return httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text

    eventually(lambda: 'evalstore_sink_lag_events{sink="gone"} 1.0' in shown())
    eventually(lambda: 'evalstore_sink_events_total{outcome="delivered",sink="one"} 1.0' in shown())
    eventually(lambda: 'evalstore_sink_lag_seconds{sink="one"} 0.0' in shown())
    eventually(lambda: 'evalstore_sink_failing_seconds{sink="gone"} 0.0' not in shown())
    assert 'evalstore_processes{role="sinks",state="live"} 1.0' in shown()
    assert httpx.get(f"http://127.0.0.1:{port}/health/live", timeout=10).status_code == 200


def test_the_example_package_is_a_sink(start: Start, conn: Connection, tmp_path: Path, eventually: Eventually) -> None:
    start("lines", type_="jsonl", options="max_line_bytes = 1000")
    stored = store(conn, "e", "f")
    eventually(lambda: [line["event_id"] for line in received(tmp_path / "lines")] == stored)


def test_ranges_of_a_sink_are_worked_on_apart_and_keep_the_order_of_an_evaluation(
    start: Start, conn: Connection, tmp_path: Path, eventually: Eventually, shell: Operator
) -> None:
    runner = start("one", options="hash_ranges = 4")
    eventually(lambda: runner.log.read_text().count("sink one#") == 4, within_s=30)
    for number in range(40):
        store(conn, *(f"e{which}" for which in range(number % 7, 25)))
    total = sum(25 - number % 7 for number in range(40))
    eventually(lambda: len(firsts(received(tmp_path / "one"))) == total, within_s=30)

    assert all(found == sorted(found) for found in versions(received(tmp_path / "one")).values())
    eventually(lambda: sinks(shell)["one"]["lag_events"] == 0, within_s=10)
    assert sinks(shell).keys() == {"one", "statistics"}
    assert sinks(shell)["one"]["delivered"] == total
    with conn.begin():
        ends = conn.exec_driver_sql(
            "SELECT count(*), count(DISTINCT position), min(delivered) FROM sinks WHERE type <> 'statistics'"
        ).one()
    assert ends[:2] == (4, 1)  # also ranges that hold nothing at the end come to the end
    assert ends[2] > 0
    shell.evalstore("sinks", "pause", "one", "--reason", "r")
    assert sinks(shell)["one"]["state"] == "paused"
    shell.evalstore("sinks", "rewind", "one", "--to", "start", "--reason", "r")
    shell.evalstore("sinks", "resume", "one", "--reason", "r")
    eventually(lambda: len(received(tmp_path / "one")) == 2 * total, within_s=30)
    replayed = received(tmp_path / "one")[total:]
    assert all(found == sorted(found) for found in versions(replayed).values())


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
def test_another_number_of_ranges_begins_at_the_least_cursor(
    start: Start, conn: Connection, tmp_path: Path, eventually: Eventually, shell: Operator, before: int, after: int
) -> None:
    first = start("one", options=f"hash_ranges = {before}")
    ids = store(conn, *(f"e{number}" for number in range(20)))
    eventually(lambda: len(received(tmp_path / "one")) == 20)
    second = start("one", options=f"hash_ranges = {after}")
    ids += store(conn, *(f"e{number}" for number in range(20)))
    eventually(lambda: len(firsts(received(tmp_path / "one"))) == 40)
    with conn.begin():
        # One range, if there are several, has come less far than the others.
        conn.exec_driver_sql(
            "UPDATE sinks SET position = position - 1, generation = generation + 1"
            " WHERE name = (SELECT min(name) FROM sinks WHERE type <> 'statistics')"
        )
    assert first.stop() == 0
    ids += store(conn, *(f"e{number}" for number in range(20)))
    eventually(lambda: second.log.read_text().count("sink one") >= after, within_s=30)
    eventually(lambda: len(firsts(received(tmp_path / "one"))) == 60, within_s=30)
    assert {line["event_id"] for line in received(tmp_path / "one")} == set(ids)
    assert all(found == sorted(found) for found in versions(received(tmp_path / "one")).values())
    with conn.begin():
        assert conn.exec_driver_sql("SELECT count(*) FROM sinks WHERE type <> 'statistics'").scalar() == after
    eventually(lambda: sinks(shell)["one"]["lag_events"] == 0, within_s=10)
