"""Connect to PostgreSQL, and translate the driver's errors into evalstore's."""

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

import psycopg
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from evalstore.storage.revisions import revisions
from evalstore.storage.sessions import Session, register_types, set_up, split_options
from models.errors import DatabaseMisconfigured, DatabaseOutage, DatabaseTimeout, InvalidSettings
from models.settings import Settings

# These errors pass by themselves or after an operator repairs the server. No message causes them.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_OUTAGE_CLASSES = ("08", "25", "28", "3D", "40", "53", "57", "58")
# Some of these outages may be caused by the work itself, for example by a very large message.
_OVERTAXED = (pg.QueryCanceled, pg.OutOfMemory, pg.IdleInTransactionSessionTimeout)
# SQLSTATEs of a server that ends a connection: on request, or because another server process crashed. On an idle connection
# they arrive as a notice. https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-ASYNC
_ENDED, _CRASHED = ("57P01", "57P02", "57P05", "25P03"), "57P02"
# A pooler that gives each transaction another session causes these: that session does not have our prepared statements.
_POOLED = (pg.InvalidSqlStatementName, pg.DuplicatePreparedStatement)
_TIMEOUTS = (pg.QueryCanceled, pg.LockNotAvailable, pg.IdleInTransactionSessionTimeout)
_OUTAGES = (pg.LockNotAvailable, pg.InsufficientPrivilege, *_POOLED)
_MISTAKES: Final = ("3D000", "28000", "28P01")
_MISTAKE: Final = re.compile(
    r"FATAL:  (database \".*\" does not exist|role \".*\" (does not exist|is not permitted to log in)|no pg_hba\.conf entry"
    r"|.*authentication failed|no such (database|user))|no password supplied"
)
# The first word of the name that connections tell the server. The second is the newest revision of the tables that they know.
CLIENT: Final = "evalstore"
_PING_S: Final = 5.0
_MOST_ANSWERS: Final = 1000  # More than the number of statements in any pipeline.
_NOT_MIGRATED = (pg.UndefinedTable, pg.UndefinedColumn)


class _ThisThread(threading.local):
    was_refused = False
    was_told = False  # The server sent a notice why it ended a connection.


_this_thread = _ThisThread()
_shares_sessions = threading.Event()  # Set once such a pooler is noticed. New connections then prepare no statements.


def engine(
    url: str,
    *,
    schema: str | None = None,
    pool_size: int = 5,
    statement_timeout_s: float = 60,
    lock_timeout_s: float = 5,
    idle_timeout_s: float = 0,
    pre_ping: bool = True,
) -> Engine:
    """Return a pool of connections to `url` (any libpq address). Their tables are in `schema`.

    Without `schema` the tables are in the first schema of the connection's search path. Defaults of the role, the database and
    the environment have no effect. Connections open on demand.

    The server ends a transaction whose client vanished, or, with `idle_timeout_s`, a transaction that is idle for so long. So
    its locks block others no longer than that.

    `pre_ping` tests a connection before the pool hands it out. The test may take _PING_S.

    Every wait is bounded: an unreachable server is noticed within 10 s. Connecting raises DatabaseOutage. Raises
    InvalidSettings if `url` is no address.
    """
    own_settings, own_options = split_options(parse(url).get("options") or "")
    wanted = {
        "statement_timeout": str(int(statement_timeout_s * 1000)),
        "lock_timeout": str(int(lock_timeout_s * 1000)),
        "idle_in_transaction_session_timeout": str(int(idle_timeout_s * 1000)),
        **own_settings,
    }
    watch = Watch()

    def connect() -> psycopg.Connection[tuple[Any, ...]]:
        with errors():  # Callers connect before they are inside their own `errors` block.
            conn = Session.connect(
                url,
                connect_timeout=3,
                tcp_user_timeout=8000,
                keepalives_idle=5,
                keepalives_interval=1,
                keepalives_count=3,
                application_name=f"{CLIENT} {revisions()[-1]}",
                client_encoding="utf8",  # Overrides the environment and the database.
                options=own_options,
                prepare_threshold=None if _shares_sessions.is_set() else 5,
            )
            try:
                with watch.bounded_driver(conn, _PING_S):  # A pooler accepts connections while its server is unavailable.
                    set_up(conn, wanted, schema)
            except BaseException:
                conn.close()
                raise
        register_types(conn)
        conn.add_notice_handler(_note_end)
        return conn

    pool = create_engine(
        "postgresql+psycopg://",
        creator=connect,
        pool_size=pool_size,
        max_overflow=5,
        pool_timeout=10,
    )
    if pre_ping:
        event.listen(pool, "checkout", _trying_out(watch))
    event.listen(pool, "checkin", _leave_refused)
    return pool


def connect(settings: Settings, **options: Any) -> Engine:
    """Return the engine for the database and schema that `settings` name. `options` are those of `engine`."""
    return engine(settings.database_url.get_secret_value(), schema=settings.database_schema, **options)


