"""The lake: each event and record once, readable by evalstore and by others, and gone once erased."""

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection

from evalstore.lake import maintenance, query, recovery
from evalstore.lake.errors import LakeDamaged, LakeMismatch, LakeOutage
from evalstore.lake.files import Range
from evalstore.lake.lake import Lake
from evalstore.lake.schema import EVALUATIONS, EVENTS, TABLES
from evalstore.storage import event_reader, event_store
from evalstore.storage.event_reader import StoredEvent
from evalstore.storage.sink_cursors import ReplayKey
from models.events import parse
from models.fields import CONTENTS, RECORD_COLUMNS, SCALARS
from models.record import rfc3339
from models.settings import Settings
from tests.seaweedfs import SeaweedFS

ROOT = Path(__file__).parents[2]

pytest.importorskip("pyiceberg", reason="the lake needs the extra `lake`: make setup-integrations")
pl = pytest.importorskip("polars", reason="Polars reads the lake as well: make setup-integrations")
pq = pytest.importorskip("pyarrow.parquet", reason="the lake needs the extra `lake`: make setup-integrations")

AT = datetime(2026, 1, 1, tzinfo=UTC)


def event(eval_id: str, at: datetime = AT, **fields: Any) -> StoredEvent:
    """An event that was stored at `at`."""
    event_id = str(fields.pop("event_id", uuid4()))
    given = {"type": "evaluation:started", "attempt": 1, **fields, "eval_id": eval_id, "event_id": event_id}
    given |= {"occurred_at": rfc3339(at), "recorded_at": rfc3339(at)}
    return StoredEvent(ReplayKey(at, eval_id, at, event_id), given)


@pytest.fixture(autouse=True)
def _planner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLARS_ICEBERG_PLANNER", "pyiceberg")  # or Polars warns that it has a quicker one


@pytest.fixture
def lake_settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings.from_environment({"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_LAKE_URL": f"file://{tmp_path}/lake"})


@pytest.fixture
def lake(lake_settings: Settings) -> Iterator[Lake]:
    found = Lake.open(lake_settings)
    yield found
    found.close()


def stored(conn: Connection, *events: dict[str, Any]) -> list[StoredEvent]:
    """Store events in PostgreSQL, and return them as sinks read them."""
    parsed = [parse({"event_id": str(uuid4()), "occurred_at": "2026-01-01T00:00:00Z", **one}) for one in events]
    event_store.store(conn, parsed)
    found = event_reader.by_key(conn, [(str(one.eval_id), str(one.event_id)) for one in parsed])
    return [as_event(fields) for fields in found.values()]


def as_event(fields: dict[str, Any]) -> StoredEvent:
    times = [datetime.fromisoformat(fields[name]) for name in ("recorded_at", "occurred_at")]
    return StoredEvent(ReplayKey(times[0], fields["eval_id"], times[1], fields["event_id"]), fields)


def test_events_come_back_as_postgresql_gives_them(lake: Lake, conn: Connection) -> None:
    events = stored(
        conn,
        {
            "type": "evaluation:queued",
            "eval_id": "a",
            "code": "print('\ud800')\0",
            "metadata": {"k": [1, 1.0, 2**60, "\u20ac"]},
        },
        {"type": "evaluation:started", "eval_id": "a", "timeout_s": 1.5, "executor_id": "x", "metadata": {}},
        {
            "type": "evaluation:completed",
            "eval_id": "a",
            "exit_code": -(2**63),
            "output_b64": "/w==",
            "error": "",
            "score": 1e300,
        },
        {"type": "evaluation:completed", "eval_id": "b", "exit_code": 0, "output": "x" * 70_000, "duration_ms": 5},
    )
    assert lake.append_events(events, {"place": 1}) == 4
    found = lake.events_of(["a", "b", "c"])
    assert {eval_id: len(some) for eval_id, some in found.items()} == {"a": 3, "b": 1}
    wanted = {one.key.event_id: one.fields for one in events}
    assert {one.key.event_id: one.fields for some in found.values() for one in some} == wanted
    assert {one.key for some in found.values() for one in some} == {one.key for one in events}


