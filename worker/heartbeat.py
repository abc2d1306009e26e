"""How processes know of each other's death, and what a process holds.

Each process beats every BEAT_S: it writes a count that goes up. Whoever sees another's count stand still for DEAD_AFTER_S,
while its own beats went through, takes back what that one held. No clock is compared with another host's, and an outage of
Redis, in which nobody beats, makes nobody dead. A process that is seen to be gone from this machine is dead at once.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Final, NoReturn
from uuid import uuid4

import msgspec
import redis
from dramatiq import Worker

from evalstore.telemetry.process_registry import exists, host_id, start_ticks
from models.logs import EventLogger
from worker.batches import cause
from worker.metrics import LOOP_S
from worker.redis_config import redis_config_warnings

if TYPE_CHECKING:
    from worker.broker import Broker

log = EventLogger("evalstore.worker")

HEARTBEAT_S: Final = 2.0
DEAD_AFTER_S: Final = 10.0
RECONCILE_S: Final = 5.0
WEDGED_AFTER_S: Final = 60.0
STOP_WITHIN_S: Final = 8.0  # Docker kills after 10
THREAD_DIED: Final = 70  # EX_SOFTWARE of sysexits.h
STOPPED_LATE: Final = 75  # EX_TEMPFAIL
_BEATS: Final = 4


class WorkerDied(Exception):
    """The processes that held this message, and nothing else, died, as often as the setting allows."""


def process_name() -> str:
    """A name no other process has or had, in which others on this machine recognise it."""
    return "|".join([socket.gethostname(), *host_id(), str(os.getpid()), start_ticks(os.getpid()) or "?", uuid4().hex[:12]])


def is_gone(name: str) -> bool:
    """Whether the process of that name ran on this machine and no longer does."""
    parts = name.split("|")
    if len(parts) != 6 or tuple(parts[1:3]) != host_id() or not parts[3].isdigit():
        return False
    ticks = start_ticks(int(parts[3]))
    if "?" in parts or (ticks is None and exists(int(parts[3]))):
        return False  # it cannot be told
    return ticks is None or ticks != parts[4]


class PeerMonitor:
    """What one process saw of the others' beats."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, float, int]] = {}

    def dead(self, beats: dict[str, str], own: str) -> dict[str, str]:
        """Those of `beats` (process -> count) who are dead. To be called once for each beat of our own."""
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


