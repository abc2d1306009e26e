"""Heartbeats: a process notices that another process died, and takes over the messages of the dead process.

Every HEARTBEAT_S a process writes a count that goes up. When a process sees another count unchanged for DEAD_AFTER_S, while its
own heartbeats succeed, it reclaims the messages of that process. No clock of another host is used. During an outage of Redis no
process writes heartbeats, and none is declared dead. A process that has ended on this machine is declared dead at once.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Container, Sequence
from typing import Final, NamedTuple, NoReturn
from uuid import uuid4

import msgspec
import redis
from dramatiq import Worker

from evalstore.storage import migrations
from evalstore.telemetry.process_registry import exists, host_id, start_ticks
from models.logs import EventLogger
from tasks.broker import SendingBroker
from worker.in_flight import InFlight
from worker.messages import cause
from worker.metrics import LOOP_S, WorkerMetrics
from worker.queue_client import QueueClient
from worker.redis_config import redis_config_warnings

log = EventLogger("evalstore.worker")

HEARTBEAT_S: Final = 2.0
DEAD_AFTER_S: Final = 10.0
RECONCILE_S: Final = 5.0
WEDGED_AFTER_S: Final = 60.0
STOP_WITHIN_S: Final = 8.0  # Docker kills a container after 10 s.
THREAD_DIED: Final = 70  # EX_SOFTWARE of sysexits.h
STOPPED_LATE: Final = 75  # EX_TEMPFAIL
_BEATS: Final = 4


class WorkerDied(Exception):
    """The maximum number of processes died while they held only this message."""


def process_name() -> str:
    """Return a unique name for this process. Other processes on this machine can check whether the named process still runs."""
    return "|".join([socket.gethostname(), *host_id(), str(os.getpid()), start_ticks(os.getpid()) or "?", uuid4().hex[:12]])


def is_gone(name: str) -> bool:
    """Whether the process of that name ran on this machine and no longer does."""
    parts = name.split("|")
    if len(parts) != 6 or tuple(parts[1:3]) != host_id() or not parts[3].isdigit():
        return False
    ticks = start_ticks(int(parts[3]))
    if "?" in parts or (ticks is None and exists(int(parts[3]))):
        return False
    return ticks is None or ticks != parts[4]


class PeerMonitor:
    """The heartbeats of other processes, as one process saw them."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, float, int]] = {}

    def dead(self, beats: dict[str, str], own: str) -> dict[str, str]:
        """Return those of `beats` (process -> count) that are dead. Call it once for each own heartbeat."""
        now = time.monotonic()
        before, self._seen = self._seen, {}
        dead = {}
        for name, count in beats.items():
            if name == own:
                continue
            last, since, times = before.get(name, (count, now, 0))
            if last != count:
                since, times = now, 0
            self._seen[name] = (count, since, times + 1)
            if is_gone(name) or (now - since >= DEAD_AFTER_S and times >= _BEATS):
                dead[name] = count
        return dead


class Limits(NamedTuple):
    """A message becomes a dead letter after `max_deaths` processes died that held only this message.

    `event_queues`: the queues whose dead letters count as events.
    """

    max_deaths: int
    event_queues: Container[str]


