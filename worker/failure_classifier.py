"""Whether work that fails again and again brings its failures about itself, or PostgreSQL is away."""

from collections.abc import Callable
from typing import Final

from sqlalchemy import Engine

from evalstore.storage import database
from models.errors import PASSING, DatabaseOutage

_ENOUGH: Final = 5
_PROBE_S: Final = 5.0


class BatchFailureClassifier:
    """What speaks against the work of one thread, from attempt to attempt. `begin` each, and give `note` how it failed.

    Right after a failure that the work may have caused, a small write is tried: where it fails as well, it is an outage. A
    connection that ends without a word may have been ended by the work, by an administrator, or by the network. So a witness
    stands beside each further attempt, a connection that does nothing: if that ends as well, the work is acquitted, unless it
    ended because a server process crashed.
    """

    def __init__(self, engine: Callable[[], Engine], watch: database.Watch) -> None:
        self._engine, self._watch = engine, watch
        self.blamed = 0
        self._wants_control = False
        self._control: database.ControlConnection | None = None

    def begin(self) -> None:
        """An attempt follows. Raises DatabaseOutage."""
        if self._wants_control and self._control is None:
            self._control = database.ControlConnection(self._engine())

    def record_failure(self, error: Exception) -> bool:
        """An attempt failed; whether it did so often enough for the work to be what causes it."""
        if not isinstance(error, DatabaseOutage) or not error.may_be_the_work:
            if self._control is not None:  # without one it may not have got as far as the work
                self.blamed = 0
            self.close()
            return False
        self._wants_control = True
        verdict = self._is_caused_by_batch(error)
        if verdict is not None:
            self.blamed = self.blamed + 1 if verdict else 0
        return self.blamed >= _ENOUGH

    def close(self) -> None:
        """Leave no connection behind."""
        if self._control is not None:
            self._control.close()
            self._control = None

    def _is_caused_by_batch(self, error: DatabaseOutage) -> bool | None:
        """None where it cannot be told."""
        is_well = self._probe_succeeds()
        if not error.is_lost:
            return is_well
        if self._control is None:
            return None
        fate = self._control.fate(self._watch, _PROBE_S)
        if fate != "alive":
            self.close()
        return fate == "crash" or (fate == "alive" and is_well)

    def _probe_succeeds(self) -> bool:
        """Whether a small write goes through."""
        try:
            self._engine().dispose()  # what is left in the pool may have broken with it
            with database.errors(), self._engine().connect() as conn, self._watch.bounded(conn, _PROBE_S):
                database.probe(conn)
        except PASSING:
            return False
        return True
