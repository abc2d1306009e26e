"""The schema: made once, from anywhere, and checked by whoever works with it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text

from evalstore.local import processes
from evalstore.local.servers import Postgres
from evalstore.storage import database, migrations
from evalstore.storage.migrations.version import VERSION_TABLE
from evalstore.storage.tables import metadata
from models.errors import DatabaseOutage, SchemaMismatch
from tests.integration.commands import python

ROOT = Path(__file__).parents[2]
Eventually = Callable[..., None]


@pytest.fixture
def engine(empty_database_url: str) -> Iterator[Engine]:
    made = database.engine(empty_database_url)
    yield made
    made.dispose()


def run(sql: str, url: str) -> list[Any]:
    with psycopg.connect(url) as conn:
        cursor = conn.execute(sql)
        return cursor.fetchall() if cursor.description else []


def revisions() -> list[str]:
    """All there are, the oldest first."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    return [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()][::-1]


def evalstore(*arguments: str, url: str) -> subprocess.CompletedProcess[str]:
    command = [*python(), "-m", "evalstore.cli.app", *arguments]
    environment = {**os.environ, "EVALSTORE_DATABASE_URL": url, "EVALSTORE_REDIS_URL": "redis://127.0.0.1:1"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_tables_are_those_that_the_migrations_make(database_url: str) -> None:
    made = database.engine(database_url)
    with made.connect() as conn:
        options = {"compare_type": True, "compare_server_default": True, "version_table": VERSION_TABLE}
        assert compare_metadata(MigrationContext.configure(conn, opts=options), metadata) == []
    made.dispose()


def test_every_text_that_is_an_eval_id_sorts_by_bytes(database_url: str) -> None:
    found = run("SELECT table_name, collation_name FROM information_schema.columns WHERE column_name = 'eval_id'", database_url)
    assert {name for name, _ in found} >= {"evaluations", "evaluation_events", "contents"}
    assert {collation for _, collation in found} == {"C"}


def test_every_key_begins_with_the_eval_id_where_records_have_one(database_url: str) -> None:
    for table in ("evaluations", "evaluation_events", "contents"):
        assert metadata.tables[table].primary_key.columns.keys()[0] == "eval_id"


def test_migrating_tells_where_it_came_from_and_finds_nothing_to_do_the_second_time(empty_database_url: str) -> None:
    head = revisions()[-1]
    assert migrations.upgrade(empty_database_url) == (None, head)
    assert migrations.upgrade(empty_database_url) == (head, head)


def test_several_processes_may_migrate_at_once(empty_database_url: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(lambda _: evalstore("migrate", url=empty_database_url), range(4)))
    assert [process.returncode for process in done] == [0] * 4, [process.stderr for process in done]
    head = revisions()[-1]
    assert sorted(process.stderr.splitlines()[-1] for process in done) == [  # Earlier lines may report waiting.
        *[f"the schema is already at {head}"] * 3,
        f"the schema was migrated from nothing to {head}",
    ]


def test_a_migration_that_fails_changes_nothing(empty_database_url: str) -> None:
    run("CREATE TABLE contents (in_the_way int)", empty_database_url)
    with pytest.raises(
        Exception, match=r'relation "contents" already exists, and is not evalstore.s: .*EVALSTORE_DATABASE_SCHEMA'
    ):
        migrations.upgrade(empty_database_url)
    assert run("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", empty_database_url) == [("contents",)]
    run("DROP TABLE contents", empty_database_url)
    assert migrations.upgrade(empty_database_url)[1] == revisions()[-1]


def test_migrating_leaves_no_connection_behind(empty_database_url: str) -> None:
    migrations.upgrade(empty_database_url)
    with psycopg.connect(empty_database_url) as conn:
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        assert conn.execute(others).fetchone() == (0,)


def test_the_check_says_what_to_do_and_changes_nothing(engine: Engine, empty_database_url: str) -> None:
    with engine.connect() as conn:
        with pytest.raises(SchemaMismatch, match=r"no evalstore tables yet in the schema public, .*run `evalstore migrate`"):
            migrations.check(conn)
        assert run("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", empty_database_url) == []
        migrations.upgrade(empty_database_url)
        migrations.check(conn)
        for revision in revisions()[:-1]:
            run(f"UPDATE evalstore_schema_version SET version_num = '{revision}'", empty_database_url)
            with pytest.raises(SchemaMismatch, match=f"at revision {revision}, .*run `evalstore migrate`"):
                migrations.check(conn)
        run("UPDATE evalstore_schema_version SET version_num = 'future'", empty_database_url)
        with pytest.raises(SchemaMismatch, match="at revision future, which this release does not know: deploy a newer one"):
            migrations.check(conn)
    with pytest.raises(SchemaMismatch, match="deploy a newer one"):
        migrations.upgrade(empty_database_url)


def test_the_revisions_can_be_applied_one_after_another(empty_database_url: str) -> None:
    from alembic import command  # noqa: PLC0415 - only here

    assert [*migrations.revisions()] == revisions()  # By file name.
    for revision in revisions():
        made = database.engine(empty_database_url)
        with made.begin() as conn:
            command.upgrade(migrations.config(conn), revision)
        made.dispose()
    assert migrations.upgrade(empty_database_url) == (revisions()[-1], revisions()[-1])


def test_a_migration_that_waits_for_somebody_keeps_nobody_else_waiting(empty_database_url: str, eventually: Eventually) -> None:
    """Whoever asks for a table's lock after it stands behind it in the queue: all workers, for as long as an export takes."""
    from alembic import command  # noqa: PLC0415 - only here

    made = database.engine(empty_database_url)
    with made.begin() as conn:
        command.upgrade(migrations.config(conn), "0007")
    made.dispose()
    waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'confirmations'::regclass"
    with ThreadPoolExecutor(1) as thread, psycopg.connect(empty_database_url) as reading:
        reading.execute("SELECT * FROM confirmations")
        upgraded = thread.submit(migrations.upgrade, empty_database_url)
        eventually(lambda: run(waits, empty_database_url), what="that it waits")
        with psycopg.connect(empty_database_url, options="-c lock_timeout=5000") as worker:
            worker.execute("INSERT INTO confirmations (count, body) VALUES (1, '{}')")
        reading.rollback()
        assert upgraded.result(timeout=30) == ("0007", revisions()[-1])


@pytest.mark.parametrize("holds", ["a table", "the lock of migrations"])
def test_a_migration_that_waits_says_for_whom(empty_database_url: str, eventually: Eventually, holds: str) -> None:
    from alembic import command  # noqa: PLC0415 - only here

    made = database.engine(empty_database_url)
    with made.begin() as conn:
        command.upgrade(migrations.config(conn), "0007")
    made.dispose()
    told: list[str] = []
    statement = (
        "SELECT * FROM confirmations" if holds == "a table" else f"SELECT pg_advisory_lock({migrations.lock_key('public')})"
    )
    with ThreadPoolExecutor(1) as thread, psycopg.connect(empty_database_url, application_name="export") as other:
        other.execute(statement)
        holder = other.info.backend_pid
        upgraded = thread.submit(migrations.upgrade, empty_database_url, told.append)
        eventually(lambda: told, what="that it says so", within_s=30)
        assert f"waits for process {holder} of PostgreSQL (export, user " in told[0]
        assert ("which migrates" in told[0]) is (holds != "a table")
        other.close()
        assert upgraded.result(timeout=30) == ("0007", revisions()[-1])
    assert len(told) == 1


def previous_release(url: str, revision: str = "0008") -> None:
    """Make the schema as releases did that kept their revision in `alembic_version`."""
    from alembic import command  # noqa: PLC0415 - only here

    made = database.engine(url)
    with made.begin() as conn:
        command.upgrade(migrations.config(conn), revision)
    made.dispose()
    run("ALTER TABLE evalstore_schema_version RENAME TO alembic_version", url)
    run("ALTER INDEX evalstore_schema_version_pkc RENAME TO alembic_version_pkc", url)


def revision_of_others(url: str, *found: str) -> None:
    """Write the version table of another application's Alembic."""
    run("CREATE TABLE IF NOT EXISTS alembic_version (version_num varchar(32) PRIMARY KEY)", url)
    for one in found:
        run(f"INSERT INTO alembic_version VALUES ('{one}')", url)


@pytest.mark.parametrize("theirs", [("0008",), ("a1b2c3",), ("0003", "zzz")])
def test_the_version_of_another_application_is_never_taken_for_ours(
    engine: Engine, empty_database_url: str, theirs: tuple[str, ...]
) -> None:
    revision_of_others(empty_database_url, *theirs)
    with engine.connect() as conn, pytest.raises(SchemaMismatch, match="no evalstore tables yet"):
        migrations.check(conn)
    assert migrations.upgrade(empty_database_url) == (None, revisions()[-1])
    assert run("SELECT version_num FROM alembic_version ORDER BY 1", empty_database_url) == [(one,) for one in theirs]
    assert run("SELECT count(*) FROM evaluations", empty_database_url) == [(0,)]


@pytest.mark.parametrize("theirs", [(), ("a1b2c3",), ("0009", "zzz")])
def test_an_installation_that_shares_a_version_table_moves_to_its_own(
    engine: Engine, empty_database_url: str, theirs: tuple[str, ...]
) -> None:
    previous_release(empty_database_url)
    revision_of_others(empty_database_url, *theirs)
    told: list[str] = []
    assert migrations.upgrade(empty_database_url, told.append) == ("0008", revisions()[-1])
    assert run("SELECT version_num FROM evalstore_schema_version", empty_database_url) == [(revisions()[-1],)]
    # Processes of the previous release read it.
    assert run("SELECT version_num FROM alembic_version ORDER BY 1", empty_database_url) == [
        ("0008",),
        *((one,) for one in theirs),
    ]
    assert len(told) == 1
    assert "DELETE FROM alembic_version WHERE version_num = '0008'" in told[0]
    assert migrations.upgrade(empty_database_url, told.append) == (revisions()[-1], revisions()[-1])
    assert len(told) == 1
    with engine.connect() as conn:
        migrations.check(conn)


@pytest.mark.parametrize("revision", ["0001", "0002", "0003", "0004", "0005", "0006", "0007"])
def test_older_installations_move_over_from_the_revision_that_their_tables_have(
    engine: Engine, empty_database_url: str, revision: str
) -> None:
    previous_release(empty_database_url, revision)
    with engine.connect() as conn, pytest.raises(SchemaMismatch, match=f"at revision {revision}, .*run `evalstore migrate`"):
        migrations.check(conn)
    assert migrations.upgrade(empty_database_url) == (revision, revisions()[-1])
    assert run("SELECT version_num FROM alembic_version", empty_database_url) == [(revision,)]


def test_our_tables_are_known_after_others_wrote_over_our_version(empty_database_url: str) -> None:
    previous_release(empty_database_url)
    run("UPDATE alembic_version SET version_num = '0012'", empty_database_url)
    told: list[str] = []
    assert migrations.upgrade(empty_database_url, told.append) == ("0008", revisions()[-1])
    assert told == []


def test_an_installation_moves_over_while_the_old_release_migrates_it(empty_database_url: str, eventually: Eventually) -> None:
    previous_release(empty_database_url, "0007")
    with ThreadPoolExecutor(1) as thread, psycopg.connect(empty_database_url) as old:
        old.execute("SELECT pg_advisory_xact_lock(%s)", [migrations._OLD_LOCK])
        old.execute("ALTER TABLE confirmations ADD COLUMN traceparents text")
        upgraded = thread.submit(migrations.upgrade, empty_database_url)
        waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
        eventually(lambda: run(waits, empty_database_url), what="that it waits")
        old.commit()
        assert upgraded.result(timeout=30) == ("0008", revisions()[-1])


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("evaluations", "CREATE TABLE evaluations (id int PRIMARY KEY, status text, score float8)"),
        ("evaluations", "CREATE VIEW evaluations AS SELECT 1 AS eval_id"),
        ("probes", "CREATE TYPE probes AS ENUM ('a')"),
        ("dead_letters_by_time", "CREATE TABLE jobs (at int); CREATE INDEX dead_letters_by_time ON jobs (at)"),
    ],
)
def test_a_name_that_is_taken_is_told_and_nothing_is_changed(empty_database_url: str, name: str, statement: str) -> None:
    run(statement, empty_database_url)
    revision_of_others(empty_database_url, "0008")
    before = run("SELECT relname FROM pg_class ORDER BY 1", empty_database_url)
    done = evalstore("migrate", url=empty_database_url)
    assert (done.returncode, done.stdout) == (1, "")
    assert f'"{name}" already exists' in done.stderr
    assert "EVALSTORE_DATABASE_SCHEMA" in done.stderr
    assert "Traceback" not in done.stderr
    assert run("SELECT relname FROM pg_class ORDER BY 1", empty_database_url) == before