def test_values_that_do_not_fit_a_column_come_back_unchanged(lake: Lake) -> None:
    odd = event("a", score="high", output=5, output_b64="AA==", error_b64="YQ==", code_ref={"sha256": "x"}, new=["\ud800"])
    lake.append_events([odd])
    assert lake.events_of(["a"])["a"][0].fields == odd.fields


def test_an_event_is_appended_once_however_often_and_with_what_cursor(lake: Lake) -> None:
    events = [event(f"e{number}", AT + timedelta(hours=number)) for number in range(50)]
    assert lake.append_events(events[:30], {"at": 1}) == 30
    assert lake.append_events(events[20:], None) == 20
    assert lake.cursor() == {"at": 1}
    assert lake.append_events(events, {"at": 2}) == 0
    assert lake.cursor() == {"at": 2}
    found = lake.events_of([f"e{number}" for number in range(50)])
    assert [len(some) for some in found.values()] == [1] * 50
    assert lake.events_of(["e3"], Range(AT - timedelta(days=9), AT - timedelta(days=1))) == {}
    assert list(lake.events_of(["e3"], Range(AT, AT + timedelta(hours=9)))) == ["e3"]


def record(eval_id: str, **fields: Any) -> dict[str, Any]:
    given = {"status": "completed", "attempt": 1, "version": 3, "metadata": {"a": 1}, "created_at": AT, "updated_at": AT}
    return given | {"eval_id": eval_id, "result_event_id": UUID(int=5), "merge_state": b"\0\1"} | fields


def test_a_record_is_there_once_and_the_newer_one_replaces_it(lake: Lake) -> None:
    assert lake.append_records([record("a"), record("b")]) == 2
    assert lake.append_records([record("a"), record("b")]) == 0
    assert lake.append_records([record("b", version=4), record("c")]) == 2
    found = lake.records_of(["a", "b", "c"])
    assert {eval_id: one["version"] for eval_id, one in found.items()} == {"a": 3, "b": 4, "c": 3}
    assert {name: found["a"][name] for name in record("a")} == record("a")


def files_of(lake: Lake) -> list[Path]:
    return [path for path in Path(lake.location.removeprefix("file://")).rglob("*") if path.is_file()]


def test_a_thousand_appends_become_two_files_a_day(lake: Lake) -> None:
    for number in range(60):
        lake.append_events(
            [event(f"e{number % 7}-{number}", AT + timedelta(hours=number % 48)) for _ in range(3)], {"n": number}
        )
    kept = lake.load(EVENTS).metadata_location
    done = maintenance.run_once(lake, keep=timedelta(hours=1), grace=timedelta(hours=1))
    assert (done.files_before, done.snapshots_expired) == (60, 0)
    assert done.files_after <= 4
    assert pl.scan_iceberg(kept).select(pl.len()).collect().item() == 180
    done = maintenance.run_once(lake, keep=timedelta(0), grace=timedelta(0))
    assert done.files_removed
    found = lake.load(EVENTS)
    named = {path.removeprefix("file://") for path in maintenance.referenced(found)}
    named |= {path.removeprefix("file://") for path in maintenance.referenced(lake.load(EVALUATIONS))}
    assert {str(path) for path in files_of(lake)} == named
    assert pl.scan_iceberg(found.metadata_location).select(pl.len()).collect().item() == 180
    assert len(lake.events_of([f"e{number % 7}-{number}" for number in range(60)])) == 60
    assert lake.cursor() == {"n": 59}


def test_erasing_leaves_nothing_in_any_file(lake: Lake) -> None:
    for number in range(5):
        lake.append_events([event("gone", executor_id="secret-executor"), event(f"stays{number}")], {"n": number})
    lake.append_records([record("gone", executor_id="secret-executor"), record("stays")])
    maintenance.run_once(lake)
    lake.append_events([event("gone"), event("zz")])
    assert lake.erase(["gone", "never there"]) > 0
    assert lake.events_of(["gone"]) == {}
    assert lake.records_of(["gone", "stays"]).keys() == {"stays"}
    assert len(lake.events_of([f"stays{number}" for number in range(5)])) == 5
    for path in files_of(lake):
        if path.suffix == ".parquet":
            assert "gone" not in pq.read_table(path).column("eval_id").to_pylist()
            assert b"gone" not in path.read_bytes()
        elif path.suffix == ".avro":
            with path.open("rb") as stream:
                assert b"gone" not in stream.read()
        else:
            assert "gone" not in path.read_text()
    assert lake.cursor() == {"n": 4}
    assert lake.erase(["gone"]) == 0


