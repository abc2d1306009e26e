"""Waiting for PostgreSQL between two attempts to store a batch."""

import random
import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from models.logs import EventLogger
from worker.failure_classifier import Verdict
from worker.in_flight import InFlight
from worker.metrics import WorkerMetrics

log = EventLogger("evalstore.worker")
_LONGEST_WAIT_S: Final = 4.0


class OutageWait:
    """The waits of one batch. From the first wait to the end of the block, this process counts as waiting.

    Log and metrics show only real outages: a time limit that this process sets is none.
    """

    def __init__(self, in_flight: InFlight, metrics: WorkerMetrics, events: int) -> None:
        self._in_flight, self._outages, self._events = in_flight, metrics.outages, events
        self._failures = 0
        self._logged: set[Verdict] = set()
        self._until_end = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._until_end.close()
        if self._failures:
            self._outages.back("postgresql", threading.current_thread().name)

    def wait(self, error: Exception, verdict: Verdict) -> bool:
        """Wait after a failure, longer each time. Return False once the process is stopping."""
        self._failures += 1
        if self._failures == 1:
            self._until_end.enter_context(self._in_flight.waiting())
        if verdict == "outage":
            self._outages.away("postgresql", threading.current_thread().name)
        else:
            self._outages.back("postgresql", threading.current_thread().name)
        self._log(error, verdict)
        longest_s = min(_LONGEST_WAIT_S, 0.05 * 2 ** min(self._failures, 10))
        return self._in_flight.sleep_unless_stopping(longest_s * random.uniform(0.5, 1))  # noqa: S311

    def _log(self, error: Exception, verdict: Verdict) -> None:
        """Log each verdict once."""
        # A single failure is often a connection that ended while it was idle.
        if verdict in self._logged or (verdict == "outage" and self._failures < 2):
            return
        self._logged.add(verdict)
        if verdict == "outage":
            log.warning("outage", kind=type(error).__name__, events=self._events, error=error)
        else:
            log.warning("time_limit", events=self._events, error=error)
