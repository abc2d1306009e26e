"""The endpoints for metrics and health: one for all processes of a worker, one for a scheduler."""

import gc
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from typing import Any, Final

import dramatiq

from evalstore.telemetry import process_registry
from evalstore.telemetry.counters import Counters, Schema, counted_by
from models.logs import EventLogger
from models.settings import Settings
from worker import metrics

log = EventLogger("evalstore.worker")

_BEAT_S: Final = 5.0
_AGAIN_S: Final = 1.0
# periodiq wakes each minute. A longer pause means that periodiq is stuck.
_TICK_S: Final = 60.0 + 25.0


class MetricsMiddleware(dramatiq.Middleware):
    """Registers each process of Dramatiq's command line, and starts the endpoint."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def after_process_boot(self, broker: Any) -> None:
        group = _join("worker", broker.metrics.counters, self._settings)
        if group and self._settings.metrics_port:
            _serve_beside(group, self._settings)


def _serve_beside(group: process_registry.Group, settings: Settings) -> None:
    """Serve from a forked process, so that scrapes do not delay workers. The first process of a group forks it.

    Fork before threads and connections exist. The modules are loaded then, which saves most of a second. The forked process
    forks the serving process and restarts it: the worker has threads later and cannot fork safely.
    """
    try:
        os.close(os.open(group.folder / "endpoint", os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return
    until, here = os.pipe()  # The read end sees EOF when this process ends, because the process never closes `here`.
    gc.freeze()
    if os.fork():
        os.close(until)
        return
    status = 1
    try:
        os.close(here)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # Dramatiq's handlers are for a worker
        while child := os.fork():
            if (ended := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) == 0:
                break
            log.warning("metrics_endpoint_ended", status=ended)
            if select.select([until], [], [], _AGAIN_S)[0]:
                break
        else:
            _serve(group, settings, until)
        status = 0
    except Exception as error:
        log.error("unexpected_error", exc_info=error)  # noqa: TRY400 - its level is on the list
    finally:
        os._exit(status)


def _serve(group: process_registry.Group, settings: Settings, until: int) -> None:
    from evalstore.telemetry import exposition  # noqa: PLC0415 - workers themselves do without

    exposition.start("worker", group, metrics.LAYOUT, settings, settings.metrics_port)
    parent = multiprocessing.parent_process()
    master = parent.pid if parent and parent.pid else os.getppid()
    began = process_registry.start_ticks(master)
    while process_registry.start_ticks(master) == began:  # a killed master's successor needs the port
        if select.select([until], [], [], 0.5)[0]:
            return


class Scheduler:
    """The liveness and the metrics of a scheduler. It also serves the metrics of the servers while no worker runs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ledger: Counters | None = None

    def tick(self) -> None:
        """Report progress of periodiq's loop, at each job that is due."""
        if self._ledger is None:
            # The alarm that wakes periodiq must reach the main thread. After SIGCONT the kernel may deliver it to any thread
            # that does not block it. New threads inherit this mask.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                self._ledger = self._begin()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._ledger.set_deadline(_TICK_S)

    def _begin(self) -> Counters:
        # As PID 1 of a container, a process ignores signals that it does not handle; periodiq does not handle SIGTERM.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        layout = Schema(counted_by("scheduler"), {})
        ledger = Counters(layout)
        group = _join("scheduler", ledger, self._settings)
        ledger.watch_thread("schedule")
        threading.Thread(target=self._beat, args=(ledger,), name="evalstore-beat", daemon=True).start()
        if group and self._settings.scheduler_metrics_port:
            from evalstore.telemetry import exposition  # noqa: PLC0415 - workers do without

            exposition.start("scheduler", group, layout, self._settings, self._settings.scheduler_metrics_port)
        return ledger

    @staticmethod
    def _beat(ledger: Counters) -> None:
        """Detect a frozen process before the next tick is due."""
        ledger.watch_thread("beat")
        while True:
            ledger.set_deadline(metrics.LOOP_S)
            time.sleep(_BEAT_S)


def _join(role: process_registry.Role, ledger: Counters, settings: Settings) -> process_registry.Group | None:
    try:
        return process_registry.join(role, ledger, settings.runtime_dir)
    except process_registry.RegistryUnavailable as error:
        log.warning("runtime_dir_unusable", error=error)
        return None