def refused(lake: Lake, sql: str, limits: query.Limits | None = None) -> str:
    with pytest.raises(query.QueryRefused) as raised:
        query.run(lake, sql, limits or query.Limits())
    return str(raised.value)


def test_a_query_reads_events_and_evaluations(lake: Lake) -> None:
    lake.append_events([event("a", output="x\u20ac"), event("b", AT + timedelta(days=40), output_b64="/w==")], {"n": 1})
    lake.append_records([record("a", finished_at=AT)])
    lake.append_events([event("c", AT + timedelta(days=1))])
    rows = query.run(
        lake, "SELECT eval_id, output, date_trunc('day', recorded_at) AS day FROM events ORDER BY eval_id", query.Limits()
    )
    assert rows == [
        {"eval_id": "a", "output": "x\u20ac", "day": "2026-01-01T00:00:00Z"},
        {"eval_id": "b", "output": "/w==", "day": "2026-02-10T00:00:00Z"},
        {"eval_id": "c", "output": None, "day": "2026-01-02T00:00:00Z"},
    ]
    sql = "SELECT count(*) AS n, any_value(metadata->>'a') AS a FROM events JOIN evaluations USING (eval_id)"
    with pytest.raises(query.QueryRefused, match="metadata"):
        query.run(lake, sql, query.Limits())
    assert query.run(lake, sql.replace("metadata", "evaluations.metadata"), query.Limits()) == [{"n": 1, "a": "1"}]


def test_a_query_writes_nothing_reads_no_file_and_has_limits(lake: Lake, tmp_path: Path) -> None:
    lake.append_events([event(f"e{number}") for number in range(50)])
    secret = tmp_path / "secret.csv"
    secret.write_text("a,b\n1,2\n")
    for sql in (
        f"SELECT * FROM read_csv('{secret}')",
        f"SELECT * FROM '{secret}'",
        f"SELECT * FROM read_text('{secret}')",
        f"SELECT * FROM glob('{tmp_path}/*')",
    ):
        assert "disabled" in refused(lake, sql), sql
    for sql in (
        f"COPY events TO '{tmp_path}/out.parquet'",
        "CREATE TABLE t (a int)",
        "DELETE FROM events",
        "SET enable_external_access = true",
        "ATTACH 'x.db'",
        "INSTALL httpfs",
        "SELECT 1; SELECT 2",
        "",
    ):
        assert "one SELECT" in refused(lake, sql)
    assert not list(tmp_path.glob("out*"))
    assert "--max-rows" in refused(lake, "SELECT eval_id FROM events", query.Limits(rows=10))
    slow = "SELECT sum(range) FROM range(1000000000000)"
    assert "--timeout" in refused(lake, slow, query.Limits(seconds=0.3))
    big = "SELECT list(range) FROM range(100000000)"
    assert "--memory" in refused(lake, big, query.Limits(memory_mb=64))


def test_a_damaged_or_missing_file_is_named(lake: Lake) -> None:
    lake.append_events([event("a", output="x" * 1000)])
    (path,) = [path for path in files_of(lake) if path.suffix == ".parquet"]
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:200] + b"????" + whole[204:], whole[:100]):
        path.write_bytes(damaged)
        with pytest.raises(LakeDamaged, match=path.name), closing(Lake.open(lake.settings)) as again:
            again.events_of(["a"])
    path.unlink()
    with pytest.raises(LakeDamaged, match=path.name), closing(Lake.open(lake.settings)) as again:
        again.events_of(["a"])


