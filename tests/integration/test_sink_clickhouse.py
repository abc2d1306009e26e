"""Events in ClickHouse: each once, whatever dies, and what its users read there."""

import base64
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection

from evalstore.local.servers import free_port
from evalstore.sinks import clickhouse_table
from evalstore.storage import event_store
from models.events import parse
from tests.clickhouse import PASSWORD, USER, ClickHouse
from tests.integration.shell import Operator
from tests.integration.test_sinks import sinks, store
from tests.sinks import HOLD_CURSOR, Runner, cursor_held, documented_query, installed, table

Eventually = Callable[..., None]


@pytest.fixture
def name() -> str:
    return f"events_{uuid4().hex[:8]}"


@pytest.fixture
def start(
    tmp_path: Path, database_url: str, redis_url: str, clickhouse_server: ClickHouse, name: str
) -> Iterator[Callable[..., Runner]]:
    """`start(create=False)`: a runner of the sink `main`, with these keys."""
    made: list[Runner] = []

    def begin(**keys: object) -> Runner:
        folder = tmp_path / f"runner-{len(made)}"
        folder.mkdir()
        given: dict[str, object] = {"type": "clickhouse", "url": clickhouse_server.url, "table": name, "user": USER}
        given |= {"password_env": "CLICKHOUSE_PASSWORD", "create": True, "batch_s": 0.1}
        servers = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url, "CLICKHOUSE_PASSWORD": PASSWORD}
        made.append(Runner(folder, servers, table(**given | keys)))
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


def is_at_the_end(shell: Operator) -> bool:
    found = sinks(shell)["main"]
    return found["lag_events"] == 0 and found["last_error"] is None


def prefixes(server: ClickHouse, name: str) -> bool:
    """Whether of each evaluation the events up to some version are there, each once."""
    of_each = f"SELECT count() AS rows, max(version) AS last, uniqExact(version) AS versions FROM {name} GROUP BY eval_id"
    return all(one["rows"] == one["last"] == one["versions"] for one in server.query(of_each))


def test_a_row_has_all_fields_of_an_event(
    start: Callable[..., Runner],
    conn: Connection,
    clickhouse_server: ClickHouse,
    name: str,
    eventually: Eventually,
    shell: Operator,
) -> None:
    start()
    given: dict[str, Any] = {"eval_id": "e", "occurred_at": "2026-01-31T09:30:00.000001Z"}
    queued = {"type": "evaluation:queued", "run_id": "r", "language": "python", "submitter": "ada", "code": "print('é\x00')"}
    ended: dict[str, Any] = {
        "type": "evaluation:completed",
        "exit_code": -(2**63),
        "duration_ms": 1e300,
        "memory_bytes": 2**63 - 1,
        "score": 0.5,
    }
    ended |= {
        "output": "lone \ud800",
        "error_b64": base64.b64encode(b"\xff\x00").decode(),
        "metadata": {"a": {"b": [1, None, "ü"]}},
    }
    for fields in (queued, ended):
        event_store.store(conn, [parse({"event_id": uuid4(), **given, **fields})])
    store(conn, "e", output=5, unknown={"a": "x"})
    eventually(lambda: sinks(shell)["main"]["delivered"] == 3, within_s=30)
    first, second, third = clickhouse_server.query(f"SELECT * FROM {name} FINAL ORDER BY version")
    assert {key: first[key] for key in queued} == queued
    assert first["occurred_at"] == "2026-01-31 09:30:00.000001"
    assert {key: type(ended[key])(second[key]) for key in ended if key not in {"output", "metadata"}} == {
        key: value for key, value in ended.items() if key not in {"output", "metadata"}
    }
    assert second["output"] is None
    assert base64.b64decode(second["output_b64"]).decode("utf-8", "surrogatepass") == ended["output"]
    assert json.loads(second["metadata"]) == ended["metadata"]
    assert json.loads(third["extra"]) == {"output": 5, "unknown": {"a": "x"}}
    assert third["output"] is None
    (day,) = clickhouse_server.query(documented_query("FINAL").replace("evaluation_events", name))
    assert (day["type"], day["events"], day["p95_ms"]) == ("evaluation:completed", 1, 1e300)


