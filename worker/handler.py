"""What a worker does with the events it is sent."""

import random
import threading
import time
from functools import cache
from typing import Any

from dramatiq.errors import ActorNotFound
from sqlalchemy import Engine

from evalstore.objects.existence_cache import ExistenceCache
from evalstore.objects.object_store import Stores
from evalstore.storage import database, durability, event_store, migrations
from models.errors import PASSING, BadMessage, DatabaseOutage, EventIdReused, Fault, InvalidEvent, Outage
from models.events import identified, parse
from models.fast_decode import decode_message
from models.logs import EventLogger
from models.record import EventRow, to_row
from models.settings import settings
from tasks.actor import ACTOR
from tasks.keys import QUEUE
from tasks.redrives import REDRIVEN
from worker import dead_letter_mover, tracing
from worker.batches import Batch, Delivery, cause, read
from worker.breaker import Breaker, BreakerLimits
from worker.content_gate import ContentGate, Pair
from worker.failure_classifier import BatchFailureClassifier
from worker.in_flight import InFlight
from worker.locked_evaluations import LockedEvaluations
from worker.metrics import WORK_S, WorkerMetrics

log = EventLogger("evalstore.worker")
_LONGEST_WAIT_S = 4.0
_CONNECT_S = 12.0
_STOP_GRACE_S = 2.0


@cache
def engine() -> Engine:
    """This process's connections, once the database is known to have the right schema. Raises SchemaMismatch, Outage."""
    connections = database.connect(settings(), idle_timeout_s=15, pre_ping=False)
    with database.errors(), connections.connect() as conn:
        migrations.check(conn)
        for doubt in durability.doubts(conn):
            log.warning("postgresql_doubtful", doubt=doubt)
    return connections