def test_another_evalstores_warehouse_is_refused(lake_settings: Settings, lake: Lake, conn: Connection) -> None:
    lake.append_events([event("a")])
    with conn.begin():
        conn.exec_driver_sql("UPDATE lake_owner SET id = gen_random_uuid()")
    with pytest.raises(LakeMismatch, match="another evalstore"):
        Lake.open(lake_settings)
    with conn.begin():
        conn.exec_driver_sql("DELETE FROM iceberg_tables")
    with pytest.raises(LakeMismatch, match="another evalstore"):
        Lake.open(lake_settings)


def test_a_newer_schema_is_refused(lake_settings: Settings, lake: Lake) -> None:
    with lake.load(EVENTS).transaction() as transaction:
        transaction.set_properties({"evalstore.schema-version": "99"})
    with pytest.raises(LakeMismatch, match="newer release"):
        Lake.open(lake_settings)


def test_a_lake_that_is_away_is_an_outage(lake_settings: Settings, tmp_path: Path) -> None:
    blocked = tmp_path / "lake"
    blocked.write_text("no folder")
    with pytest.raises(LakeOutage):
        Lake.open(lake_settings)


def test_a_restored_catalog_is_led_to_the_newest_state(lake_settings: Settings, lake: Lake, conn: Connection) -> None:
    lake.append_events([event("a")], {"n": 1})
    with conn.begin():
        before = conn.exec_driver_sql("SELECT table_name, metadata_location FROM iceberg_tables").fetchall()
    lake.append_events([event("b")], {"n": 2})
    maintenance.run_once(lake, keep=timedelta(0), grace=timedelta(0))
    with conn.begin():
        for name, location in before:
            conn.exec_driver_sql("UPDATE iceberg_tables SET metadata_location = %s WHERE table_name = %s", (location, name))
    assert [one.before == one.after for one in recovery.run_once(lake_settings)] == [False, True]
    with closing(Lake.open(lake_settings)) as again:
        assert again.events_of(["a", "b"]).keys() == {"a", "b"}
        assert again.cursor() == {"n": 2}
    with conn.begin():
        conn.exec_driver_sql("DELETE FROM iceberg_tables")
        conn.exec_driver_sql("DELETE FROM iceberg_namespace_properties")
    recovery.run_once(lake_settings)
    with closing(Lake.open(lake_settings)) as again:
        assert again.events_of(["a", "b"]).keys() == {"a", "b"}


def test_field_ids_are_those_of_the_documentation(lake: Lake) -> None:
    page = (ROOT / "docs/how-to/use-the-lake.md").read_text()
    for table in TABLES:
        found = lake.load(table).schema().fields
        assert [(field.field_id, field.name) for field in found] == [
            (number, column.name) for number, column in enumerate(table.columns, 1)
        ]
        assert ", ".join(f"{number} `{column.name}` {column.type}" for number, column in enumerate(table.columns, 1)) in page
    assert {column.name for column in EVENTS.columns} >= {*SCALARS, *CONTENTS}
    assert {column.name for column in EVALUATIONS.columns} >= {*RECORD_COLUMNS}


def test_the_warehouse_may_be_in_s3(database_url: str, s3_url: str, s3_server: SeaweedFS) -> None:
    given = {"DATABASE_URL": database_url, "LAKE_URL": s3_url, "S3_ENDPOINT_URL": s3_server.endpoint}
    settings = Settings.from_environment({f"EVALSTORE_{name}": value for name, value in given.items()})
    with closing(Lake.open(settings)) as lake:
        for number in range(4):
            lake.append_events([event("a"), event(f"e{number}")], {"n": number})
        done = maintenance.run_once(lake, keep=timedelta(0), grace=timedelta(0))
        assert done.files_removed
        assert len(lake.events_of(["a"])["a"]) == 4
        assert query.run(lake, "SELECT count(*) AS n FROM events", query.Limits()) == [{"n": 8}]
        assert lake.erase(["a"]) == 1
        assert lake.events_of(["a", "e1"]).keys() == {"e1"}
        recovered = recovery.run_once(settings)
        assert [one.before for one in recovered] == [one.after for one in recovered]
        with (
            pytest.raises(LakeOutage),
            closing(Lake.open(settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:1"}))),
        ):
            pass