def test_each_event_is_there_once_and_in_order_though_runners_are_killed(
    start: Callable[..., Runner],
    conn: Connection,
    clickhouse_server: ClickHouse,
    name: str,
    eventually: Eventually,
    shell: Operator,
) -> None:
    runners = [start(batch_events=50, batch_s=0.02) for _ in range(2)]
    stored: list[str] = []
    for turn in range(6):
        for _ in range(60):
            stored += store(conn, *(f"e-{number}" for number in range(10)))
        time.sleep(random.random())  # noqa: S311
        runners[turn % 2].kill()
        runners[turn % 2].start()
        if clickhouse_server.query(f"SELECT 1 FROM system.tables WHERE name = '{name}'"):
            assert prefixes(clickhouse_server, name)
    eventually(lambda: is_at_the_end(shell), within_s=90)
    assert {row["event_id"] for row in clickhouse_server.query(f"SELECT event_id FROM {name}")} == set(stored)
    assert prefixes(clickhouse_server, name)


def test_a_batch_that_was_sent_before_the_kill_comes_again_as_it_was(
    start: Callable[..., Runner],
    conn: Connection,
    database_url: str,
    clickhouse_server: ClickHouse,
    name: str,
    eventually: Eventually,
    shell: Operator,
) -> None:
    runner = start(batch_events=40)
    store(conn, "e")
    eventually(lambda: sinks(shell)["main"]["delivered"] == 1, within_s=30)
    with conn.begin():
        conn.exec_driver_sql(HOLD_CURSOR)
    count = f"SELECT count() AS rows, uniqExact(event_id) AS events FROM {name}"
    for _ in range(2):
        with cursor_held(database_url) as is_written:
            for number in range(25):
                store(conn, "e", f"e-{number}")
            eventually(is_written, within_s=20)
            runner.kill()
            store(conn, *(f"late-{number}" for number in range(30)))
        runner.start()
        eventually(lambda: is_at_the_end(shell), within_s=40)
    assert clickhouse_server.query(count) == [{"rows": 1 + 2 * 80, "events": 1 + 2 * 80}]
    assert prefixes(clickhouse_server, name)


def test_a_row_that_the_table_refuses_is_a_dead_letter_and_holds_up_nothing(
    start: Callable[..., Runner],
    conn: Connection,
    clickhouse_server: ClickHouse,
    name: str,
    eventually: Eventually,
    shell: Operator,
) -> None:
    _create(clickhouse_server, name, ", CONSTRAINT c CHECK eval_id != 'bad'")
    start(create=False)
    store(conn, *(f"e-{number}" for number in range(100)), "bad", *(f"f-{number}" for number in range(100)))
    eventually(lambda: sinks(shell)["main"]["delivered"] == 200, within_s=30)
    (letter,) = shell.letters()
    assert (letter["queue"], letter["eval_id"], letter["error_class"]) == ("sink:main", "bad", "BadMessage")
    assert "VIOLATED_CONSTRAINT" in letter["error_message"]
    assert clickhouse_server.query(f"SELECT count() AS n, uniqExact(event_id) AS u FROM {name}") == [{"n": 200, "u": 200}]


def _create(server: ClickHouse, name: str, more: str = "", *, without: str = "") -> None:
    statement = clickhouse_table.create_table(name).replace("\n)\nENGINE", f"{more}\n)\nENGINE")
    if without:
        statement = "\n".join(line for line in statement.splitlines() if f"`{without}`" not in line)
    server.execute(statement)


