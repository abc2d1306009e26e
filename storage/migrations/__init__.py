"""The schema's versions, and the two things done with them: bring a database up to date, and check that it is.

A migration must leave the database usable by workers of the release before it: they run on while it is applied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from models.errors import SchemaMismatch
from storage import database

# Any constant will do, as long as every evalstore that ever migrates this database uses the same.
_ADVISORY_LOCK = 0x65766173


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(url: str) -> tuple[str | None, str]:
    """Bring the database at `url` to this release's schema; returns the revisions before and after.

    One transaction: it is applied whole or not at all. Safe to call from several processes at once; the later ones
    wait and find nothing to do. Raises DatabaseOutage (retry), SchemaMismatch where a newer release has been here, or
    where the database cannot hold all text.
    """
    with _alone(url) as conn, database.errors(), conn.begin():
        conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        if (encoding := conn.execute(text("SHOW server_encoding")).scalar_one()) != "UTF8":
            how = "CREATE DATABASE evalstore TEMPLATE template0 ENCODING 'UTF8'"
            raise SchemaMismatch(f"the database's encoding is {encoding}, which cannot hold all text: {how}")
        before = MigrationContext.configure(conn).get_current_revision()
        _refuse_newer(before)
        config = _config()
        config.attributes["connection"] = conn
        command.upgrade(config, "head")
        return before, _head()


@contextmanager
def _alone(url: str) -> Iterator[Connection]:
    """A connection that waits as long as it takes, and is closed at the end."""
    engine = database.engine(url, statement_timeout_s=0, lock_timeout_s=0)
    try:
        with engine.connect() as conn:
            yield conn
    finally:
        engine.dispose()


def check(conn: Connection) -> None:
    """Raise SchemaMismatch, saying what to do, unless the database has this release's schema. Changes nothing."""
    with database.errors():
        current = MigrationContext.configure(conn).get_current_revision()
        conn.rollback()
    _refuse_newer(current)
    if current != _head():
        found = f"is at revision {current}" if current else "has no evalstore tables yet"
        raise SchemaMismatch(f"the database {found}, this release needs {_head()}: run `evalstore migrate`")


def _head() -> str:
    head = ScriptDirectory.from_config(_config()).get_current_head()
    if head is None:
        raise SchemaMismatch("this installation of evalstore holds no migrations: reinstall it")
    return head


def _refuse_newer(revision: str | None) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if revision is not None and revision not in known:
        raise SchemaMismatch(f"the database is at revision {revision}, which this release does not know: deploy a newer one")
