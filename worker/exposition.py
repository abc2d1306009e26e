"""The one endpoint of a worker and all its processes, and of a scheduler: metrics, and health."""

import logging
import os
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
            layout = Layout(counted_by("scheduler"), {})
            self._ledger = Ledger(layout)
            group = _join("scheduler", self._ledger)
            self._ledger.watch_thread("schedule")
            threading.Thread(target=self._beat, args=(self._ledger,), name="evalstore-beat", daemon=True).start()
            if group and settings().scheduler_metrics_port:
                exposition.start("scheduler", group, layout, settings().scheduler_metrics_port)
        self._ledger.due(_TICK_S)

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
