"""Classify repeated failures of a transaction: an outage of PostgreSQL, a time limit, or the batch itself."""

from typing import Final, Literal

from evalstore.storage import database
from models.errors import PASSING, DatabaseOutage, DatabaseTimeout
from worker.verified_database import VerifiedDatabase

_FAILURES: Final = 5
_PROBE_S: Final = 5.0

Verdict = Literal["outage", "time limit", "batch"]


class BatchFailureClassifier:
    """Classifies the failures of one batch. Call `begin` before each attempt, and `classify` with its error.

    After a failure that the batch may have caused, a small write is tried. If the write fails too, it is an outage. After
    _FAILURES such failures in a row while the write succeeds, the batch is the cause.

    The batch, an administrator or the network may end a connection without a reason. So each further attempt has an idle
    control connection beside it. If both connections end, the batch is not the cause. A crash of a server process is the
    exception: the server then tells the reason to all connections except the connection whose work crashed. See
    docs/decisions/0021.
    """

    def __init__(self, connections: VerifiedDatabase, watch: database.Watch) -> None:
        self._connections, self._watch = connections, watch
        self.blamed = 0
        self._wants_control = False
        self._control: database.ControlConnection | None = None

    def begin(self) -> None:
        """Prepare for an attempt. Raises DatabaseOutage (retry)."""
        if self._wants_control and self._control is None:
            self._control = database.ControlConnection(self._connections.engine)

    def classify(self, error: Exception) -> Verdict:
        """Return why the last attempt failed."""
        is_time_limit = isinstance(error, DatabaseTimeout)
        if not isinstance(error, DatabaseOutage) or not error.may_be_the_work:
            if self._control is not None:  # Without a control connection, the attempt may not have reached the work.
                self.blamed = 0
            self.close()
            return "time limit" if is_time_limit else "outage"
        self._wants_control = True
        is_well = self._probe_succeeds()
        is_blamed = self._is_blamed(error, is_well=is_well)
        if is_blamed is not None:
            self.blamed = self.blamed + 1 if is_blamed else 0
        if self.blamed >= _FAILURES:
            return "batch"
        return "time limit" if is_time_limit and is_well else "outage"

    def close(self) -> None:
        """Close the control connection."""
        if self._control is not None:
            self._control.close()
            self._control = None

    def _is_blamed(self, error: DatabaseOutage, *, is_well: bool) -> bool | None:
        """Return whether a failure speaks against the batch, or None if that is unknown."""
        if not error.is_lost:
            return is_well
        if self._control is None:
            return None
        fate = self._control.fate(self._watch, _PROBE_S)
        if fate != "alive":
            self.close()
        return fate == "crash" or (fate == "alive" and is_well)

    def _probe_succeeds(self) -> bool:
        try:
            self._connections.engine.dispose()  # idle connections may have ended with the one that failed
            with self._connections.connect(_PROBE_S, self._watch) as conn:
                database.probe(conn)
        except PASSING:
            return False
        return True
