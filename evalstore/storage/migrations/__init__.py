"""Migrate the schema to this release's version, and check that a database has this version.

A migration must leave the database usable by workers of the previous release: they run while it is applied.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from psycopg import errors as pg
from psycopg import sql
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from evalstore.storage import database, list_indexes, log_index
from evalstore.storage.migrations import version
from evalstore.storage.revisions import revisions as revisions
from models.errors import DatabaseOutage, SchemaMismatch

if TYPE_CHECKING:
    from alembic.config import Config

# The advisory lock of migrations in releases up to revision 0008. All schemas share it.
_OLD_LOCK: Final = 0x65766173
# While a migration waits for a table lock, new users of the table wait behind the migration. So it waits for _LOCK_S only, and
# then pauses.
_LOCK_S: Final = 0.5
_PAUSE_S: Final = 2.0
_LOOK_S: Final = 0.1


def upgrade(
    url: str, tell: Callable[[str], object] = lambda _: None, *, schema: str | None = None, indexed_metadata: Sequence[str] = ()
) -> tuple[str | None, str]:
    """Migrate the tables of the database at `url` to this release. Return the revisions before and after.

    The tables are in `schema`, which is created if it is missing. Without `schema` they are in the connection's first schema.

    One transaction applies everything or nothing. It waits for users of the tables as long as needed. Several processes may
    call this function at once: the later processes wait and find nothing to do. After the transaction, the index of a log that
    is not empty is built, and the indexes of lists one by one, those of the metadata keys `indexed_metadata` among them.

    `tell` receives notices for the operator: the process that blocks a long wait, and manual steps that remain.

    Raises DatabaseOutage (retry). Raises SchemaMismatch if a newer release has migrated, if the database cannot hold all text,
    or if another application uses one of our table names.
    """
    done = _upgrade_tables(url, tell, schema)
    with _alone(url, schema) as conn:
        with database.errors(), conn.begin():
            home = version.schema_of(conn)
        log_index.ensure(conn, home, lock_key(f"{home} log index"), tell)
        list_indexes.ensure(conn, home, indexed_metadata, lock_key(f"{home} indexes"), tell)
    return done


def _upgrade_tables(url: str, tell: Callable[[str], object], schema: str | None) -> tuple[str | None, str]:
    try:
        return _upgrade(url, tell, schema)
    except DatabaseOutage as error:
        if not error.is_lock:
            raise
    with _alone(url, schema) as aside:
        onlooker = _Onlooker(aside, tell)
        while True:
            time.sleep(_PAUSE_S)
            try:
                return _upgrade(url, tell, schema, onlooker)
            except DatabaseOutage as error:
                if not error.is_lock:
                    raise


def _upgrade(
    url: str, tell: Callable[[str], object], schema: str | None, onlooker: "_Onlooker | None" = None
) -> tuple[str | None, str]:
    with _alone(url, schema) as conn:
        with onlooker.looking(conn) if onlooker else nullcontext(), database.errors(), conn.begin():
            _lock(conn, lock_key(schema or version.schema_of(conn)))
            _create_schema(conn, schema)
            if (encoding := conn.execute(text("SHOW server_encoding")).scalar_one()) != "UTF8":
                how = "CREATE DATABASE evalstore TEMPLATE template0 ENCODING 'UTF8'"
                raise SchemaMismatch(f"the database's encoding is {encoding}, which cannot hold all text: {how}")
            recorded = version.recorded(conn)
            _refuse_newer(recorded)
            moved = _move_over(conn) if recorded is None else None
            old_revision = moved if moved and version.is_in_shared_table(conn, moved) else None
            _apply(conn)
        if old_revision:
            tell(
                f"the revision is in {version.VERSION_TABLE} now; alembic_version keeps {old_revision} for processes of the"
                " previous release. When none of them runs any more: DELETE FROM alembic_version WHERE"
                f" version_num = '{old_revision}'"
            )
        return recorded or moved, revisions()[-1]


def lock_key(schema: str) -> int:
    """Return the number of the advisory lock for migrations of this schema."""
    return int.from_bytes(hashlib.sha256(f"evalstore:migrate:{schema}".encode()).digest()[:8], signed=True)


def _lock(conn: Connection, key: int) -> None:
    conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def _move_over(conn: Connection) -> str | None:
    """Record the revision of an installation that has our tables but not our version table. Return the revision.

    Leaves `alembic_version` unchanged: processes of the previous release read it, and other applications may have rows in it.
    """
    from alembic import command  # noqa: PLC0415 - whoever only checks is spared it

    if version.recognised(conn) is None:
        return None
    _lock(conn, _OLD_LOCK)
    if (revision := version.recognised(conn)) is not None:
        command.stamp(config(conn), revision)
    return revision


def _apply(conn: Connection) -> None:
    from alembic import command  # noqa: PLC0415 - as above

    try:
        command.upgrade(config(conn), "head")
    except DBAPIError as error:
        if isinstance(error.orig, (pg.DuplicateTable, pg.DuplicateObject)):
            raise SchemaMismatch(
                f"{error.orig.diag.message_primary}, and is not evalstore's: nothing was changed. Give evalstore a schema"
                " of its own: EVALSTORE_DATABASE_SCHEMA"
            ) from error
        raise


_SCHEMA: Final = "SELECT current_schema(), current_user, EXISTS (SELECT FROM pg_namespace WHERE nspname = %s)"


def _create_schema(conn: Connection, schema: str | None) -> None:
    """Create the schema that the connection's search path names, if it is missing."""
    raw = database.driver(conn)
    ((first, user, exists),) = raw.execute(_SCHEMA, [schema]).fetchall()
    if first is not None:
        return
    if schema is None:
        raise SchemaMismatch("the connection's search_path names no schema that exists: set EVALSTORE_DATABASE_SCHEMA")
    if exists:
        raise SchemaMismatch(f"the role {user} may not use the schema {schema}: let the schema's owner grant USAGE and CREATE")
    try:
        raw.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    except pg.InsufficientPrivilege as error:
        how = sql.SQL("CREATE SCHEMA {} AUTHORIZATION {}").format(sql.Identifier(schema), sql.Identifier(user)).as_string(raw)
        raise SchemaMismatch(f"the role {user} may not create the schema {schema}: let an administrator run {how}") from error