class Heartbeat(threading.Thread):
    """Beats, reclaims what the dead held, reconciles what is held here, and ends a process whose threads died."""

    def __init__(self, broker: "Broker", worker: Worker) -> None:
        super().__init__(name="evalstore-vitals", daemon=True)
        self.wake = threading.Event()
        self._broker, self._worker = broker, worker
        self._monitors: dict[str, PeerMonitor] = {}
        self._beats = 0
        self._done = threading.Event()
        self._late = threading.Timer(STOP_WITHIN_S, self._stop_late)
        self._failing = False
        self._is_server_checked = False
        self._state: str | None = None
        self._loop_counts: dict[str, tuple[int, int]] = {}
        self._reconciled = time.monotonic()
        self._metrics = broker.metrics
        self._since = time.time()

    def run(self) -> None:
        self._metrics.counters.watch_thread(self.name)
        try:
            while not self._done.is_set():
                self._metrics.counters.set_deadline(LOOP_S)
                self._watch_threads()
                self._run_and_wait()
        except BaseException:
            # Without a heartbeat the others take what this process holds, again and again.
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
        # A change of state shows at once: a death soon after an outage began is none of its messages' making.
        until = time.monotonic() + HEARTBEAT_S
        while time.monotonic() < until and (self._failing or self._state == self._broker.in_flight.state):
            if self.wake.wait(min(HEARTBEAT_S, 0.2)):
                break
        self.wake.clear()

    def run_once(self) -> None:
        """One beat, and what it shows to be due. Raises what redis raises; nothing is half done."""
        self._beats += 1
        self._state = self._broker.in_flight.state
        told, queues = self._status(), self._queues()
        for queue in queues:
            self._send_heartbeat(queue, told)
        if time.monotonic() - self._reconciled >= RECONCILE_S:
            self._reconciled = time.monotonic()
            for queue in queues:
                self._reconcile(queue)

    def _queues(self) -> list[str]:
        """Those that this process works on: all of the broker's, or what `--queues` says."""
        chosen = self._worker.consumer_whitelist
        return sorted(queue for queue in self._broker.queues if not chosen or queue in chosen)

    def _check_server(self) -> None:
        """Say once what could lose events. After an outage it may be another server, or one that was set up anew."""
        for doubt in redis_config_warnings(self._broker.client):
            log.warning("redis_config_warning", doubt=doubt)
        self._is_server_checked = True

    def stop_in_time(self) -> None:
        """From now on the process ends within STOP_WITHIN_S, whatever its threads wait for: a server that hangs, say."""
        self.wake.set()
        self._late.daemon = True
        self._late.start()

    def stop(self) -> None:
        """Give back whatever this process still holds, and say goodbye."""
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
        if self._failing or self._broker.in_flight.abandoned:
            log.warning("deregistration_skipped")
            return
        try:
            for queue in sorted(self._broker.queues):
                keys, unacked = self._broker.keys(queue), self._broker.unacked(queue)
                left = self._broker.client.zrange(unacked, 0, -1)
                if left:
                    self._broker.run("requeue", [unacked, keys.queue], *left)
                self._broker.client.hdel(keys.workers, self._broker.process)
                self._broker.client.hdel(keys.processes, self._broker.process)  # last: others clear up after those in here
        except redis.RedisError as error:
            log.warning("deregistration_failed", error=error)

    def _status(self) -> bytes:
        """What others may know of this process."""
        threads = len(self._worker.workers)
        told = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": self._since,
            "threads": threads,
            "state": self._state,
        }
        return msgspec.json.encode(told | self._metrics.status())

    def _send_heartbeat(self, queue: str, told: bytes) -> None:
        keys, own = self._broker.keys(queue), self._broker.process
        count = f"{self._state}:{self._beats}"
        answer = [_as_text(part) for part in self._broker.run("heartbeat", [keys.processes, keys.workers], own, count, told)]
        beats = dict(zip(answer[::2], answer[1::2], strict=True))
        for process, last in self._monitors.setdefault(queue, PeerMonitor()).dead(beats, own).items():
            places = [keys.processes, self._broker.unacked(queue, process), keys.queue, keys.bodies, keys.suspects]
            places += [keys.deaths, keys.dead, keys.dead_bodies, keys.causes, keys.workers]
            why = cause(WorkerDied(f"{self._broker.max_deaths} processes died with this message alone; the last was {process}"))
            at_work = int(last.startswith("working"))
            held, buried = self._broker.run("reclaim", places, process, last, at_work, self._broker.max_deaths, why)
            if buried and queue in self._broker.batched:
                self._metrics.buried([None])
            if held > 0:
                self._metrics.redelivered(queue, "died", held - buried)
                log.warning("process_dead", process=process, state=last.partition(":")[0], messages=held)

    def _reconcile(self, queue: str) -> None:
        """Give back what Redis has as ours of answered fetches, and we do not hold."""
        keys, unacked = self._broker.keys(queue), self._broker.unacked(queue)
        unanswered = (self._broker.fetches[queue] + 1) * 65536
        ours = self._broker.client.zrangebyscore(unacked, "-inf", f"({unanswered}")
        held = self._broker.in_flight.ids(queue)
        stranded = [redis_id for redis_id in ours if redis_id not in held]
        if stranded and (given := self._broker.run("requeue", [unacked, keys.queue], *stranded)):
            self._metrics.redelivered(queue, "stranded", given)
            log.warning("stranded_requeued", messages=len(stranded), queue=queue)

    def _watch_threads(self) -> None:
        """A process whose threads died, or that fetches nothing any more, works on nothing and looks alive: end it."""
        consumers = dict(self._worker.consumers)
        dead = [t for t in (*consumers.values(), *self._worker.workers) if t.ident is not None and not t.is_alive()]
        # Counted in our own turns and not in time: in a process that was frozen both stood still.
        before, self._loop_counts = self._loop_counts, {}
        for queue, thread in consumers.items():
            turns = getattr(thread.consumer, "turns", -1)
            last, times = before.get(queue, (turns, 0))
            self._loop_counts[queue] = (turns, times + 1 if last == turns and turns >= 0 and not thread.paused else 0)
            if self._loop_counts[queue][1] * HEARTBEAT_S > WEDGED_AFTER_S:
                dead.append(thread)
        if dead and not self._broker.in_flight.stopping:
            log.critical("thread_died", thread=dead[0])
            _end_process(THREAD_DIED)


def _end_process(status: int) -> NoReturn:
    """With a status that makes a supervisor start it again; the stacks are in its log."""
    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
    logging.shutdown()
    os._exit(status)


def _as_text(value: str | bytes) -> str:
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value
