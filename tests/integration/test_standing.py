"""What the servers hold is told as it is: content and the archive, spools, dead letters of many kinds; nobody waits for it."""

import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from evalstore.storage import archive, dead_letters, event_store, table_stats
from evalstore.storage.archive import Archive
from evalstore.storage.dead_letters import DeadLetterInsert
from evalstore.telemetry import exposition
from evalstore.telemetry.backend_stats import BackendStats, CachedProbe
from evalstore.telemetry.counters import Series
from evalstore.telemetry.disks import Disks
from models.events import EvaluationCompleted
from models.settings import Settings
from tasks.spool import Spool, SpoolRecord


def numbers(given: Settings) -> dict[Series, float]:
    """As of now: whoever asks again may be told what was a moment ago."""
    with closing(BackendStats(given, patience_s=30)) as now:
        return now.numbers()


def ended(eval_id: str, size: int) -> EvaluationCompleted:
    """With that much output."""
    return EvaluationCompleted(
        eval_id=eval_id, event_id=uuid4(), occurred_at=datetime.now(UTC), exit_code=0, output=eval_id[-1] * size
    )


def test_content_shows_where_it_is_and_what_is_due(engine: Engine, database_url: str, redis_url: str, tmp_path: Path) -> None:
    given = Settings(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(redis_url),
        archive_url=f"file://{tmp_path}/archive",
        archive_threshold_bytes=10_000,
    )
    with engine.connect() as conn:
        event_store.store(conn, [ended(f"e{number}", size) for number, size in enumerate((50_000, 70_000, 6_000))])
        before = numbers(given)
        with closing(Archive.of(given)) as working:
            done = archive.run_once(conn, working, datetime.now(UTC))
        after = numbers(given)
        # A file in place of the archive's folder makes the archive unavailable.
        (tmp_path / "file").write_text("")
        broken = given.model_copy(update={"archive_url": f"file://{tmp_path}/file/archive"})
        event_store.store(conn, [ended("f", 20_000)])
        with closing(Archive.of(broken)) as away:
            archive.run_once(conn, away, datetime.now(UTC))
        failing = numbers(given)

    def of(found: dict[Series, float], name: str, *labels: str) -> float:
        return found[f"evalstore_{name}", labels]

    assert done.moved == 2
    places = ("database", "objects", "archive")
    assert [of(before, "content_bytes", place) for place in places] == [126_000, 0, 0]
    assert [of(after, "content_bytes", place) for place in places] == [6_000, 0, 120_000]
    assert [of(after, "contents", place) for place in places] == [1, 0, 2]
    assert [of(one, "archive_due_contents") for one in (before, after, failing)] == [2, 0, 1]
    assert [of(one, "archive_due_bytes") for one in (before, after, failing)] == [120_000, 0, 20_000]
    assert [of(one, "archive_failing_contents") for one in (before, after, failing)] == [0, 0, 1]
    assert of(before, "archive_oldest_due_age_seconds") > 0 == of(after, "archive_oldest_due_age_seconds")


def test_of_many_kinds_of_dead_letters_the_rarest_are_counted_together(
    engine: Engine, database_url: str, redis_url: str
) -> None:
    kinds = [f"Odd{number}" for number in range(40)] + ["InvalidEvent"] * 37
    died_at = datetime.now(UTC) - timedelta(hours=1)
    with engine.connect() as conn:
        dead_letters.write(
            conn,
            [
                DeadLetterInsert(uuid4(), "evaluations", None, None, None, b"{}", kind, "", "", kind, 1, died_at, None, None)
                for kind in kinds
            ],
        )
    found = numbers(Settings(database_url=SecretStr(database_url), redis_url=SecretStr(redis_url)))
    shown = {labels[0]: value for (name, labels), value in found.items() if name == "evalstore_dead_letters" and value}
    assert shown["InvalidEvent"] == 37
    assert sum(shown.values()) == 77
    assert shown["other"] == 40 - 29
    assert len(shown) <= 40
    assert found["evalstore_dead_letters_oldest_age_seconds", ("InvalidEvent",)] == pytest.approx(3600, abs=60)
    assert found["evalstore_queue_messages", ("evaluations", "dead")] == 77


