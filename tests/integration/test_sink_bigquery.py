"""Events in BigQuery: each once, whatever dies, and what its users read there."""

import random
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection

from evalstore.sinks import bigquery, bigquery_table
from evalstore.sinks.event_row import COLUMNS
from evalstore.storage import event_store
from models.errors import BadMessage, Outage
from models.events import parse
from tests.bigquery import PROJECT, BigQuery
from tests.integration.shell import Operator
from tests.integration.test_sinks import sinks, store
from tests.sinks import HOLD_CURSOR, Runner, cursor_held, documented_query, installed, table

if TYPE_CHECKING:
    from google.cloud.bigquery import Client

pytest.importorskip("google.cloud.bigquery", reason="google-cloud-bigquery is not installed: make setup-integrations")
pytest.importorskip("google.cloud.bigquery_storage_v1", reason="it is not installed: make setup-integrations")
from google.cloud.bigquery import SchemaField, Table
from google.cloud.bigquery_storage_v1.types import AppendRowsResponse, RowError
from google.rpc.status_pb2 import Status

Eventually = Callable[..., None]
Start = Callable[..., Runner]


@pytest.fixture
def dataset(bigquery_server: BigQuery) -> str:
    name = f"d_{uuid4().hex[:8]}"
    client = bigquery_server.client()
    client.create_dataset(name)
    client.close()
    return name


@pytest.fixture
def start(tmp_path: Path, database_url: str, redis_url: str, dataset: str, bigquery_server: BigQuery) -> Iterator[Start]:
    """`start(create=False)`: a runner of the sink `main`, with these keys."""
    made: list[Runner] = []

    def begin(server: BigQuery = bigquery_server, **keys: object) -> Runner:
        folder = tmp_path / f"runner-{len(made)}"
        folder.mkdir()
        given = {**server.keys, "dataset": dataset, "table": "events", "create": True, "batch_s": 0.1, **keys}
        made.append(Runner(folder, {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}, table(**given)))
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


@pytest.fixture
def client(bigquery_server: BigQuery) -> Iterator["Client"]:
    made = bigquery_server.client()
    yield made
    made.close()


def is_at_the_end(shell: Operator) -> bool:
    found = sinks(shell)["main"]
    return found["lag_events"] == 0 and found["last_error"] is None


def assert_each_once(server: BigQuery, dataset: str, stored: list[str]) -> None:
    rows = server.query(f"SELECT eval_id, event_id, version FROM {dataset}.events ORDER BY eval_id, version")
    assert {row["event_id"] for row in rows} == set(stored)
    assert len(rows) == len(stored)
    versions: dict[str, list[int]] = {}
    for row in rows:
        versions.setdefault(row["eval_id"], []).append(row["version"])
    assert all(found == list(range(1, len(found) + 1)) for found in versions.values())


def test_a_row_has_all_fields_of_an_event_in_a_partitioned_table(
    start: Start,
    conn: Connection,
    bigquery_server: BigQuery,
    client: "Client",
    dataset: str,
    eventually: Eventually,
    shell: Operator,
) -> None:
    start()
    given: dict[str, Any] = {"eval_id": "e", "occurred_at": "2026-01-31T09:30:00.000001Z"}
    queued = {"type": "evaluation:queued", "run_id": "r", "language": "python", "submitter": "ada", "code": "print('é\x00')"}
    ended = {
        "type": "evaluation:completed",
        "exit_code": -(2**63),
        "duration_ms": 1e300,
        "memory_bytes": 2**63 - 1,
        "score": 0.5,
    }
    ended |= {"output": "lone \ud800", "metadata": {"a": {"b": [1, None, "ü"]}}}
    for fields in (queued, ended):
        event_store.store(conn, [parse({"event_id": uuid4(), **given, **fields})])
    store(conn, "e", output=5, unknown={"a": "x"})
    eventually(lambda: sinks(shell)["main"]["delivered"] == 3, within_s=30)
    first, second, third = bigquery_server.query(f"SELECT * FROM {dataset}.events ORDER BY version")
    assert {key: first[key] for key in queued} == queued
    assert first["occurred_at"] == datetime(2026, 1, 31, 9, 30, 0, 1, UTC)
    assert abs((datetime.now(UTC) - first["recorded_at"]).total_seconds()) < 120
    assert {key: second[key] for key in ended if key != "output"} == {key: ended[key] for key in ended if key != "output"}
    assert (second["output"], second["output_b64"]) == (None, "bG9uZSDtoIA=")
    assert third["extra"] == {"output": 5, "unknown": {"a": "x"}}
    query = documented_query("TIMESTAMP_SUB").replace("analytics.evaluation_events", f"{dataset}.events")
    (day,) = bigquery_server.query(query)
    assert (day["type"], day["events"], day["mean_ms"]) == ("evaluation:completed", 1, 1e300)
    made = client.get_table(f"{dataset}.events")
    assert made.time_partitioning is not None
    assert (made.time_partitioning.type_, made.time_partitioning.field) == ("DAY", "recorded_at")
    assert made.clustering_fields == ["eval_id"]


