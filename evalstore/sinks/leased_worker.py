"""A thread of the sinks process that works under a lease, with a connection of its own."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar

from sqlalchemy import Connection, Engine

from evalstore.storage import sink_cursors
from evalstore.storage.database import Watch
from evalstore.storage.sink_cursors import Lease, LeaseLost
from models.errors import Outage
from models.logs import EventLogger

log = EventLogger("evalstore.sinks")

_T = TypeVar("_T")
# How long a worker waits after a failure, at first and at most.
BACKOFF_S: Final = (0.2, 5.0)
_CLAIM_S: Final = 1.0
_DATABASE_S: Final = 30.0


class Turns(Protocol):
    """The work under one lease."""

    def take_one(self) -> None:
        """Do the next piece, or wait for one. Raises LeaseLost, DatabaseOutage."""

    def close(self) -> None:
        """Give up what is open."""


class LeasedWorker(threading.Thread, ABC):
    """Claims a row of the table `sinks`, works on it until the lease is lost, and begins again, until `stopping`.

    `sink` is the name for logs. After `timeout_s` of one call the worker counts as hung.
    """

    def __init__(self, sink: str, row: str, timeout_s: float, engine: Engine, owner: str, stopping: threading.Event) -> None:
        super().__init__(name=f"sink {row}", daemon=True)
        self.timeout_s = timeout_s
        self._sink, self._row = sink, row
        self.lease: Lease | None = None
        self.called_at: float | None = None  # since when the sink has been at work on what it was given
        self._engine, self._owner, self._stopping = engine, owner, stopping
        self._watch = Watch()
        self._created = False

    def run(self) -> None:
        wait_s, was_away = BACKOFF_S[0], False
        while not self._stopping.is_set():
            try:
                with self._engine.connect() as conn:
                    self._claim_and_work(conn)
                wait_s, was_away = BACKOFF_S[0], False
            except LeaseLost as error:
                log.info("sink_lease_lost", error=error)
            except Outage as error:
                if not was_away:
                    log.warning("sink_waits", sink=self._sink, error=error)
                self._stopping.wait(wait_s)
                wait_s, was_away = min(2 * wait_s, BACKOFF_S[1]), True
            except Exception as error:
                # A defect that one sink's events bring out must not end the process, and with it the other sinks.
                log.critical("sink_defect", sink=self._sink, error=error, exc_info=True)
                self._stopping.wait(BACKOFF_S[1])

    def _claim_and_work(self, conn: Connection) -> None:
        name = self._row
        if not self._created:
            if not self.create(conn):
                self._stopping.wait(_CLAIM_S)
                return
            self._created = True
        lease = self.database(conn, sink_cursors.claim, name, self._owner)
        if lease is None:
            self._stopping.wait(_CLAIM_S)
            return
        log.info("sink_claimed", sink=name, position=lease.cursor.place.id)
        self.lease = lease
        turns = self.open_turns(conn, lease)
        try:
            while not self._stopping.is_set():
                turns.take_one()
        finally:
            self.lease = None
            turns.close()
            with suppress(Outage):
                self.database(conn, sink_cursors.release, lease)

    @abstractmethod
    def create(self, conn: Connection) -> bool:
        """Make sure that the row exists. Return False to try again later."""

    @abstractmethod
    def open_turns(self, conn: Connection, lease: Lease) -> Turns:
        """Return the work under a lease."""

    def database(self, conn: Connection, work: Callable[..., _T], *arguments: Any) -> _T:
        """Call `work` with a connection that breaks where the server does not answer."""
        with self._watch.bounded(conn, _DATABASE_S):
            return work(conn, *arguments)

    def wait(self, seconds: float) -> None:
        """Wait, unless the process is to stop."""
        self._stopping.wait(seconds)