class Handler:
    """The function of the actor `store_evaluation` in a worker whose deliveries are `in_flight`."""

    def __init__(self, in_flight: InFlight, limits: BreakerLimits | None = None, metrics: WorkerMetrics | None = None) -> None:
        self._in_flight, self._metrics = in_flight, metrics or WorkerMetrics()
        self._count = self._metrics.counters
        self._watch = database.Watch()
        self._breaker = Breaker(limits or BreakerLimits())
        self._locks = LockedEvaluations()
        self._existence = ExistenceCache(Stores(settings(), in_a_hurry=True))
        self._contents = ContentGate(self._existence, self._metrics.outages)

    def __call__(self, batch: Batch) -> None:
        """Store a batch of events in one transaction, committed when this returns; bury those that can never be stored, and let
        come again later what waits for an object. Events that need one have a transaction of their own.

        Waits for PostgreSQL as long as it is away, and while the breaker is open. When it is told to stop meanwhile, the batch
        goes back to the queue: what was stored of it will be recognised when it comes again.
        """
        with tracing.processing(batch):
            self._process(batch)

    def _process(self, batch: Batch) -> None:
        left = list(batch)
        self._count.observe("evalstore_batch_events", value=len(left))
        try:
            while left:
                if self._breaker.is_open:
                    left = self._probe(batch, left)
                    continue
                bad = self._work(batch, left)
                counted = [one for one in left if not one.is_redriven and one.redis_id not in batch.later]
                counted_bad = sum(delivery.redis_id in bad for delivery in counted)
                if self._breaker.note(len(counted) - counted_bad, counted_bad):
                    self._log_breaker_open(bad)
                if bad and self._breaker.is_open:
                    left = [delivery for delivery in left if delivery.redis_id in bad]
                    continue
                batch.buried |= bad
                return
        except _Stopped as stopped:
            log.info("returned", events=len(batch), why=stopped)
            batch.returned = True

    def _probe(self, batch: Batch, left: list[Delivery]) -> list[Delivery]:
        """While the breaker is open, wait, and try one of `left`; returns those not tried."""
        self._in_flight.outages += 1
        try:
            while not self._breaker.may_probe():
                self._count.set_deadline(WORK_S)
                if not self._in_flight.sleep_unless_stopping(0.5):
                    raise _Stopped("told to stop while the breaker is open")
                if not self._breaker.is_open:
                    return left
            bad = self._work(batch, left[:1])
        finally:
            self._in_flight.outages -= 1
        if bad:
            self._log_breaker_open(bad)
            batch.buried |= bad
        elif left[0].redis_id not in batch.later:
            log.warning("breaker_closed")
            self._breaker.close()
            self._count.set("evalstore_breaker_open", to=0)
        return left[1:]

    def _log_breaker_open(self, bad: dict[bytes, bytes]) -> None:
        if not self._breaker.is_open:  # a probe took long, and another one's was stored meanwhile
            return
        self._count.set("evalstore_breaker_open", to=1)
        limits, newest = self._breaker.limits, next(iter(bad.values()), b"").decode()
        log.critical(
            "breaker_opened",
            percent=limits.share * 100,
            messages=limits.messages,
            window_s=limits.window_s,
            probe_s=limits.probe_s,
            cause=newest,
        )

    def _work(self, batch: Batch, deliveries: list[Delivery]) -> dict[bytes, bytes]:
        """Store these; returns the causes of those that can never be stored."""
        bad: dict[bytes, bytes] = {}
        events: list[Pair] = []
        referring: list[Pair] = []
        most, started = settings().max_content_bytes, time.perf_counter()
        traces = tracing.sender_traces()
        for delivery in deliveries:
            try:
                fast = decode_message(delivery.body, max_content_bytes=most, traceparents=traces, redis_id=delivery.redis_id)
                event = fast or parse_message(delivery.body, traces, delivery.redis_id)
            except (BadMessage, ActorNotFound) as error:
                bad[delivery.redis_id] = cause(error)
                continue
            (events if fast or self._contents.is_ready(event) else referring).append((delivery, event))
        self._timed("decode", started)
        if events:
            self._store(batch, bad, events)
        # Last: the object store may be slow.
        self._count.set_deadline(WORK_S)
        if referring and (present := self._contents.split_ready(referring, batch, bad)):
            self._store(batch, bad, present)
        settled = [one.redis_id for one in deliveries if one.redis_id not in bad and one.redis_id not in batch.later]
        redriven = [redis_id for redis_id in settled if redis_id.startswith(REDRIVEN)]
        if redriven:
            dead_letter_mover.record_stored(engine(), redriven, self._watch)
        return bad

    def stop_soon(self) -> None:
        """Break off, after a moment, what a server that does not answer keeps waiting."""
        self._existence.stopping = True
        timer = threading.Timer(_STOP_GRACE_S, self._watch.break_all)
        timer.daemon = True
        timer.start()

    def _store(self, batch: Batch, bad: dict[bytes, bytes], events: list[Pair]) -> None:
        """Store `events`; where one of them sinks the transaction, take them apart until it is alone."""
        if (doubtful := self._locks.possibly_locked(events)) and self._are_locked(doubtful):
            events = self._locks.exclude_locked(events, batch)
        if not events:
            return
        started = time.monotonic()
        try:
            stored = self._stored(events)
        except _Stopped:
            raise
        except _Locked:
            self._store(batch, bad, events)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, only the event that causes it may die of it
            if len(events) == 1:
                bad[events[0][0].redis_id] = cause(error)
                return
            # What takes long to fail is narrowed down in fewer steps.
            parts = 2 if time.monotonic() - started < 1 else 16
            size = -(-len(events) // parts)
            for start in range(0, len(events), size):
                self._store(batch, bad, events[start : start + size])
            return
        self._metrics.stored(events, stored.outcomes, stored.conflicting_results)
        tracing.record_outcomes(events, stored.outcomes)
        for (delivery, event), outcome in zip(events, stored.outcomes, strict=True):
            if outcome == "reused":
                bad[delivery.redis_id] = cause(EventIdReused(event.eval_id, event.event_id))

    def _stored(self, events: list[Pair]) -> event_store.Stored:
        """`evaluations.store`, tried again while the database is away or its schema is not ours.

        Raises DatabaseOutage when it fails in a way that these events may cause, and goes on to while small writes go through;
        _Locked when somebody else keeps some of their evaluations locked.
        """
        failures = 0
        bound_s = 10 + sum(len(delivery.body) for delivery, _ in events) / 2e6
        suspicion = BatchFailureClassifier(engine, self._watch)
        try:
            while True:
                self._count.set_deadline(
                    WORK_S
                )  # each time, however far the attempt gets: to wait for a server is no standing still
                try:
                    suspicion.begin()
                    return self._attempt(events, bound_s * 2**suspicion.blamed)
                except PASSING as error:
                    if isinstance(error, DatabaseOutage) and error.is_lock and self._are_locked(events):
                        raise _Locked from error
                    failures += 1
                    self._count.set_deadline(WORK_S)
                    if not self._in_flight.stopping and suspicion.record_failure(error):
                        raise
                    self._metrics.retried(QUEUE)
                    if failures == 1:
                        self._in_flight.outages += 1
                        self._metrics.outages.away("postgresql", threading.current_thread().name)
                    elif failures == 2:  # one is often no more than a connection that broke while it was not used
                        log.warning("outage", kind=type(error).__name__, events=len(events), error=error)
                    longest_s = min(_LONGEST_WAIT_S, 0.05 * 2 ** min(failures, 10))
                    if not self._in_flight.sleep_unless_stopping(longest_s * random.uniform(0.5, 1)):  # noqa: S311
                        raise _Stopped(f"told to stop while waiting: {error}") from error
        finally:
            suspicion.close()
            if failures:
                self._in_flight.outages -= 1
                self._metrics.outages.back("postgresql", threading.current_thread().name)

    def _attempt(self, events: list[Pair], bound_s: float) -> event_store.Stored:
        self._count.set_deadline(bound_s + _CONNECT_S)
        started = time.perf_counter()
        trying = tracing.transaction(len(events))
        with trying, database.errors(), engine().connect() as conn, self._watch.bounded(conn, bound_s):
            connected = self._timed("connect", started)
            stored = event_store.store(conn, [event for _, event in events], tracing.traces_of(events))
        self._timed("write", connected, stored.written_at)
        self._timed("commit", stored.written_at)
        return stored

    def _timed(self, phase: str, started: float, ended: float | None = None) -> float:
        """Note how long a phase took; returns when it ended."""
        ended = time.perf_counter() if ended is None else ended
        self._count.observe("evalstore_store_duration_seconds", phase, value=ended - started)
        return ended

    def _are_locked(self, events: list[Pair]) -> bool:
        """Whether, as far as can be told, it is the records of some of these that are locked, and not everybody's."""
        try:
            with database.errors(), engine().connect() as conn, self._watch.bounded(conn, 5):
                return self._locks.refresh(conn, events)
        except Outage:
            return False


class _Locked(Outage):
    """Some evaluations are locked; the events of the others need not wait."""


class _Stopped(Outage):
    """The process is to stop; what it holds goes back."""


def read_message(body: bytes) -> EventRow:
    """Return the event in a message as a row of the log. Raises InvalidEvent, ActorNotFound."""
    return decode_message(body, max_content_bytes=settings().max_content_bytes) or parse_message(body)


def parse_message(body: bytes, traceparents: dict[bytes, Any] | None = None, redis_id: bytes = b"") -> EventRow:
    """Return the event in a message that `decode_message` left to the slow path. `traceparents` is as for `decode_message`.

    Raises InvalidEvent, ActorNotFound.
    """
    message = read(body)
    if traceparents is not None:
        traceparents[redis_id] = message.options.get("traceparent")
    if message.actor_name != ACTOR:
        raise ActorNotFound(message.actor_name)
    if len(message.args) != 1 or message.kwargs or not isinstance(message.args[0], dict):
        raise InvalidEvent([Fault("message.args", "expected one event, a JSON object, as the one positional argument")])
    given = identified(message.args[0], message.message_id, message.message_timestamp)
    event = parse(given, max_content_bytes=settings().max_content_bytes)
    if event.type == "evaluation:lost":
        raise InvalidEvent([Fault("type", "evaluation:lost is written by the system alone")])
    return to_row(event)
