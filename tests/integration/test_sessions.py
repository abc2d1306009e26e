"""Defaults of a role, a database, a server, the environment or a pooler change nothing that is stored, shown or done."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGQUIT
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Engine

from evalstore.local.servers import Postgres
from evalstore.storage import api_keys, database, dead_letters, durability, event_store, operator_actions
from evalstore.storage.dead_letters import DeadLetterInsert
from evalstore.storage.migrations import check, upgrade
from evalstore.storage.operator_actions import Intent
from evalstore.storage.sessions import split_options
from models import Event
from models.errors import DatabaseMisconfigured, DatabaseOutage
from tests.chaos.world import World
from tests.factories import parsed_event
from tests.integration import shell
from tests.integration.conftest import Api
from tests.integration.shell import Operator
from tests.pgbouncer import PgBouncer, program

# Bad defaults of a database, and the expected value of each.
HOSTILE: Final = {
    "synchronous_commit": "off",
    "datestyle": "SQL, DMY",
    "timezone": "Asia/Kolkata",
    "intervalstyle": "sql_standard",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "standard_conforming_strings": "off",
    "statement_timeout": "1h",
    "lock_timeout": "1h",
    "idle_in_transaction_session_timeout": "1h",
    "default_transaction_isolation": "serializable",
    "search_path": "hostile, public",
    "jit": "on",
    "client_encoding": "LATIN1",
    "row_security": "off",
    "idle_session_timeout": "1h",
    "transaction_timeout": "1h",
}
# Settings in the environment of a shell. PGOPTIONS would make every transaction read-only.
ENVIRONMENT: Final = {
    "PGTZ": "Asia/Kolkata",
    "TZ": "Asia/Kolkata",
    "PGDATESTYLE": "SQL, DMY",
    "PGGEQO": "off",
    "PGCLIENTENCODING": "LATIN1",
    "PGOPTIONS": "-c default_transaction_read_only=on -c statement_timeout=1",
    "PGSSLMODE": "allow",
    "PGTARGETSESSIONATTRS": "any",
    "PGAPPNAME": "other",
    "PGCONNECT_TIMEOUT": "1000",
}
MADE_OF_THEM: Final = {
    "synchronous_commit": "on",
    "datestyle": "ISO, MDY",
    "timezone": "UTC",
    "intervalstyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "0",
    "default_transaction_isolation": "read committed",
    "transaction_isolation": "read committed",
    "search_path": "public",
    "jit": "off",
    "client_encoding": "UTF8",
    "row_security": "off",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
}
INTENT = Intent("redrive", "ada", None, {})


def event(number: int, **fields: Any) -> Event:
    return parsed_event("queued", number, eval_id=f"e{number}", **fields)


def burial(number: int) -> DeadLetterInsert:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return DeadLetterInsert(UUID(int=number), "q", "a", None, None, b"{}", "E", "m", "t", "s", 1, at, None, None)


def stop_immediately(server: Postgres) -> None:
    """As `pg_ctl stop -m immediate`: what is not written to the log is lost."""
    os.kill(server.pid, SIGQUIT)
    server.stop()


@pytest.fixture
def careless(postgres_server: Postgres) -> Postgres:
    """A server whose defaults lose what was committed in the last seconds."""
    upgrade(postgres_server.url())
    with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as conn:
        conn.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
        conn.execute("ALTER DATABASE evalstore SET synchronous_commit = off")
        conn.execute("ALTER ROLE evalstore SET synchronous_commit = local")
        conn.execute("ALTER ROLE evalstore IN DATABASE evalstore SET synchronous_commit = off")
        conn.execute("SELECT pg_reload_conf()")
    return postgres_server


def _few(engine: Engine) -> None:
    with engine.connect() as conn:
        event_store.store(conn, [event(1)])


def _many(engine: Engine) -> None:
    with engine.connect() as conn:
        event_store.store(conn, [event(number) for number in range(1, 200)])


def _letters(engine: Engine) -> None:
    with engine.connect() as conn:
        dead_letters.write(conn, [burial(1)])


def _key(engine: Engine) -> None:
    with engine.connect() as conn:
        api_keys.create(conn, "k", ["read"])


def _action(engine: Engine) -> None:
    with engine.connect() as conn:
        operator_actions.note(conn, INTENT, 1)


@pytest.mark.parametrize(
    ("write", "table"),
    [
        (_few, "evaluations"),
        (_many, "evaluation_events"),
        (_letters, "dead_letters"),
        (_key, "api_keys"),
        (_action, "operator_actions"),
    ],
)
def test_what_is_committed_outlives_a_crash_though_the_database_commits_asynchronously(
    careless: Postgres, write: Callable[[Engine], None], table: str
) -> None:
    made = database.engine(careless.url())
    write(made)
    with psycopg.connect(careless.url()) as conn:
        count = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))
        before = conn.execute(count).fetchall()
    stop_immediately(careless)
    made.dispose()
    careless.start()
    with psycopg.connect(careless.url()) as conn:
        assert conn.execute(count).fetchall() == before != [(0,)]


@pytest.mark.parametrize(
    ("default", "used"), [("off", "on"), ("local", "on"), ("remote_write", "on"), ("remote_apply", "remote_apply")]
)
def test_each_transaction_commits_as_durably_as_on_or_stronger(database_url: str, default: str, used: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        name = sql.Identifier(conn.info.dbname)
        conn.execute(sql.SQL("ALTER DATABASE {} SET synchronous_commit = {}").format(name, sql.Identifier(default)))
    made = database.engine(database_url)
    with made.connect() as conn:
        assert conn.exec_driver_sql("SHOW synchronous_commit").scalar() == used
    made.dispose()


def test_a_server_that_does_not_keep_what_it_commits_is_named(postgres_server: Postgres) -> None:
    made = database.engine(postgres_server.url())
    with made.connect() as conn:
        assert [doubt.partition(" ")[0] for doubt in durability.doubts(conn)] == ["fsync", "full_page_writes"]
    with psycopg.connect(postgres_server.url(), autocommit=True) as plain:
        plain.execute("ALTER ROLE evalstore SET default_transaction_read_only = on")
    made.dispose()
    with made.connect() as conn:
        assert durability.doubts(conn)[2].startswith("default_transaction_read_only")
    made.dispose()


def test_a_role_that_may_make_no_temporary_table_is_named(database_url: str) -> None:
    """Large batches need one; small ones go through, so that nothing else shows what is wrong."""
    made = database.engine(database_url)
    with psycopg.connect(database_url, autocommit=True) as admin:
        name = sql.Identifier(admin.info.dbname)
        role = sql.Identifier(f"modest_{admin.info.dbname}")
        admin.execute(sql.SQL("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC").format(name))
        admin.execute(sql.SQL("CREATE ROLE {}").format(role))
        try:
            with made.connect() as conn:
                before = durability.doubts(conn)
                database.driver(conn).execute(sql.SQL("SET SESSION AUTHORIZATION {}").format(role))
                conn.commit()
                assert [doubt for doubt in durability.doubts(conn) if doubt not in before] == [
                    (
                        f"this role may not create temporary tables: large batches are not stored: GRANT TEMPORARY ON DATABASE "
                        f"{admin.info.dbname} TO {role.as_string(None)[1:-1]}"
                    )
                ]
                database.driver(conn).execute("RESET SESSION AUTHORIZATION")
        finally:
            made.dispose()
            admin.execute(sql.SQL("DROP ROLE {}").format(role))


def set_defaults(url: str) -> None:
    """Give the database all HOSTILE defaults."""
    with psycopg.connect(url, autocommit=True) as conn:
        name = sql.Identifier(conn.info.dbname)
        for setting, value in HOSTILE.items():
            shown = sql.SQL(value) if setting == "search_path" else sql.Literal(value)
            conn.execute(sql.SQL("ALTER ROLE evalstore IN DATABASE {} SET {} = {}").format(name, sql.SQL(setting), shown))
        conn.execute("CREATE SCHEMA hostile CREATE TABLE evaluations (nothing int) CREATE TABLE dead_letters (nothing int)")


@pytest.fixture
def pooler(open_folder: Path) -> Iterator[Callable[..., PgBouncer]]:
    """`pooler(url)`: PgBouncer in front of it, in transaction mode."""
    if program() is None:
        pytest.skip("pgbouncer is not here: Debian's package pgbouncer has it, and .ci/run fetches it")
    made: list[PgBouncer] = []

    def start(url: str, **options: Any) -> PgBouncer:
        made.append(PgBouncer(open_folder, url, **options))
        return made[-1]

    yield start
    for one in made:
        one.stop()


def test_no_default_of_role_or_environment_changes_what_is_stored_shown_or_done(
    world: World, operator: Operator, tmp_path: Path
) -> None:
    env: dict[str, Any] = ENVIRONMENT | {
        "EVALSTORE_DATABASE_SCHEMA": "public",
        "EVALSTORE_OBJECT_STORE_URL": f"file://{tmp_path}/objects",
        "EVALSTORE_ARCHIVE_THRESHOLD_BYTES": "100",
    }
    operator.env |= env
    operator.database_url += (
        "?options=-c%20search_path%3Dpublic%20-c%20timezone%3DUTC%20-c%20datestyle%3DISO"  # The settings that this test reads.
    )
    last = "9999-12-31T23:59:59Z"
    events = [shell.event(number, occurred_at=last, metadata={"é": "雪"}, output="x" * 5000) for number in range(3)]
    set_defaults(world.database_url)
    shell.dead_by(world, operator, world.workers(**shell.SMALL, **env), events)
    world.workers(**env).start()

    found = operator.dlq("ls", "-o", "json")
    assert found.status == 0, found.err
    assert {one["first_at"][-1] for one in found.json} == {"Z"}
    redriven = operator.dlq("redrive", "--error-class", "InvalidEvent", "--yes", "-o", "json")
    assert (redriven.status, redriven.json["stored"]) == (0, 3), redriven.err
    archived = operator.evalstore("archive", "run")
    assert (archived.status, archived.err) == (0, "3 contents moved, 15,000 bytes\n")
    record = operator.evalstore("get", "run-0", "-o", "json")
    assert record.status == 0, record.err
    assert (record.json["finished_at"], record.json["metadata"]) == (last, {"é": "雪"})
    assert record.json["output"] == "x" * 5000
    status = operator.evalstore("status", "-o", "json")
    assert status.status == 0, status.err
    assert status.json["contents"]["objects"]["count"] == 3
    ready = operator.evalstore("health", "--ready")
    assert ready.status == 0, ready.err


def tables(url: str) -> dict[str, int]:
    """How many tables are in each schema that has any."""
    with psycopg.connect(url) as conn:
        query = "SELECT schemaname, count(*) FROM pg_tables WHERE schemaname !~ '^(pg_|information_schema)' GROUP BY 1"
        return dict(conn.execute(query).fetchall())


def test_behind_a_pooler_all_tables_and_events_are_in_the_chosen_schema(
    pooler: Callable[..., PgBouncer], empty_database_url: str
) -> None:
    between = pooler(empty_database_url)
    upgrade(between.url, schema="evals")
    assert set(tables(empty_database_url)) == {"evals"}
    made = database.engine(between.url, schema="evals")
    with psycopg.connect(between.url, autocommit=True) as other:  # It leaves sessions of the pooler with another path.
        other.execute("SET search_path = public")
        _few(made)
        _many(made)
        with made.connect() as conn:
            check(conn)
    made.dispose()
    with psycopg.connect(empty_database_url) as conn:
        assert conn.execute("SELECT count(*) FROM evals.evaluations").fetchall() == [(199,)]


def test_the_search_path_of_an_address_counts_behind_a_pooler(
    pooler: Callable[..., PgBouncer], empty_database_url: str
) -> None:
    between = pooler(empty_database_url, more="ignore_startup_parameters = options")
    with psycopg.connect(empty_database_url) as conn:
        conn.execute("CREATE SCHEMA evals")
    url = f"{between.url}?options=-c%20search_path%3Devals"
    upgrade(url)
    made = database.engine(url)
    _few(made)
    made.dispose()
    assert set(tables(empty_database_url)) == {"evals"}


def test_behind_a_pooler_each_transaction_has_all_settings_and_leaves_none(
    pooler: Callable[..., PgBouncer], database_url: str
) -> None:
    set_defaults(database_url)
    between = pooler(database_url, pool_size=1)
    made = database.engine(between.url, statement_timeout_s=12)
    with made.connect() as conn, conn.begin():
        raw = database.driver(conn)
        shown = {setting: raw.execute(f"SHOW {setting}".encode()).fetchall()[0][0] for setting in MADE_OF_THEM | HOSTILE}
    assert shown == MADE_OF_THEM | {"statement_timeout": "12s", "search_path": "hostile"}
    with psycopg.connect(between.url) as other:
        assert other.execute("SHOW statement_timeout").fetchall() == [("1h",)]
        assert other.execute("SHOW synchronous_commit").fetchall() == [("off",)]
    made.dispose()


def test_behind_a_pooler_what_is_committed_outlives_a_crash(pooler: Callable[..., PgBouncer], careless: Postgres) -> None:
    between = pooler(careless.url())
    made = database.engine(between.url)
    for write in (_many, _letters, _key, _action):
        write(made)
    _few(made)
    stop_immediately(careless)
    made.dispose()
    careless.start()
    with psycopg.connect(careless.url()) as conn:
        for table in ("evaluations", "dead_letters", "api_keys", "operator_actions"):
            assert conn.execute(sql.SQL("SELECT count(*) > 0 FROM {}").format(sql.Identifier(table))).fetchall() == [(True,)]


def test_behind_a_pooler_the_service_reads_the_records_of_the_chosen_schema(
    pooler: Callable[..., PgBouncer], empty_database_url: str, redis_url: str, tmp_path: Path
) -> None:
    between = pooler(empty_database_url, pool_size=1)
    upgrade(between.url, schema="evals")
    servers = {"EVALSTORE_DATABASE_URL": between.url, "EVALSTORE_DATABASE_SCHEMA": "evals", "EVALSTORE_REDIS_URL": redis_url}
    api = Api(tmp_path / "api", servers)
    with psycopg.connect(between.url, autocommit=True) as other:
        api.start()
        try:
            assert api.both.post("/storage/evaluations", json={"eval_id": "e", "code": "c"}).status_code == 201
            for version in (1, 2):
                other.execute("SET search_path = pg_temp")  # The service will get this session too.
                read = api.read.get("/storage/evaluations/e")
                assert (read.status_code, read.json().get("version")) == (200, version), read.text
                api.both.put("/storage/evaluations/e", json={"status": "running", "executor_id": str(version)})
        finally:
            api.stop()


def wrong(url: str) -> list[str]:
    """Addresses of no database, no role, and with a wrong password."""
    parts = {name: str(value) for name, value in conninfo_to_dict(url).items()}
    place = f"{parts['host']}:{parts['port']}"
    user = f"{parts['user']}:{parts['password']}"
    return [
        f"postgresql://{user}@{place}/nowhere",
        f"postgresql://nobody:x@{place}/x",
        f"postgresql://evalstore:hunter2@{place}/x",
    ]


def test_a_database_role_or_password_that_is_refused_is_a_mistake_in_settings(database_url: str) -> None:
    for url in wrong(database_url):
        with pytest.raises(DatabaseMisconfigured, match=r"^mistake in settings: ") as raised:
            database.engine(url).connect()
        assert not raised.value.may_be_the_work
        assert "hunter2" not in str(raised.value)
    other = wrong(database_url)[0].replace("127.0.0.1:", "127.0.0.1:1,127.0.0.1:")  # Another host, which may come back.
    with pytest.raises(DatabaseOutage) as waits:
        database.engine(other).connect()
    assert not isinstance(waits.value, DatabaseMisconfigured)


def test_behind_a_pooler_a_database_that_is_not_there_is_a_mistake_in_settings(
    pooler: Callable[..., PgBouncer], database_url: str
) -> None:
    between = pooler(database_url)
    with pytest.raises(DatabaseMisconfigured, match="nowhere"):
        database.engine(f"{between.url.rpartition('/')[0]}/nowhere").connect()


def test_a_process_that_starts_with_a_mistake_in_settings_says_so_and_ends(operator: Operator) -> None:
    operator.env["EVALSTORE_DATABASE_URL"] = wrong(operator.database_url)[0]
    for command in ("import worker.tasks", "import evalstore.api.app"):
        done = subprocess.run([sys.executable, "-c", command], env=operator.env, capture_output=True, text=True, check=False)
        assert (done.returncode, "EVALSTORE_DATABASE_URL: mistake in settings: " in done.stderr) == (2, True), done.stderr
    for words, status in ((("status",), 2), (("migrate",), 2), (("health", "--ready"), 1)):
        told = operator.evalstore(*words)
        assert (told.status, "mistake in settings: " in told.out + told.err) == (status, True), told


def test_a_worker_keeps_its_events_while_its_database_is_not_there(world: World, eventually: Callable[..., None]) -> None:
    workers = world.workers()
    workers.start()
    there, away = (world.database_url.rpartition("/")[2] + more for more in ("", "_away"))
    rename = "ALTER DATABASE {} RENAME TO {}"
    at = world.database_url.rpartition("/")[0] + "/postgres"
    with psycopg.connect(at, autocommit=True) as conn:
        conn.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", [there])
        conn.execute(sql.SQL(rename).format(sql.Identifier(there), sql.Identifier(away)))
        try:
            world.send([shell.event(1)])
            held = "DatabaseMisconfigured, holding 1 events until it is over: mistake in settings: "
            eventually(lambda: held in workers.log.read_text(), within_s=30, what="that the worker waits")
        finally:
            conn.execute(sql.SQL(rename).format(sql.Identifier(away), sql.Identifier(there)))
    eventually(lambda: world.applied() == 1, within_s=30, what="that it is stored")
    assert world.dead() == []


@pytest.mark.parametrize(
    ("options", "settings", "rest"),
    [
        ("", {}, ""),
        ("-c search_path=evals", {"search_path": "evals"}, ""),
        (r"-csearch_path=a,\ b --statement-timeout=5s", {"search_path": "a, b", "statement_timeout": "5s"}, ""),
        ("endpoint=ep-cool-1 -c jit=on", {"jit": "on"}, "endpoint=ep-cool-1"),
    ],
)
def test_options_of_an_address_are_split(options: str, settings: dict[str, str], rest: str) -> None:
    assert split_options(options) == (settings, rest)