_HOLDERS: Final = """
SELECT waits.wait_event = 'advisory', holder, other.usename, other.application_name,
    extract(epoch FROM now() - other.xact_start)
FROM pg_stat_activity waits CROSS JOIN unnest(pg_blocking_pids(waits.pid)) holder LEFT JOIN pg_stat_activity other
ON other.pid = holder WHERE waits.pid = %s ORDER BY holder
"""


class _Onlooker:
    """Reports which process blocks a migration.

    It needs its own connection: PostgreSQL shows a blocker only during the wait.
    """

    def __init__(self, conn: Connection, tell: Callable[[str], object]) -> None:
        self._conn, self._tell = database.driver(conn), tell
        self._conn.autocommit = True
        self._told: list[int] = []

    @contextmanager
    def looking(self, conn: Connection) -> Iterator[None]:
        """Report blockers until the block ends."""
        done, pid = threading.Event(), database.driver(conn).info.backend_pid
        thread = threading.Thread(target=self._run, args=(done, pid), name="evalstore-onlooker", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(timeout=1)

    def _run(self, done: threading.Event, pid: int) -> None:
        # A failure here only loses a notice. The migration reports its own errors.
        with suppress(DatabaseOutage), database.errors():
            while not done.wait(_LOOK_S):
                holders = self._conn.execute(_HOLDERS, [pid]).fetchall()
                pids = [holder[1] for holder in holders]
                if holders and pids != self._told:
                    self._told = pids
                    self._tell(f"waits for {' and '.join(_holder(*holder) for holder in holders)}")


def _holder(is_migrating: bool, pid: int, user: str | None, program: str | None, seconds: float | None) -> str:
    if pid == 0:
        return "a prepared transaction, which SELECT * FROM pg_prepared_xacts shows"
    since = None if seconds is None else f"in its transaction for {seconds:.0f} s"
    who = ", ".join(filter(None, [program, user and f"user {user}", since]))
    what = "which migrates" if is_migrating else "which uses a table that changes"
    return f"process {pid} of PostgreSQL ({who}), {what}"


def config(conn: Connection) -> "Config":
    """Return Alembic's configuration for a connection."""
    from alembic.config import Config  # noqa: PLC0415 - as above

    alembic = Config()
    alembic.set_main_option("script_location", str(Path(__file__).parent))
    alembic.set_main_option("path_separator", "os")
    alembic.attributes["connection"] = conn
    return alembic


@contextmanager
def _alone(url: str, schema: str | None) -> Iterator[Connection]:
    """Open a connection without a limit on statement time, and close it at the end."""
    engine = database.engine(url, schema=schema, statement_timeout_s=0, lock_timeout_s=_LOCK_S)
    try:
        with engine.connect() as conn:
            yield conn
    finally:
        engine.dispose()


def check(conn: Connection, *, or_newer: bool = False) -> None:
    """Raise SchemaMismatch, with the command to run, unless the database has this release's schema. Changes nothing.

    `or_newer` also accepts the schema of a newer release: a running process goes on while the next release migrates.
    """
    with database.errors(), conn.begin():
        current = _current(conn)
    if or_newer and current is not None and current not in revisions():
        return
    _refuse_newer(current)
    if current != (head := revisions()[-1]):
        state = f"is at revision {current}" if current else f"has no evalstore tables yet{_where(conn)}"
        raise SchemaMismatch(f"the database {state}, this release needs {head}: run `evalstore migrate`")


def _where(conn: Connection) -> str:
    with database.errors(), conn.begin():
        ((schema,),) = database.driver(conn).execute("SELECT current_setting('search_path')").fetchall()
    return f" in the schema {schema}"


def _current(conn: Connection) -> str | None:
    return version.recorded(conn) or version.recognised(conn)


def _refuse_newer(revision: str | None) -> None:
    if revision is not None and revision not in revisions():
        raise SchemaMismatch(f"the database is at revision {revision}, which this release does not know: deploy a newer one")