def test_each_event_is_there_once_and_in_order_though_runners_are_killed(
    start: Start, conn: Connection, bigquery_server: BigQuery, dataset: str, eventually: Eventually, shell: Operator
) -> None:
    runners = [start(batch_events=50, batch_s=0.02) for _ in range(2)]
    stored: list[str] = []
    for turn in range(4):
        for _ in range(40):
            stored += store(conn, *(f"e-{number}" for number in range(10)))
        time.sleep(random.uniform(1, 3))  # noqa: S311
        runners[turn % 2].kill()
        runners[turn % 2].start()
    eventually(lambda: is_at_the_end(shell), within_s=120)
    assert_each_once(bigquery_server, dataset, stored)


def test_a_batch_that_was_sent_before_the_kill_is_not_there_twice(
    start: Start,
    conn: Connection,
    database_url: str,
    bigquery_server: BigQuery,
    dataset: str,
    eventually: Eventually,
    shell: Operator,
) -> None:
    runner = start(batch_events=40)
    stored = store(conn, "e")
    eventually(lambda: sinks(shell)["main"]["delivered"] == 1, within_s=40)
    with conn.begin():
        conn.exec_driver_sql(HOLD_CURSOR)
    for _ in range(2):
        with cursor_held(database_url) as is_written:
            stored += [event_id for number in range(25) for event_id in store(conn, "e", f"e-{number}")]
            eventually(is_written, within_s=30)
            runner.kill()
            stored += store(conn, *(f"late-{number}" for number in range(30)))
        runner.start()
        eventually(lambda: is_at_the_end(shell), within_s=60)
        assert_each_once(bigquery_server, dataset, stored)


def test_a_rewind_and_a_redrive_add_no_row_twice(
    start: Start, conn: Connection, bigquery_server: BigQuery, dataset: str, eventually: Eventually, shell: Operator
) -> None:
    start()
    stored = [event_id for _ in range(5) for event_id in store(conn, "erased", "kept")]
    eventually(lambda: sinks(shell)["main"]["delivered"] == 10, within_s=40)
    done = shell.evalstore("erase", "erased", "--reason", "asked", "--yes")
    assert done.status == 0, done.err
    count = f"SELECT count(*) AS n FROM {dataset}.events WHERE eval_id = 'erased'"
    eventually(lambda: is_at_the_end(shell), within_s=30)
    assert bigquery_server.query(count) == [{"n": 0}]
    assert shell.evalstore("sinks", "rewind", "main", "--to", "start").status == 0
    eventually(lambda: sinks(shell)["main"]["delivered"] == 15, within_s=30)
    later = store(conn, "kept")
    eventually(lambda: sinks(shell)["main"]["delivered"] == 16, within_s=30)
    assert_each_once(bigquery_server, dataset, stored[1::2] + later)
    bigquery_server.query(f"DELETE FROM {dataset}.events WHERE true")
    assert shell.evalstore("sinks", "rewind", "main", "--to", "start").status == 0
    eventually(lambda: sinks(shell)["main"]["delivered"] == 22, within_s=30)
    assert_each_once(bigquery_server, dataset, stored[1::2] + later)


