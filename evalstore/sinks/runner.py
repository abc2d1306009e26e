"""`evalstore sinks run`: a thread for each sink, one for statistics, and one that keeps their leases."""

import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final
from uuid import uuid4

from sqlalchemy import Engine

from evalstore.sinks import config
from evalstore.sinks.config import SinkConfig
from evalstore.sinks.leased_worker import LeasedWorker
from evalstore.sinks.statistics import StatisticsWorker
from evalstore.sinks.worker import SinkWorker
from evalstore.startup import load_or_exit
from evalstore.storage import database, rollups, sink_cursors
from evalstore.storage.sink_ranges import Range
from evalstore.telemetry import exposition, log_setup
from evalstore.telemetry.counters import Counters, Schema, counted_by
from models.errors import InvalidSettings, Outage
from models.logs import EventLogger
from models.settings import Settings

log = EventLogger("evalstore.sinks")

_KEEP_S: Final = sink_cursors.LEASE_S / 3
_LOOP_S: Final = 60.0
# A stop waits so long for sinks to confirm what they were given.
STOP_S: Final = 6.0


class Runner:
    """Works on sinks until `stop`."""

    def __init__(self, sinks: Sequence[SinkConfig], engine: Engine) -> None:
        owner = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        self._stopping = threading.Event()
        self._engine = engine
        ranges = [
            (sink, Range(sink.name, number, sink.options.hash_ranges))
            for sink in sinks
            for number in range(sink.options.hash_ranges)
        ]
        self._workers: list[LeasedWorker] = [
            StatisticsWorker(engine, owner, self._stopping),
            *(SinkWorker(sink, range_, engine, owner, self._stopping) for sink, range_ in ranges),
        ]
        self._hung = set[str]()

    def run(self, counters: Counters) -> None:
        """Work until `stop` was called; then wait for what is under way, for STOP_S at most."""
        for worker in self._workers:
            worker.start()
        counters.watch_thread("leases")
        while not self._stopping.wait(_KEEP_S):
            counters.set_deadline(_LOOP_S)
            for worker in self._workers:
                self._keep(worker)
        give_up = time.monotonic() + STOP_S
        for worker in self._workers:
            worker.join(timeout=max(0.0, give_up - time.monotonic()))

    def stop(self) -> None:
        """Take no more. Safe in a signal handler."""
        self._stopping.set()

    def _keep(self, worker: LeasedWorker) -> None:
        """Renew the lease, unless the sink has not come back for too long: then another process may try."""
        lease, called_at = worker.lease, worker.called_at
        if lease is None:
            return
        seconds = time.monotonic() - called_at if called_at is not None else 0.0
        is_hung = seconds > worker.timeout_s
        with suppress(Outage), self._engine.connect() as conn:
            if not is_hung:
                self._hung.discard(lease.name)
                sink_cursors.renew(conn, lease)
            elif lease.name not in self._hung:
                self._hung.add(lease.name)
                log.error("sink_hangs", sink=lease.name, seconds=seconds)
                why = f"the sink has not come back for {seconds:.0f} s: see what it waits for, and restart this process"
                sink_cursors.note_failure(conn, lease, why)


def main() -> None:
    """Run until SIGTERM or SIGINT. Exit status 2 where settings or the sinks file are wrong."""
    settings = load_or_exit()
    sinks = _load_or_exit(settings)
    log_setup.set_up()
    rest_the_collector()
    engine = database.connect(settings, pool_size=sum(sink.options.hash_ranges for sink in sinks) + 2)
    runner = Runner(sinks, engine)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: runner.stop())
    counters = Counters(Schema(counted_by("sinks"), {}))
    exposition.publish("sinks", counters, settings, settings.sinks_metrics_port, log)
    log.info("sinks_started", sinks=", ".join([rollups.NAME, *(sink.name for sink in sinks)]))
    runner.run(counters)
    sys.stdout.flush()
    os._exit(0)  # a sink that hangs, in a thread or in a library of its own, holds up the end no longer


def rest_the_collector() -> None:
    """Have garbage collected less often: events create no reference cycles, and a batch has many objects."""
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)


def _load_or_exit(settings: Settings) -> list[SinkConfig]:
    try:
        return config.load_all(settings)
    except InvalidSettings as error:
        print(error, file=sys.stderr)
        sys.exit(2)