def test_two_schemas_of_a_database_hold_an_evalstore_each(empty_database_url: str) -> None:
    run("CREATE SCHEMA one; CREATE SCHEMA two; CREATE TABLE evaluations (id int)", empty_database_url)
    one, two = (f"{empty_database_url}?options=-c%20search_path%3D{name},public" for name in ("one", "two"))
    assert migrations.lock_key("one") != migrations.lock_key("two")
    assert migrations.upgrade(one) == (None, revisions()[-1])
    made = database.engine(two)
    with made.connect() as conn, pytest.raises(SchemaMismatch, match="no evalstore tables yet"):
        migrations.check(conn)
    made.dispose()
    assert migrations.upgrade(two) == (None, revisions()[-1])


def test_a_search_path_without_a_schema_is_told(empty_database_url: str) -> None:
    with pytest.raises(SchemaMismatch, match="search_path names no schema"):
        migrations.upgrade(f"{empty_database_url}?options=-c%20search_path%3Dnowhere")


def test_without_a_server_migrating_and_checking_is_an_outage() -> None:
    with pytest.raises(DatabaseOutage):
        migrations.upgrade("postgresql://127.0.0.1:1/x")
    done = evalstore("migrate", url="postgresql://127.0.0.1:1/x")
    assert done.returncode == 7
    assert done.stderr.startswith("PostgreSQL cannot be used: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("revision", "advice"),
    [(None, "run `evalstore migrate`"), ("first", "run `evalstore migrate`"), ("future", "deploy a newer one")],
)
def test_a_worker_on_another_schema_refuses_and_says_what_to_run(
    empty_database_url: str, redis_url: str, tmp_path: Path, eventually: Eventually, revision: str | None, advice: str
) -> None:
    if revision is not None:
        migrations.upgrade(empty_database_url)
        number = revisions()[0] if revision == "first" else revision
        run(f"UPDATE evalstore_schema_version SET version_num = '{number}'", empty_database_url)
    before = run("SELECT relname FROM pg_class ORDER BY 1", empty_database_url)
    log = tmp_path / "worker.log"
    environment = {**os.environ, "EVALSTORE_DATABASE_URL": empty_database_url, "EVALSTORE_REDIS_URL": redis_url}
    command = [sys.executable, "-m", "dramatiq", "worker.tasks", "--processes", "1", "--threads", "1"]
    with log.open("wb") as output:
        guard = processes.start(command, mark=tmp_path, output=output, cwd=ROOT, env=environment)
    try:
        eventually(lambda: advice in log.read_text(), what="advice in the worker's log", within_s=30)
    finally:
        guard.terminate()
        guard.wait()
    assert run("SELECT relname FROM pg_class ORDER BY 1", empty_database_url) == before


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_that_cannot_hold_all_text_is_refused_with_how_to_make_one(shared_postgres: Postgres, encoding: str) -> None:
    url = shared_postgres.url(name := f"in_{encoding.lower()}")
    how = f"TEMPLATE template0 ENCODING '{encoding}' LOCALE_PROVIDER libc LOCALE 'C'"
    with psycopg.connect(shared_postgres.url("postgres"), autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name} {how}")
        try:
            migrated = evalstore("migrate", url=url)
        finally:
            conn.execute(f"DROP DATABASE {name} WITH (FORCE)")
    assert (migrated.returncode, migrated.stdout) == (1, "")
    assert "encoding" in migrated.stderr
    assert "ENCODING 'UTF8'" in migrated.stderr
    assert "Traceback" not in migrated.stderr