def test_an_erased_evaluation_is_gone_and_a_rewind_shows_each_event_once(
    start: Callable[..., Runner],
    conn: Connection,
    clickhouse_server: ClickHouse,
    name: str,
    eventually: Eventually,
    shell: Operator,
) -> None:
    start()
    for _ in range(5):
        store(conn, "erased", "kept")
    eventually(lambda: sinks(shell)["main"]["delivered"] == 10, within_s=30)
    done = shell.evalstore("erase", "erased", "--reason", "asked", "--yes")
    assert done.status == 0, done.err
    count = f"SELECT eval_id, count() AS n FROM {name} FINAL GROUP BY eval_id"
    eventually(lambda: clickhouse_server.query(count) == [{"eval_id": "kept", "n": 5}], within_s=20)
    assert shell.evalstore("sinks", "rewind", "main", "--to", "start").status == 0
    eventually(lambda: sinks(shell)["main"]["delivered"] == 15, within_s=20)
    assert clickhouse_server.query(count) == [{"eval_id": "kept", "n": 5}]
    clickhouse_server.execute(f"TRUNCATE TABLE {name}")
    assert shell.evalstore("sinks", "rewind", "main", "--to", "start").status == 0
    eventually(lambda: clickhouse_server.query(count) == [{"eval_id": "kept", "n": 5}], within_s=20)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"create": False}, "create it, or set create = true"),
        ({"password_env": "WRONG"}, "correct user and password"),
        ({"url": "AWAY"}, "cannot be reached"),
    ],
)
def test_what_keeps_the_sink_from_working_is_said_with_what_to_do(
    start: Callable[..., Runner],
    conn: Connection,
    eventually: Eventually,
    shell: Operator,
    keys: dict[str, object],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WRONG", "wrong")
    start(**{key: f"http://127.0.0.1:{free_port()}" if value == "AWAY" else value for key, value in keys.items()})
    store(conn, "e")
    eventually(lambda: said in str(sinks(shell)["main"]["last_error"]), within_s=30)
    assert sinks(shell)["main"]["lag_events"] == 1
    assert not shell.letters()


def test_a_table_that_does_not_fit_is_waited_for_and_skips_nothing(
    start: Callable[..., Runner],
    conn: Connection,
    clickhouse_server: ClickHouse,
    name: str,
    eventually: Eventually,
    shell: Operator,
) -> None:
    _create(clickhouse_server, name, without="score")
    start(create=False)
    store(conn, "e")
    wanted = "ADD COLUMN IF NOT EXISTS `score` Nullable(Float64)"
    eventually(lambda: wanted in str(sinks(shell)["main"]["last_error"]), within_s=30)
    clickhouse_server.execute(f"ALTER TABLE {name} ADD COLUMN score Array(String)")
    eventually(lambda: "score is Array(String), not Nullable(Float64)" in str(sinks(shell)["main"]["last_error"]), within_s=30)
    assert not shell.letters()
    clickhouse_server.execute(f"ALTER TABLE {name} DROP COLUMN score")
    clickhouse_server.execute(f"ALTER TABLE {name} ADD COLUMN score Nullable(Float64)")
    eventually(lambda: is_at_the_end(shell), within_s=30)
    # The table changes while the sink is at work.
    clickhouse_server.execute(f"ALTER TABLE {name} DROP COLUMN score")
    store(conn, "e", type="evaluation:completed", exit_code=0, score=1)
    eventually(lambda: wanted in str(sinks(shell)["main"]["last_error"]), within_s=30)
    clickhouse_server.execute(f"ALTER TABLE {name} ADD COLUMN score Nullable(Float64)")
    eventually(lambda: is_at_the_end(shell), within_s=30)
    assert clickhouse_server.query(f"SELECT version, score FROM {name} ORDER BY version") == [
        {"version": 1, "score": None},
        {"version": 2, "score": 1},
    ]
    assert not shell.letters()


def test_a_server_that_is_killed_is_waited_for(
    tmp_path: Path, start: Callable[..., Runner], conn: Connection, name: str, eventually: Eventually, shell: Operator
) -> None:
    with ClickHouse(tmp_path / "own") as server:
        start(url=server.url)
        stored = store(conn, *(f"e-{number}" for number in range(50)))
        eventually(lambda: is_at_the_end(shell), within_s=30)
        server.kill()
        stored += store(conn, *(f"e-{number}" for number in range(50)))
        eventually(lambda: "cannot be reached" in str(sinks(shell)["main"]["last_error"]), within_s=30)
        server.start()
        eventually(lambda: is_at_the_end(shell), within_s=30)
        assert {row["event_id"] for row in server.query(f"SELECT event_id FROM {name}")} == set(stored)
        assert not shell.letters()
