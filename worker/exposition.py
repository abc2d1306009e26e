"""The one endpoint of a worker and all its processes, and of a scheduler: metrics, and health."""

import logging
import os
import signal
import threading
import time
from typing import Any, Final

import dramatiq

from models.settings import settings
from tasks import exposition, groups, logs
from tasks.ledger import Layout, Ledger, counted_by
from worker import metrics

log = logging.getLogger("evalstore.worker")

_BEAT_S: Final = 5.0
# periodiq wakes each minute; it is stuck when it is late by this.
_TICK_S: Final = 60.0 + 25.0


def serve() -> int:
    """What Dramatiq's master runs in a process of its own, so that workers are not kept waiting by whoever asks."""
    logs.take_over()
    master = os.getppid()
    try:
        group = groups.own("worker")
    except groups.Unshared as error:
        log.warning("no metrics: %s", error)
        return 0
    exposition.start("worker", group, metrics.LAYOUT, settings().metrics_port)
    while os.getppid() == master:  # else it was killed, and the next one wants the port
        time.sleep(0.5)
    return 0


class Shared(dramatiq.Middleware):
    """Keeps what a worker's processes count where the endpoint finds it. Of processes of Dramatiq's command line alone."""

    @property
    def forks(self) -> list[Any]:
        return [serve] if settings().metrics_port else []

    def after_process_boot(self, broker: Any) -> None:
        _join("worker", broker.metrics.ledger)


class Scheduler:
    """What a scheduler shows: that it lives, and how things stand, also while no worker runs."""

    def __init__(self) -> None:
        self._ledger: Ledger | None = None

    def tick(self) -> None:
        """periodiq's loop has come to a job that is due."""
        if self._ledger is None:
            # The alarm that wakes periodiq must reach its own thread: another one that is given it wakes nobody, and one may be
            # given it when the process goes on after it was stopped. Threads inherit what is blocked here.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                self._ledger = self._begin()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._ledger.due(_TICK_S)

    def _begin(self) -> Ledger:
        layout = Layout(counted_by("scheduler"), {})
        ledger = Ledger(layout)
        group = _join("scheduler", ledger)
        ledger.watch_thread("schedule")
        threading.Thread(target=self._beat, args=(ledger,), name="evalstore-beat", daemon=True).start()
        if group and settings().scheduler_metrics_port:
            exposition.start("scheduler", group, layout, settings().scheduler_metrics_port)
        return ledger

    @staticmethod
    def _beat(ledger: Ledger) -> None:
        """Shows before the next tick is due that the process was frozen."""
        ledger.watch_thread("beat")
        while True:
            ledger.due(metrics.LOOP_S)
            time.sleep(_BEAT_S)


def _join(role: groups.Role, ledger: Ledger) -> groups.Group | None:
    try:
        return groups.join(role, ledger)
    except groups.Unshared as error:
        log.warning("what this process counts is not shown, nor that it lives: %s", error)
        return None