def test_disks_show_their_room_as_df_does_and_a_folder_that_is_not_there_shows_none(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    given = Settings(
        object_store_url=f"file://{tmp_path}/objects", archive_url="s3://bucket/archive", spool_dir=tmp_path / "spool"
    )
    found = Disks(given).numbers()
    df = subprocess.run(["df", "-B1", "--output=avail,used", tmp_path], capture_output=True, text=True, check=True)
    free, used = map(int, df.stdout.splitlines()[1].split())
    assert {labels for _, labels in found} == {("objects",)}
    assert found["evalstore_disk_free_bytes", ("objects",)] == pytest.approx(free, abs=2**30)
    assert found["evalstore_disk_bytes", ("objects",)] == pytest.approx(free + used, abs=2**20)


def test_a_spool_shows_its_bytes_and_its_age(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=10**6)
    spool.append(["id", b"{}"])
    found = exposition._spool(Settings(spool_dir=spool.folder))
    assert found["evalstore_spool_bytes", ()] == len(SpoolRecord(int(time.time() * 1000), b"id", b"{}").line())
    assert 0 <= found["evalstore_spool_oldest_age_seconds", ()] < 60


def test_running_processes_survive_a_newer_migration_and_new_ones_refuse_it(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration comes before the processes of its release, and those of the old one work on until they are replaced."""
    given = Settings(database_url=SecretStr(database_url), redis_url=SecretStr(redis_url))
    monkeypatch.setattr("evalstore.telemetry.backend_stats._KEEP_S", 0)
    fits: Series = ("evalstore_schema_ready", ())
    shown: Series = ("evalstore_confirmations_pending", ())
    with (
        psycopg.connect(database_url, autocommit=True) as conn,
        closing(BackendStats(given, patience_s=30)) as before,
        closing(BackendStats(given, patience_s=30)) as later,
    ):
        assert before.ready() == {}
        ((head,),) = conn.execute(
            "UPDATE evalstore_schema_version SET version_num = 'next' RETURNING old.version_num"
        ).fetchall()
        assert before.ready() == {}
        assert before.numbers()[fits] == 1
        assert shown in before.numbers()
        assert "schema" in later.ready()
        assert later.numbers()[fits] == 0
        conn.execute("UPDATE evalstore_schema_version SET version_num = %s", [f"{int(head) - 1:04}"])
        assert "schema" in before.ready()  # A database of the previous release replaced the old one.


def test_nobody_waits_for_a_server_that_does_not_answer(database_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # It accepts connections and never answers.
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        asked = BackendStats(Settings(database_url=SecretStr(database_url), redis_url=SecretStr(url)), patience_s=1)
        started = time.monotonic()
        found = [asked.numbers() for _ in range(3)]
        assert time.monotonic() - started < 10
    assert [one["evalstore_server_up", ("redis",)] for one in found] == [False] * 3
    assert found[-1]["evalstore_server_up", ("postgresql",)]
    assert ("evalstore_consumers", ("evaluations",)) not in found[-1]
    assert asked.ready() == {"redis": "cannot be used"}
    asked.close()


def test_concurrent_callers_share_one_probe() -> None:
    reads, gate = [], threading.Event()

    def read() -> int:
        reads.append(1)
        gate.wait(timeout=10)
        return len(reads)

    reading = CachedProbe(read, 20.0)
    told: list[int | None] = []
    askers = [threading.Thread(target=lambda: told.append(reading.get())) for _ in range(8)]
    for asker in askers:
        asker.start()
    gate.set()
    for asker in askers:
        asker.join()
    assert (told, len(reads)) == ([1] * 8, 1)


def test_what_took_long_once_is_read_again_soon(eventually: Callable[..., None]) -> None:
    reads = []

    def read() -> int:
        reads.append(1)
        threading.Event().wait(timeout=0.2 if len(reads) == 1 else 0)  # As a frozen server.
        return len(reads)

    reading = CachedProbe(read, 20.0, stale=True)
    assert reading.get() == 1
    eventually(lambda: reading.get() == 2, within_s=10, what="the next number")


def test_everybodys_connections_are_counted_by_a_role_that_may_not_look_into_them(engine: Engine) -> None:
    with engine.connect() as ours, engine.connect(), engine.connect():
        before = table_stats.server(ours)["evalstore_postgresql_connections",]
        role = f"plain_{uuid4().hex}"
        with ours.begin():
            ours.exec_driver_sql(f"CREATE ROLE {role}")
            ours.exec_driver_sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
            ours.exec_driver_sql(f"SET ROLE {role}")
        try:
            seen = table_stats.server(ours)["evalstore_postgresql_connections",]
        finally:
            with ours.begin():
                ours.exec_driver_sql("RESET ROLE")
                ours.exec_driver_sql(f"DROP OWNED BY {role}")
                ours.exec_driver_sql(f"DROP ROLE {role}")
    assert before >= 3
    assert seen == pytest.approx(before, abs=2)  # Other connections come and go.


def test_a_spool_that_may_not_be_read_hides_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spool").write_text("")
    assert exposition._spool(Settings(spool_dir=tmp_path / "spool")) == {}