def check_access(url: str) -> None:
    """Connect once. Raises DatabaseOutage, or DatabaseMisconfigured if the server refuses the database, role or password."""
    with errors():
        psycopg.connect(url, connect_timeout=2, options=split_options(parse(url).get("options") or "")[1]).close()


def parse(url: str) -> dict[str, Any]:
    """Parse an address into libpq's parameters.

    Connect to nothing. Raises InvalidSettings if libpq does not understand the address.
    """
    try:
        return conninfo_to_dict(url)
    except psycopg.ProgrammingError:  # The driver's message may hold the password.
        raise InvalidSettings("EVALSTORE_DATABASE_URL: expected an address that libpq understands") from None


def _trying_out(watch: "Watch") -> Callable[[psycopg.Connection[Any], ConnectionPoolEntry, object], None]:
    """Return a hook that tests a pooled connection. SQLAlchemy's `pool_pre_ping` would wait forever for a frozen server."""

    def try_out(raw: psycopg.Connection[Any], record: ConnectionPoolEntry, _: object) -> None:
        if record.info.get("was_used"):
            try:
                with watch.bounded_driver(raw, _PING_S):
                    raw.autocommit = True
                    raw.execute("SELECT", prepare=False)
                    raw.autocommit = False
            except (psycopg.Error, DatabaseOutage):
                raise InvalidatePoolError from None  # The pool's other connections broke too: the pool opens new ones.
        record.info["was_used"] = True

    return try_out


def _note_end(notice: psycopg.errors.Diagnostic) -> None:
    _this_thread.was_told |= notice.sqlstate in _ENDED


def _leave_refused(raw: object, record: ConnectionPoolEntry) -> None:  # noqa: ARG001 - SQLAlchemy's signature
    """Discard a connection whose server refused to write, or did not know a prepared statement.

    After a switch-over the same address leads to another server.
    """
    if _this_thread.was_refused:
        _this_thread.was_refused = False
        record.invalidate()


def driver(conn: Connection) -> psycopg.Connection[tuple[Any, ...]]:
    """Return the psycopg connection of `conn`, for COPY and binary results. It shares the transaction of `conn`."""
    raw = conn.connection.driver_connection
    if not isinstance(raw, psycopg.Connection):
        raise TypeError(f"expected a connection of psycopg, not {type(raw).__name__}")
    return raw


def is_pooled(conn: Connection) -> bool:
    """Tell whether a pooler may give each transaction another session. Autocommit would then lose the session's settings."""
    raw = driver(conn)
    return isinstance(raw, Session) and bool(raw.per_transaction)


@contextmanager
def snapshot(conn: Connection) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """Begin a transaction whose statements all see the tables as of one moment. Raises DatabaseOutage (retry)."""
    with errors():
        raw = driver(conn)
        raw.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        try:
            with conn.begin():
                yield raw
        finally:
            if not raw.closed:
                raw.isolation_level = psycopg.IsolationLevel.READ_COMMITTED


@contextmanager
def pipelined(conn: psycopg.Connection[Any]) -> Iterator[None]:
    """Send the statements of the block without waiting for each reply. Commit at the end of the block.

    If a statement fails, the statements after it fail too. Raises the error of the first.
    """
    with conn.pipeline() as pipeline:
        try:
            yield
            conn.commit()
        except BaseException:
            # Read the replies to the statements after the failed statement. Otherwise a rollback would raise their error
            # instead of the first error.
            for _ in range(_MOST_ANSWERS):
                try:
                    pipeline.sync()
                except psycopg.Error:
                    if not conn.closed:
                        continue
                break
            raise


@contextmanager
def errors() -> Iterator[None]:
    """Translate the driver's errors that pass by themselves: to DatabaseTimeout after a time limit of ours, else to
    DatabaseOutage.

    Other errors pass through unchanged.
    """
    _this_thread.was_told = False
    before = sys.exception()
    try:
        yield
    except PoolTimeout as error:
        raise DatabaseTimeout("no connection to PostgreSQL came free in time") from error
    except (DBAPIError, psycopg.Error) as error:
        cause = _reason(error.orig if isinstance(error, DBAPIError) else error, before)
        if isinstance(cause, _NOT_MIGRATED):
            raise DatabaseOutage(f"{cause.diag.message_primary}: run `evalstore migrate`") from error
        if isinstance(cause, _POOLED):
            _shares_sessions.set()
        _this_thread.was_refused = isinstance(cause, (*_POOLED, pg.ReadOnlySqlTransaction))
        if isinstance(cause, psycopg.Error) and _is_misconfigured(cause):
            raise DatabaseMisconfigured(str(cause).strip()) from error
        if isinstance(cause, psycopg.Error) and _is_outage(cause):
            kind = DatabaseTimeout if isinstance(cause, _TIMEOUTS) else DatabaseOutage
            raise kind(
                str(cause).strip() or type(cause).__name__,
                may_be_the_work=isinstance(cause, _OVERTAXED),
                is_lost=cause.sqlstate is None and not _this_thread.was_told,
                is_lock=isinstance(cause, pg.LockNotAvailable),
            ) from error
        raise


