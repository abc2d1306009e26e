"""What a worker process does beside storing: it relays confirmations and moves dead letters, as soon as there are any."""

import threading
from collections.abc import Callable
from typing import Any, Final

import dramatiq

from evalstore.storage.database import Watch
from models.errors import PASSING, Outage, SchemaMismatch
from models.logs import EventLogger
from worker import confirmation_relay, dead_letter_mover, tracing
from worker.broker import BUDGET_S, Broker, time_budget
from worker.handler import Handler, engine
from worker.metrics import WORK_S

log = EventLogger("evalstore.worker")

# Also without being told: another process may have died between its commit and what follows it.
_TICK_S: Final = 5.0
_LONGEST_S: Final = 15.0


class Background(threading.Thread):
    """Call `wake` when there is something to do. Each duty has a turn of `turn_s` at a time."""

    def __init__(self, broker: Broker, *, turn_s: float = BUDGET_S) -> None:
        super().__init__(name="evalstore-background", daemon=True)
        self._broker, self._turn_s = broker, turn_s
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._failing: set[str] = set()
        self._watch = Watch()

    def wake(self) -> None:
        """There is something to relay or to move."""
        self._wanted.set()

    def run(self) -> None:
        ledger = self._broker.metrics.counters
        ledger.watch_thread(self.name)
        ledger.set_deadline(WORK_S)
        try:
            engine()
        except SchemaMismatch as error:
            log.critical("schema_mismatch", error=error)
        except Outage as error:
            log.warning("starting_without_database", error=error)
        while not self._stopping.is_set():
            self._wanted.wait(timeout=_TICK_S)
            self._wanted.clear()
            self._count_connections()
            ledger.set_deadline(WORK_S)
            self._try("confirmations", confirmation_relay.relay)
            ledger.set_deadline(WORK_S)
            self._try("dead letters", dead_letter_mover.move)

    def _count_connections(self) -> None:
        if engine.cache_info().currsize:  # else it would connect
            pool: Any = engine().pool
            for state, count in (("used", pool.checkedout()), ("idle", pool.checkedin())):
                self._broker.metrics.counters.set("evalstore_database_connections", state, to=count)

    def _try(self, what: str, work: Callable[..., int]) -> None:
        """Do one of the duties. Whatever goes wrong with it, it is tried again, and neither the other nor storing suffers."""
        goes_on = time_budget(self._turn_s)
        try:
            with engine().connect() as conn, self._watch.bounded(conn, _LONGEST_S):
                work(conn, self._broker, go_on=goes_on)
        except Exception as error:
            if what not in self._failing:
                known = isinstance(error, PASSING)
                log.warning("background_task_failed", what=what, error=error, exc_info=None if known else error)
            self._failing.add(what)
            self._stopping.wait(timeout=1)
        else:
            self._failing.discard(what)
            if not goes_on():  # it took all of its turn, and may have more to do
                self.wake()

    def stop(self) -> None:
        """Once more, and no longer: what cannot be done now is left to others."""
        self._stopping.set()
        self._wanted.set()
        self.join(timeout=1)


class BackgroundMiddleware(dramatiq.Middleware):
    """Runs a Background beside each worker, and lets `store` know when that is to stop."""

    def __init__(self, store: Handler) -> None:
        self._store = store
        self.thread: Background | None = None

    def before_worker_boot(self, broker: Any, worker: dramatiq.Worker) -> None:  # noqa: ARG002 - Dramatiq's signature
        tracing.traces()  # loading OpenTelemetry takes a fifth of a second, which the first events would wait for

    def after_ack(self, broker: Any, message: Any) -> None:  # noqa: ARG002 - Dramatiq's signature
        if self.thread:
            self.thread.wake()

    after_nack = after_ack

    def after_worker_boot(self, broker: Any, worker: dramatiq.Worker) -> None:  # noqa: ARG002 - Dramatiq's signature
        self.thread = Background(broker)
        self.thread.start()

    def before_worker_shutdown(self, broker: Any, worker: dramatiq.Worker) -> None:  # noqa: ARG002 - Dramatiq's signature
        self._store.stop_soon()

    def after_worker_shutdown(self, broker: Any, worker: dramatiq.Worker) -> None:  # noqa: ARG002 - Dramatiq's signature
        if self.thread:
            self.thread.stop()
            self.thread = None
        tracing.flush()