def test_what_a_client_says_of_its_encoding_changes_nothing(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "SQL_ASCII")
    for url in (database_url, f"{database_url}?client_encoding=latin1"):
        made = database.engine(url)
        with closing(made.connect()) as conn:
            assert conn.execute(text("SELECT :text"), {"text": "\N{SNOWMAN}"}).scalar_one() == "\N{SNOWMAN}"
        made.dispose()


def _has_log_index(url: str) -> bool:
    query = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('evaluation_events_by_recorded_at')"
    with psycopg.connect(url) as conn:
        return conn.execute(query).fetchall() == [(True,)]


@pytest.mark.parametrize("state", ["missing", "invalid"])
def test_the_index_of_a_long_log_is_built_while_events_are_stored(
    database_url: str, eventually: Eventually, state: str
) -> None:
    """An insert that is held open delays the build, and the build delays no insert."""
    insert = (
        "INSERT INTO evaluation_events (eval_id, event_id, type, attempt, occurred_at)"
        " VALUES (%s, gen_random_uuid(), 'evaluation:started', 1, now())"
    )
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(insert, ["before"])
        if state == "missing":
            conn.execute("DROP INDEX evaluation_events_by_recorded_at")
        else:
            index = "'evaluation_events_by_recorded_at'::regclass"
            conn.execute(f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = {index}".encode())
        told: list[str] = []
        migrating = Thread(target=migrations.upgrade, args=(database_url, told.append))
        with psycopg.connect(database_url) as holder:
            holder.execute(insert, ["held"])
            migrating.start()
            waits = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%INDEX CONCURRENTLY%' AND wait_event_type = 'Lock'"
            eventually(lambda: conn.execute(waits.encode()).fetchone() != (0,), within_s=30)
            conn.execute("SET lock_timeout = '1s'")
            for number in range(100):
                conn.execute(insert, [f"meanwhile{number}"])
            assert not _has_log_index(database_url)
        migrating.join(30)
    assert _has_log_index(database_url)
    assert told == ["builds the index evaluation_events_by_recorded_at; storing goes on meanwhile"]
