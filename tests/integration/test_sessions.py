"""Defaults of a role, a database, a server, the environment or a pooler change nothing that is stored, shown or done."""

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGQUIT
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Engine

from models import Event
from models.events import parse
from ops.servers import Postgres
from storage import database, dead_letters, durability, evaluations, keys, operator_actions
from storage.dead_letters import Burial
from storage.migrations import check, upgrade
from storage.operator_actions import Intent
from storage.sessions import split_options
from tests.chaos.world import World
from tests.integration import shell
from tests.integration.shell import Operator
from tests.pgbouncer import PgBouncer, program

# Defaults of a database that nobody would want, and what becomes of each.
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
# What a shell may have set besides. PGOPTIONS would make every transaction read-only.
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


def event(number: int, **fields: object) -> Event:
    named = {"type": "evaluation:queued", "eval_id": f"e{number}", "event_id": UUID(int=number), "code": "c"}
    return parse({**named, "occurred_at": "2026-01-01T00:00:00Z", **fields})


def burial(number: int) -> Burial:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return Burial(UUID(int=number), "q", "a", None, None, b"{}", "E", "m", "t", "s", 1, at, None, None)


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
        evaluations.store(conn, [event(1)])


def _many(engine: Engine) -> None:
    with engine.connect() as conn:
        evaluations.store(conn, [event(number) for number in range(1, 200)])


def _letters(engine: Engine) -> None:
    with engine.connect() as conn:
        dead_letters.write(conn, [burial(1)])


def _key(engine: Engine) -> None:
    with engine.connect() as conn:
        keys.create(conn, "k", ["read"])


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
    env = ENVIRONMENT | {
        "EVALSTORE_DATABASE_SCHEMA": "public",
        "EVALSTORE_OBJECT_STORE_URL": f"file://{tmp_path}/objects",
        "EVALSTORE_ARCHIVE_THRESHOLD_BYTES": "100",
    }
    operator.env |= env
    operator.database_url += "?options=-c%20search_path%3Dpublic%20-c%20timezone%3DUTC%20-c%20datestyle%3DISO"  # by which this test looks
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
    assert operator.evalstore("archive", "run").status == 0
    record = operator.evalstore("get", "run-0", "-o", "json")
    assert record.status == 0, record.err
    assert (record.json["finished_at"], record.json["metadata"]) == (last, {"é": "雪"})
    assert record.json["output"] == "x" * 5000
    status = operator.evalstore("status", "-o", "json")
    assert status.status == 0, status.err
    assert status.json["contents"]["archive"]["count"] == 3
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
    upgrade(between.url, "evals")
    assert set(tables(empty_database_url)) == {"evals"}
    made = database.engine(between.url, schema="evals")
    with psycopg.connect(between.url, autocommit=True) as other:  # it leaves the pool's sessions with another path
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