def test_streams_that_the_server_lost_are_replaced_without_loss_or_doubling(
    tmp_path: Path, start: Start, dataset: str, conn: Connection, eventually: Eventually, shell: Operator
) -> None:
    with BigQuery(tmp_path / "own") as server:
        client = server.client()
        client.create_dataset(dataset)
        client.close()
        start(server)
        stored = store(conn, *(f"e-{number}" for number in range(50)))
        eventually(lambda: sinks(shell)["main"]["delivered"] == 50, within_s=40)
        server.kill()
        stored += store(conn, *(f"e-{number}" for number in range(50)))
        eventually(lambda: sinks(shell)["main"]["last_error"] not in {None, ""}, within_s=60)
        server.start()
        eventually(lambda: is_at_the_end(shell), within_s=60)
        assert_each_once(server, dataset, stored)
        assert not shell.letters()


def test_a_table_that_is_missing_or_does_not_fit_is_waited_for(
    start: Start,
    conn: Connection,
    bigquery_server: BigQuery,
    client: "Client",
    dataset: str,
    eventually: Eventually,
    shell: Operator,
) -> None:
    start(create=False)
    stored = store(conn, "e")
    eventually(lambda: "create = true makes the table" in str(sinks(shell)["main"]["last_error"]), within_s=30)
    fields = [SchemaField(column.name, bigquery_table._TYPES[column.sql]) for column in COLUMNS]
    made = client.create_table(Table(f"{PROJECT}.{dataset}.events", schema=[one for one in fields if one.name != "score"]))
    eventually(lambda: "ADD COLUMN `score` FLOAT" in str(sinks(shell)["main"]["last_error"]), within_s=30)
    client.delete_table(made)
    wrong = [SchemaField("score", "STRING") if one.name == "score" else one for one in fields]
    client.create_table(Table(f"{PROJECT}.{dataset}.events", schema=wrong))
    eventually(lambda: "score is STRING, not FLOAT" in str(sinks(shell)["main"]["last_error"]), within_s=30)
    client.delete_table(made)
    client.create_table(Table(f"{PROJECT}.{dataset}.events", schema=fields))
    eventually(lambda: is_at_the_end(shell), within_s=30)
    assert_each_once(bigquery_server, dataset, stored)
    assert not shell.letters()


@pytest.mark.parametrize(
    ("code", "is_repeat", "expected"),
    [(0, False, True), (6, True, True), (6, False, Outage), (11, True, Outage), (14, False, False), (7, False, Outage)],
)
def test_an_offset_that_exists_counts_as_written_only_in_a_repeated_request(
    code: int, is_repeat: bool, expected: bool | type[Exception]
) -> None:
    answer = AppendRowsResponse(error=Status(code=code, message="why"))
    if isinstance(expected, bool):
        assert bigquery.is_appended(answer, is_repeat=is_repeat, is_last=False) is expected
        return
    with pytest.raises(expected, match="why"):
        bigquery.is_appended(answer, is_repeat=is_repeat, is_last=False)


def test_rows_that_are_refused_are_bad_messages_and_a_last_repeat_is_an_outage() -> None:
    refused = AppendRowsResponse(error=Status(code=3), row_errors=[RowError(index=1, message="no such date")])
    with pytest.raises(BadMessage, match="no such date"):
        bigquery.is_appended(refused, is_repeat=False, is_last=False)
    with pytest.raises(Outage, match="schema"):
        bigquery.is_appended(AppendRowsResponse(error=Status(code=3, message="schema")), is_repeat=False, is_last=False)
    with pytest.raises(Outage, match="busy"):
        bigquery.is_appended(AppendRowsResponse(error=Status(code=14, message="busy")), is_repeat=True, is_last=True)
