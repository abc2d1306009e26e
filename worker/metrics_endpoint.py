"""The one endpoint of a worker and all its processes, and of a scheduler: metrics, and health."""

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
from models.settings import settings
from worker import metrics

log = EventLogger("evalstore.worker")

_BEAT_S: Final = 5.0
_AGAIN_S: Final = 1.0
# periodiq wakes each minute; it is stuck when it is late by this.
_TICK_S: Final = 60.0 + 25.0


class MetricsMiddleware(dramatiq.Middleware):
    """Keeps what a worker's processes count where the endpoint finds it. Of processes of Dramatiq's command line alone."""

    def after_process_boot(self, broker: Any) -> None:
        group = _join("worker", broker.metrics.counters)
        if group and settings().metrics_port:
            _serve_beside(group)


def _serve_beside(group: process_registry.Group) -> None:
    """Answer from a process of its own, so that workers are not kept waiting by whoever asks. A group's first process forks it.

    That is done before there are threads and connections. All it needs is loaded by then, which would take it most of a second.
    What is forked here only forks again, whenever the process that answers has ended: the worker's own could not, with threads.
    """
    try:
        os.close(os.open(group.folder / "endpoint", os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return
    until, here = os.pipe()  # it ends with this process, which never closes `here`
    gc.freeze()
    if os.fork():
        os.close(until)
        return
    status = 1
    try:
        os.close(here)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # what Dramatiq does then is for a worker
        while child := os.fork():
            if (ended := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) == 0:
                break
            log.warning("metrics_endpoint_ended", status=ended)
            if select.select([until], [], [], _AGAIN_S)[0]:
                break
        else:
            _serve(group, until)
        status = 0
    except Exception as error:
        log.error("unexpected_error", exc_info=error)  # noqa: TRY400 - its level is on the list
    finally:
        os._exit(status)


def _serve(group: process_registry.Group, until: int) -> None:
    from evalstore.telemetry import exposition  # noqa: PLC0415 - workers themselves do without

    exposition.start("worker", group, metrics.LAYOUT, settings().metrics_port)
    parent = multiprocessing.parent_process()
    master = parent.pid if parent and parent.pid else os.getppid()
    began = process_registry.start_ticks(master)
    while process_registry.start_ticks(master) == began:  # else it was killed, and the next one wants the port
        if select.select([until], [], [], 0.5)[0]:
            return


class Scheduler:
    """What a scheduler shows: that it lives, and how things stand, also while no worker runs."""

    def __init__(self) -> None:
        self._ledger: Counters | None = None

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
        self._ledger.set_deadline(_TICK_S)

    def _begin(self) -> Counters:
        # A container's first process is not ended by a signal that it does not handle, and periodiq handles none but its alarm.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        layout = Schema(counted_by("scheduler"), {})
        ledger = Counters(layout)
        group = _join("scheduler", ledger)
        ledger.watch_thread("schedule")
        threading.Thread(target=self._beat, args=(ledger,), name="evalstore-beat", daemon=True).start()
        if group and settings().scheduler_metrics_port:
            from evalstore.telemetry import exposition  # noqa: PLC0415 - workers do without

            exposition.start("scheduler", group, layout, settings().scheduler_metrics_port)
        return ledger

    @staticmethod
    def _beat(ledger: Counters) -> None:
        """Shows before the next tick is due that the process was frozen."""
        ledger.watch_thread("beat")
        while True:
            ledger.set_deadline(metrics.LOOP_S)
            time.sleep(_BEAT_S)


def _join(role: process_registry.Role, ledger: Counters) -> process_registry.Group | None:
    try:
        return process_registry.join(role, ledger)
    except process_registry.RegistryUnavailable as error:
        log.warning("runtime_dir_unusable", error=error)
        return None
