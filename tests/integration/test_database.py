"""Connections to PostgreSQL: what is an outage and what is not, what is told of it, and what of an address is kept."""

import threading
from collections.abc import Callable

import psycopg
import pytest
from sqlalchemy import Connection, Engine

from evalstore.storage import database
from models.errors import DatabaseOutage, DatabaseTimeout, InvalidSettings

PASSING = ["08006", "25006", "28000", "40001", "40P01", "42501", "42P01", "53100", "53300", "55P03", "57014", "57P01", "58030"]
LASTING = ["22P05", "22021", "23505", "23514", "54000"]


def test_what_passes_by_itself_is_an_outage_and_what_a_message_is_to_blame_for_is_none(engine: Engine) -> None:
    for sqlstate in PASSING + LASTING:
        with engine.connect() as conn, pytest.raises(Exception, match="told") as raised, database.errors():
            conn.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'told' USING ERRCODE = '{sqlstate}'; END $$")
        assert isinstance(raised.value, DatabaseOutage) == (sqlstate in PASSING), sqlstate


@pytest.mark.parametrize(("limit", "statement"), [("statement", "SELECT pg_sleep(9)"), ("lock", "LOCK TABLE probes")])
def test_a_time_limit_of_ours_is_told_apart_from_an_outage_of_the_server(database_url: str, limit: str, statement: str) -> None:
    hasty = database.engine(database_url, statement_timeout_s=0.5, lock_timeout_s=0.05)
    with hasty.connect() as conn, psycopg.connect(database_url) as holder:
        holder.execute("LOCK TABLE probes")
        with pytest.raises(DatabaseTimeout, match=f"{limit} timeout") as raised, database.errors(), conn.begin():
            database.driver(conn).execute(statement.encode())
        assert raised.value.is_lock == (limit == "lock")
    hasty.dispose()


def test_behind_a_pooler_that_changes_sessions_nothing_is_prepared_any_more(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_shares_sessions", threading.Event())

    def prepared(conn: Connection) -> int:
        raw = database.driver(conn)
        for _ in range(7):
            raw.execute("SELECT 1")
        ((count,),) = raw.execute("SELECT count(*) FROM pg_prepared_statements").fetchall()
        return int(count)

    with engine.connect() as conn:
        assert prepared(conn) == 1
        database.driver(conn).pgconn.exec_(b"DEALLOCATE ALL")
        with pytest.raises(DatabaseOutage, match="_pg3_0"), database.errors():
            prepared(conn)
    with engine.connect() as conn:
        assert prepared(conn) == 0


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://127.0.0.1:1/x",
        "postgresql://u:hunter2@127.0.0.1:1/x",
        "postgresql://nowhere.invalid/x",
        "postgresql:///x?host=/nowhere",
    ],
)
def test_a_server_that_is_not_there_is_an_outage(url: str) -> None:
    with pytest.raises(DatabaseOutage) as raised:
        database.engine(url).connect()
    assert "hunter2" not in str(raised.value)


def test_a_connection_that_was_ended_says_why(conn: Connection, database_url: str) -> None:
    """One of which nobody knows why it ended speaks against the work that it was used for."""
    raw = database.driver(conn)
    with psycopg.connect(database_url, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [raw.info.backend_pid])
    with pytest.raises(DatabaseOutage, match="administrator") as raised, database.errors(), conn.begin():
        raw.execute("SELECT 1")
    assert not raised.value.is_lost
    assert not raised.value.may_be_the_work


def test_what_is_being_handled_meanwhile_is_not_why_a_connection_ended(conn: Connection) -> None:
    """A batch that a bad event sank is stored in parts while that is handled; an outage then is none of the parts' fault."""
    raw = database.driver(conn)
    try:
        raw.execute("SELECT 1 / 0")
    except psycopg.errors.DivisionByZero:
        raw.rollback()
        database._break(raw)
        with pytest.raises(DatabaseOutage) as raised, database.errors(), conn.begin():
            raw.execute("SELECT 1")
    assert raised.value.is_lost


def test_a_transaction_that_stood_still_for_too_long_may_be_what_the_work_does(
    database_url: str, eventually: Callable[..., None]
) -> None:
    """An upload that takes so long each time must not be the first that the archive tries each time."""
    hasty = database.engine(database_url, idle_timeout_s=0.05)
    with hasty.connect() as standing, psycopg.connect(database_url, autocommit=True) as plain:
        raw = database.driver(standing)
        ((pid,),) = raw.execute("SELECT pg_backend_pid()").fetchall()
        lives = "SELECT 1 FROM pg_stat_activity WHERE pid = %s"
        eventually(lambda: not plain.execute(lives, [pid]).fetchone(), what="its end")
        with pytest.raises(DatabaseTimeout, match="idle-in-transaction") as raised, database.errors(), standing.begin():
            raw.execute("SELECT 1")
    hasty.dispose()
    assert raised.value.may_be_the_work
    assert not raised.value.is_lost


def test_an_address_that_is_none_is_told_and_not_repeated() -> None:
    with pytest.raises(InvalidSettings, match="EVALSTORE_DATABASE_URL") as raised:
        database.engine("postgresql://u:hunter2@h/x?nonsense=1")
    assert "hunter2" not in str(raised.value)


def test_options_in_the_address_are_kept(database_url: str) -> None:
    made = database.engine(f"{database_url}?options=-c%20search_path%3Delsewhere,public%20-c%20work_mem%3D5MB")
    with made.connect() as conn:
        assert conn.exec_driver_sql("SHOW search_path").scalar() == "public"
        assert conn.exec_driver_sql("SHOW work_mem").scalar() == "5MB"
        assert conn.exec_driver_sql("SHOW timezone").scalar() == "UTC"
    made.dispose()
