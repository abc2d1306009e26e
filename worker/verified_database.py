"""A worker process's connections to PostgreSQL."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from sqlalchemy import Connection, Engine

from evalstore.storage import database, durability, migrations
from models.logs import EventLogger
from models.settings import Settings

log = EventLogger("evalstore.worker")


class VerifiedDatabase:
    """Connections to a database whose schema fits this release. Any thread may use it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._watch = database.Watch()
        self._is_verified = False

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return an instance for the settings. It connects at first use."""
        return cls(database.connect(settings, idle_timeout_s=15, pre_ping=False))

    @contextmanager
    def connect(self, limit_s: float, watch: database.Watch | None = None) -> Iterator[Connection]:
        """Open a connection, and break it when the block takes longer than `limit_s`. `watch` may break it sooner.

        The first call checks the schema. Raises DatabaseOutage, SchemaMismatch (retry).
        """
        with database.errors(), self.engine.connect() as conn, (watch or self._watch).bounded(conn, limit_s):
            if not self._is_verified:
                self._verify(conn)
            yield conn

    def renew(self, limit_s: float) -> None:
        """Set the time limit of the calling thread's block to `limit_s` from now."""
        self._watch.renew(limit_s)

    def connection_counts(self) -> dict[str, int]:
        """Return how many connections the pool has, by state: used, idle."""
        pool: Any = self.engine.pool
        return {"used": pool.checkedout(), "idle": pool.checkedin()}

    def _verify(self, conn: Connection) -> None:
        migrations.check(conn)
        for doubt in durability.doubts(conn):
            log.warning("postgresql_config_warning", doubt=doubt)
        self._is_verified = True