class Heartbeat(threading.Thread):
    """Writes heartbeats, reclaims messages of dead processes, and requeues messages that no thread of this process holds.

    Ends the process if one of its threads died or makes no progress.
    """

    def __init__(
        self,
        worker: Worker,
        queues: Callable[[], Sequence[QueueClient]],
        broker: SendingBroker,
        in_flight: InFlight,
        metrics: WorkerMetrics,
        limits: Limits,
    ) -> None:
        super().__init__(name="evalstore-vitals", daemon=True)
        self.wake = threading.Event()
        self._worker, self._all_queues, self._broker = worker, queues, broker
        self._in_flight, self._metrics, self._limits = in_flight, metrics, limits
        self._monitors: dict[str, PeerMonitor] = {}
        self._beats = 0
        self._done = threading.Event()
        self._late = threading.Timer(STOP_WITHIN_S, self._stop_late)
        self._failing = False
        self._is_server_checked = False
        self._state: str | None = None
        self._loop_counts: dict[str, tuple[int, int]] = {}
        self._reconciled = time.monotonic()
        self._since = time.time()

    def run(self) -> None:
        self._metrics.counters.watch_thread(self.name)
        try:
            while not self._done.is_set():
                self._metrics.counters.set_deadline(LOOP_S)
                self._watch_threads()
                self._run_and_wait()
        except BaseException:
            # Without heartbeats, other processes would reclaim this process's messages again and again.
            log.critical("heartbeat_ended", exc_info=True)
            _end_process(THREAD_DIED)

    def _run_and_wait(self) -> None:
        try:
            self.run_once()
            if not self._is_server_checked:
                self._check_server()
            self._failing = False
            self._metrics.outages.back("redis", self.name)
        except redis.RedisError as error:
            log.debug("heartbeat_failed", error=error)
            self._failing, self._is_server_checked = True, False
            self._metrics.outages.away("redis", self.name)
            self._broker.reset_if_readonly(error)
            self._monitors.clear()
        # A new state is written at once. If a process dies soon after an outage began, its messages are not the cause.
        until = time.monotonic() + HEARTBEAT_S
        while time.monotonic() < until and (self._failing or self._state == self._in_flight.state):
            if self.wake.wait(min(HEARTBEAT_S, 0.2)):
                break
        self.wake.clear()

    def run_once(self) -> None:
        """Write one heartbeat for each queue, reclaim, and requeue messages that no thread holds.

        Raises RedisError (call again).
        """
        self._beats += 1
        self._state = self._in_flight.state
        status, queues = self._status(), self._queues()
        for queue in queues:
            self._send_heartbeat(queue, status)
        if time.monotonic() - self._reconciled >= RECONCILE_S:
            self._reconciled = time.monotonic()
            for queue in queues:
                self._reconcile(queue)

    def _queues(self) -> list[QueueClient]:
        """Return the queues that this process works on: all, or those of Dramatiq's `--queues`."""
        chosen = self._worker.consumer_whitelist
        return [one for one in self._all_queues() if not chosen or one.queue in chosen]

    def _check_server(self) -> None:
        for doubt in redis_config_warnings(self._broker.client):
            log.warning("redis_config_warning", doubt=doubt)
        self._is_server_checked = True

    def stop_in_time(self) -> None:
        """End the process within STOP_WITHIN_S, even while its threads wait for a server that does not answer."""
        self.wake.set()
        self._late.daemon = True
        self._late.start()

    def stop(self) -> None:
        """Requeue the messages that this process holds, and deregister it."""
        self._late.cancel()
        self._done.set()
        self.wake.set()
        self.join(timeout=2)
        self._failing = self._failing or self.is_alive()
        self._deregister()

    def _stop_late(self) -> None:
        log.warning("stop_timed_out", seconds=STOP_WITHIN_S)
        self._deregister()
        _end_process(STOPPED_LATE)

    def _deregister(self) -> None:
        if self._failing or self._in_flight.abandoned:
            log.warning("deregistration_skipped")
            return
        try:
            for queue in self._all_queues():
                queue.deregister()
        except redis.RedisError as error:
            log.warning("deregistration_failed", error=error)

    def _status(self) -> bytes:
        """Return the status of this process for `evalstore status`, as JSON."""
        status = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": self._since,
            "threads": len(self._worker.workers),
            "state": self._state,
            "revision": migrations.revisions()[-1],
        }
        return msgspec.json.encode(status | self._metrics.status())

    def _send_heartbeat(self, queue: QueueClient, status: bytes) -> None:
        beats = queue.heartbeat(f"{self._state}:{self._beats}", status)
        monitor = self._monitors.setdefault(queue.queue, PeerMonitor())
        for process, last in monitor.dead(beats, queue.process).items():
            deaths = self._limits.max_deaths
            why = cause(WorkerDied(f"{deaths} processes died with this message alone; the last was {process}"))
            held, dead = queue.reclaim(process, last, deaths, why)
            if dead and queue.queue in self._limits.event_queues:
                self._metrics.buried([None])
            if held > 0:
                self._metrics.redelivered(queue.queue, "died", held - dead)
                log.warning("process_dead", process=process, state=last.partition(":")[0], messages=held)

    def _reconcile(self, queue: QueueClient) -> None:
        """Requeue messages that Redis assigns to this process, and that no thread holds."""
        ours = queue.held()  # First: a message fetched after the check of messages in flight would look unheld.
        in_flight = self._in_flight.ids(queue.queue)
        stranded = [redis_id for redis_id in ours if redis_id not in in_flight]
        if stranded and (given := queue.requeue(stranded)):
            self._metrics.redelivered(queue.queue, "stranded", given)
            log.warning("stranded_requeued", messages=len(stranded), queue=queue.queue)

    def _watch_threads(self) -> None:
        """End a process whose threads died or whose consumer makes no progress: it would look alive and store nothing."""
        consumers = dict(self._worker.consumers)
        dead = [t for t in (*consumers.values(), *self._worker.workers) if t.ident is not None and not t.is_alive()]
        # Count loops of this thread instead of time: a process that was suspended must not end when it resumes.
        before, self._loop_counts = self._loop_counts, {}
        for queue, thread in consumers.items():
            loops = getattr(thread.consumer, "loops", -1)
            last, times = before.get(queue, (loops, 0))
            self._loop_counts[queue] = (loops, times + 1 if last == loops and loops >= 0 and not thread.paused else 0)
            if self._loop_counts[queue][1] * HEARTBEAT_S > WEDGED_AFTER_S:
                dead.append(thread)
        if dead and not self._in_flight.stopping:
            log.critical("thread_died", thread=dead[0])
            _end_process(THREAD_DIED)


def _end_process(status: int) -> NoReturn:
    """Write all stacks to stderr, and end with a status that makes a supervisor start the process again."""
    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
    logging.shutdown()
    os._exit(status)
