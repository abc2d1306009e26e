"""Defaults of a role, a database, a server, the environment or a pooler change nothing that is stored, shown or done."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from signal import SIGQUIT
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
from storage.migrations import upgrade
from storage.operator_actions import Intent
from storage.sessions import split_options

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