def _reason(error: BaseException | None, before: BaseException | None) -> BaseException | None:
    """Return why a connection ended, if `error` is only the failure of the rollback after that.

    `before` is the exception that was being handled before this work began.
    """
    while isinstance(error, psycopg.Error) and error.sqlstate is None and (inner := error.__context__) is not before:
        if not isinstance(inner, psycopg.Error):
            break
        error = inner
    return error


def _is_misconfigured(error: psycopg.Error) -> bool:
    if error.sqlstate is not None:
        return error.sqlstate in _MISTAKES
    # libpq gives no SQLSTATE for a failed attempt to connect. With several hosts, one host's failure may be an outage.
    reasons = re.findall(r"failed: (.+)", str(error))
    return bool(reasons) and all(_MISTAKE.search(reason) for reason in reasons)


def _is_outage(error: psycopg.Error) -> bool:
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError)
    return error.sqlstate.startswith(_OUTAGE_CLASSES) or isinstance(error, _OUTAGES)


_PROBE: Final = "INSERT INTO probes (name, at) VALUES ('worker', now()) ON CONFLICT (name) DO UPDATE SET at = excluded.at"


def probe(conn: Connection) -> None:
    """Commit a small write. Raises DatabaseOutage if even that fails."""
    with errors(), conn.begin():
        driver(conn).execute(_PROBE)


class ControlConnection:
    """An idle connection that learns from the server why connections end. docs/decisions/0021"""

    def __init__(self, engine: Engine) -> None:
        """Connect. Raises DatabaseOutage."""
        self._conn = engine.connect()
        self._told: list[str | None] = []
        driver(self._conn).autocommit = True
        driver(self._conn).add_notice_handler(lambda notice: self._told.append(notice.sqlstate))

    def fate(self, watch: "Watch", seconds: float) -> Literal["alive", "crash", "ended"]:
        """Return whether this connection is alive, ended because a server process crashed, or ended for another reason."""
        try:
            with errors(), watch.bounded(self._conn, seconds):
                driver(self._conn).execute("SELECT")
        except DatabaseOutage:
            return "crash" if _CRASHED in self._told else "ended"
        return "alive"

    def close(self) -> None:
        """Close the connection for good."""
        self._conn.invalidate()
        self._conn.close()


class Watch:
    """Breaks calls that take too long. This must happen in the client: a frozen server enforces no time limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def bounded(self, conn: Connection, seconds: float) -> Iterator[None]:
        """Break the connection if the block takes longer than `seconds`.

        Raises DatabaseTimeout if this process broke the connection, and not the server or the network.
        """
        with self.bounded_driver(driver(conn), seconds):
            yield

    @contextmanager
    def bounded_driver(self, raw: psycopg.Connection[Any], seconds: float) -> Iterator[None]:
        """Do as `bounded` does, for a psycopg connection."""
        key, call = threading.get_ident(), _Call(raw, time.monotonic() + seconds)
        with self._lock:
            self._calls[key] = call
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="evalstore-watch", daemon=True)
                self._thread.start()
        try:
            yield
        except (DatabaseOutage, DBAPIError, psycopg.Error) as error:
            if not call.broken_because:
                raise
            raise DatabaseTimeout(call.broken_because, may_be_the_work=True) from error
        finally:
            with self._lock:
                del self._calls[key]

    def renew(self, seconds: float) -> None:
        """Set the deadline of the calling thread to `seconds` from now. The thread must be inside `bounded`."""
        with self._lock:
            self._calls[threading.get_ident()].deadline = time.monotonic() + seconds

    def break_all(self) -> None:
        """Break every connection in use."""
        with self._lock:
            for call in self._calls.values():
                call.break_off("this process stops, and did not wait for the answer")

    def _run(self) -> None:
        while True:
            time.sleep(0.5)
            with self._lock:
                now = time.monotonic()
                for call in self._calls.values():
                    if now > call.deadline:
                        call.break_off(f"gave up after {now - call.began:.0f} s without an answer")


class _Call:
    """A block that uses a connection until `deadline`, on the clock of `time.monotonic`."""

    def __init__(self, raw: psycopg.Connection[Any], deadline: float) -> None:
        self.deadline, self.began = deadline, time.monotonic()
        self.broken_because = ""
        self._raw = raw

    def break_off(self, because: str) -> None:
        self.broken_because = self.broken_because or because
        _break(self._raw)


def _break(raw: psycopg.Connection[Any]) -> None:
    """Shut the socket down. A thread that waits on the socket then gets the error of a lost connection."""
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(raw.fileno())) as twin:
        twin.shutdown(socket.SHUT_RDWR)
