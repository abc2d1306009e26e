"""A worker's background thread: relays confirmations and moves dead letters as soon as there are any."""

import threading
from collections.abc import Callable
from typing import Any, Final

import dramatiq
from sqlalchemy import Connection

from models.errors import PASSING, Outage, SchemaMismatch
from models.logs import EventLogger
from tasks.broker import SendingBroker
from worker import confirmation_relay, dead_letter_mover, tracing
from worker.handler import Handler
from worker.metrics import WORK_S, WorkerMetrics
from worker.scripts import Scripts
from worker.time_budget import BUDGET_S, time_budget
from worker.verified_database import VerifiedDatabase

log = EventLogger("evalstore.worker")

# Look also without `wake`: another process may have died between its commit and the relay.
_TICK_S: Final = 5.0
_LONGEST_S: Final = 15.0


class Background(threading.Thread):
    """Call `wake` when there is something to do. Each duty works for `turn_s` at a time."""

    def __init__(
        self,
        connections: VerifiedDatabase,
        broker: SendingBroker,
        scripts: Scripts,
        metrics: WorkerMetrics,
        *,
        turn_s: float = BUDGET_S,
    ) -> None:
        super().__init__(name="evalstore-background", daemon=True)
        self._connections, self._broker, self._scripts, self._metrics = connections, broker, scripts, metrics
        self._turn_s = turn_s
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._failing: set[str] = set()

    def wake(self) -> None:
        """Look for work now."""
        self._wanted.set()

    def run(self) -> None:
        counters = self._metrics.counters
        counters.watch_thread(self.name)
        counters.set_deadline(WORK_S)
        try:
            with self._connections.connect(_LONGEST_S):
                pass  # Connecting at the start logs why this worker cannot store.
        except SchemaMismatch as error:
            log.critical("schema_mismatch", error=error)
        except Outage as error:
            log.warning("starting_without_database", error=error)
        while not self._stopping.is_set():
            self._wanted.wait(timeout=_TICK_S)
            self._wanted.clear()
            for state, count in self._connections.connection_counts().items():
                counters.set("evalstore_database_connections", state, to=count)
            counters.set_deadline(WORK_S)
            self._try("confirmations", self._relay)
            counters.set_deadline(WORK_S)
            self._try("dead letters", self._move)

    def _relay(self, conn: Connection, go_on: Callable[[], bool]) -> None:
        confirmation_relay.relay(conn, self._broker.names, self._scripts, self._metrics.counters, go_on=go_on)

    def _move(self, conn: Connection, go_on: Callable[[], bool]) -> None:
        dead_letter_mover.move(conn, self._broker, self._scripts, go_on=go_on)

    def _try(self, what: str, work: Callable[[Connection, Callable[[], bool]], None]) -> None:
        """Do one duty. Log any failure: the next turn tries again, and other work continues."""
        go_on = time_budget(self._turn_s)
        try:
            with self._connections.connect(_LONGEST_S) as conn:
                work(conn, go_on)
        except Exception as error:
            if what not in self._failing:
                known = isinstance(error, PASSING)
                log.warning("background_task_failed", what=what, error=error, exc_info=None if known else error)
            self._failing.add(what)
            self._stopping.wait(timeout=1)
        else:
            self._failing.discard(what)
            if not go_on():  # The duty used its whole turn, so work may remain.
                self.wake()

    def stop(self) -> None:
        """Do each duty once more, and wait 1 s for the end. Other processes do the remaining work."""
        self._stopping.set()
        self._wanted.set()
        self.join(timeout=1)


class BackgroundMiddleware(dramatiq.Middleware):
    """Runs the thread that `make()` returns beside each worker. Tells `handler` when the worker stops."""

    def __init__(self, handler: Handler, make: Callable[[], Background]) -> None:
        self._handler, self._make = handler, make
        self.thread: Background | None = None

    def before_worker_boot(self, broker: Any, worker: dramatiq.Worker) -> None:  # noqa: ARG002 - Dramatiq's signature
        tracing.traces()  # Loading OpenTelemetry takes 0.2 s. Load it before the first events arrive.

    def after_ack(self, broker: Any, message: Any) -> None:  # noqa: ARG002 - Dramatiq's signature
        if self.thread:
            self.thread.wake()

    after_nack = after_ack

    def after_worker_boot(self, broker: Any, worker: dramatiq.Worker) -> None:  # noqa: ARG002 - Dramatiq's signature
        self.thread = self._make()
        self.thread.start()

    def before_worker_shutdown(self, broker: Any, worker: dramatiq.Worker) -> None:  # noqa: ARG002 - Dramatiq's signature
        self._handler.stop_soon()

    def after_worker_shutdown(self, broker: Any, worker: dramatiq.Worker) -> None:  # noqa: ARG002 - Dramatiq's signature
        if self.thread:
            self.thread.stop()
            self.thread = None
        tracing.flush()
