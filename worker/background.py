"""What a worker process does beside storing: it relays confirmations and moves dead letters, as soon as there are any."""

import logging
import threading
import time
from typing import Any, Final

import dramatiq

from models.errors import Outage, SchemaMismatch
from worker import confirmations, dead_letters
from worker.broker import Broker
from worker.evaluations import Store, engine

log = logging.getLogger("evalstore.worker")

# Also without being told: another process may have died between its commit and what follows it.
_TICK_S: Final = 5.0


class Background(threading.Thread):
    """Call `wake` when there is something to do."""

    def __init__(self, broker: Broker) -> None:
        super().__init__(name="evalstore-background", daemon=True)
        self._broker = broker
        self._wanted = threading.Event()
        self._stopped = False
        self._failing = False

    def wake(self) -> None:
        """There is something to relay or to move."""
        self._wanted.set()

    def run(self) -> None:
        while not self._stopped:
            self._wanted.wait(timeout=_TICK_S)
            self._wanted.clear()
            try:
                self.run_once()
                self._failing = False
            except (Outage, SchemaMismatch) as error:
                if not self._failing:
                    log.warning("%s, confirmations and dead letters wait until it is over: %s", type(error).__name__, error)
                self._failing = True
                time.sleep(1)

    def run_once(self) -> None:
        """Relay and move all there is. Raises Outage (retry)."""
        with engine().connect() as conn:
            confirmations.relay(conn, self._broker)
            dead_letters.move(conn, self._broker)

    def stop(self) -> None:
        """Once more, and no longer: what cannot be done now is left to others."""
        self._stopped = True
        self._wanted.set()
        self.join(timeout=5)


class Beside(dramatiq.Middleware):
    """Runs a Background beside each worker, and lets `store` know when that is to stop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.thread: Background | None = None

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
