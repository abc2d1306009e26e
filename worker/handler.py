"""Handle a batch of events: decode, split, store with retry, report.

Four calls lead to the SQL: the handler, `_process`, `_store`, `event_store.store`.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

from dramatiq.errors import ActorNotFound
from sqlalchemy import Connection

from evalstore.hooks import Hooks
from evalstore.objects.existence_cache import ExistenceCache
from evalstore.objects.object_store import Stores
from evalstore.storage import event_store
from evalstore.storage.database import Watch
from models.errors import PASSING, BadMessage, DatabaseOutage, EventIdReused, Outage
from models.fast_decode import decode_message
from models.logs import EventLogger
from models.settings import Settings
from tasks.keys import QUEUE
from tasks.redrives import REDRIVEN
from worker import dead_letter_mover, tracing
from worker.batches import Batch, BatchOutcome, Delivery, Pair
from worker.breaker import Breaker, BreakerLimits
from worker.content_gate import ContentGate
from worker.failure_classifier import BatchFailureClassifier
from worker.in_flight import InFlight
from worker.locked_evaluations import LockedEvaluations
from worker.messages import cause, parse_message
from worker.metrics import WORK_S, WorkerMetrics
from worker.outage_wait import OutageWait
from worker.verified_database import VerifiedDatabase

log = EventLogger("evalstore.worker")
Enrichments = dict[bytes, dict[str, Any]]

_CONNECT_S: Final = 12.0
_STOP_GRACE_S: Final = 2.0
_PAGE_S: Final = 10.0  # Time to read a page of a log during a rebuild.


class Handler:
    """Stores batches of events, from any number of threads."""

    def __init__(
        self,
        connections: VerifiedDatabase,
        settings: Settings,
        in_flight: InFlight,
        metrics: WorkerMetrics,
        hooks: Hooks | None = None,
    ) -> None:
        self._connections, self._settings = connections, settings
        self._in_flight, self._metrics, self._counters = in_flight, metrics, metrics.counters
        self._hooks = hooks
        self._watch = Watch()
        self._breaker = Breaker(BreakerLimits.of(settings), metrics.counters)
        self._locks = LockedEvaluations()
        self._existence = ExistenceCache(Stores(settings, in_a_hurry=True))
        self._contents = ContentGate(self._existence, metrics.outages, settings.object_grace_s)

    def __call__(self, batch: Batch) -> BatchOutcome:
        """Store a batch of events. Return the outcome of each. Events reported as stored are committed.

        Blocks during an outage of PostgreSQL and while the breaker is open. If the process stops during the call, messages that
        are not stored are requeued.
        """
        outcome, left = BatchOutcome(), list(batch)
        self._counters.observe("evalstore_batch_events", value=len(left))
        with tracing.processing(batch, outcome):
            while left:
                turn = self._wait_for_turn()
                if turn == "stop":
                    outcome.requeue += [delivery.redis_id for delivery in left]
                    break
                tried, left = (left[:1], left[1:]) if turn == "probe" else (left, [])
                result = self._process(tried)
                self._report_to_breaker(turn, tried, result)
                if turn == "all" and result.dead and self._breaker.is_open:
                    # After a bad release, messages are tried singly and the others wait. So the queue does not become dead
                    # letters.
                    left = [delivery for delivery in tried if delivery.redis_id in result.dead]
                    result.dead.clear()
                outcome.update(result)
        if outcome.requeue:
            log.info("batch_requeued", events=len(outcome.requeue), why="told to stop while waiting")
        return outcome

    def stop_soon(self) -> None:
        """After _STOP_GRACE_S, interrupt all transactions and all checks for objects."""
        self._existence.stopping = True
        timer = threading.Timer(_STOP_GRACE_S, self._watch.break_all)
        timer.daemon = True
        timer.start()

    def _wait_for_turn(self) -> Literal["all", "probe", "stop"]:
        """Return the messages to try: all if the breaker is closed, and one message when a probe is due."""
        if not self._breaker.is_open:
            return "all"
        with self._in_flight.waiting():
            while not self._breaker.may_probe():
                self._counters.set_deadline(WORK_S)
                if not self._in_flight.sleep_unless_stopping(0.5):
                    return "stop"
                if not self._breaker.is_open:
                    return "all"
        return "probe"

    def _report_to_breaker(self, turn: str, tried: Sequence[Delivery], result: BatchOutcome) -> None:
        if turn == "probe":
            if result.dead:
                self._breaker.report_open(result.dead)
            elif result.stored([tried[0].redis_id]):
                self._breaker.close()
            return
        # Redriven messages do not count: an operator expects that some fail again.
        dead = {redis_id: why for redis_id, why in result.dead.items() if not redis_id.startswith(REDRIVEN)}
        ids = [redis_id for redis_id, _ in tried if not redis_id.startswith(REDRIVEN)]
        self._breaker.record(len(result.stored(ids)), dead)

    def _process(self, deliveries: list[Delivery]) -> BatchOutcome:
        """Decode and store messages. A part that cannot be stored is bisected until the bad message is alone."""
        outcome = BatchOutcome()
        ready, referring, enrichments = self._run_hooks(*self._decode(deliveries, outcome), outcome)
        parts = [ready]
        while parts or referring:
            if not parts:  # Last, because the object store may be slow.
                self._counters.set_deadline(WORK_S)
                present, waiting = self._contents.split_ready(referring)
                outcome.update(waiting)
                parts, referring = [present], []
            part = self._without_locked(parts.pop(), outcome)
            if not part:
                continue
            began = time.monotonic()
            try:
                stored = self._store(part, enrichments)
            except _Stopping:
                left = {delivery.redis_id for events in (part, *parts, referring) for delivery, _ in events}
                outcome.requeue += [delivery.redis_id for delivery in deliveries if delivery.redis_id in left]
                break
            except _EvaluationsLocked:
                parts.append(part)
            except Exception as error:  # noqa: BLE001 - of any error, only the event that causes it becomes a dead letter
                if len(part) == 1:
                    outcome.dead[part[0][0].redis_id] = cause(error)
                else:
                    parts += _bisect(part, failed_after_s=time.monotonic() - began)
            else:
                self._report_stored(part, stored, outcome)
        redriven = [one.redis_id for one in deliveries if one.redis_id.startswith(REDRIVEN)]
        if redriven and (redriven := list(outcome.stored(redriven))):
            dead_letter_mover.record_stored(self._connections, redriven)
        return outcome

    def _decode(self, deliveries: list[Delivery], outcome: BatchOutcome) -> tuple[list[Pair], list[Pair]]:
        """Return the events that can be stored, and the events whose objects must be checked. Add bad events to `outcome`."""
        ready: list[Pair] = []
        referring: list[Pair] = []
        max_bytes, started = self._settings.max_content_bytes, time.perf_counter()
        traces = tracing.sender_traces()
        for delivery in deliveries:
            redis_id, body = delivery
            try:
                fast = decode_message(body, max_content_bytes=max_bytes, traceparents=traces, redis_id=redis_id)
                event = fast or parse_message(body, max_bytes, traces, redis_id)
            except (BadMessage, ActorNotFound) as error:
                outcome.dead[redis_id] = cause(error)
                continue
            (ready if fast or self._contents.is_ready(event) else referring).append((delivery, event))
        self._observe("decode", started)
        return ready, referring

    def _run_hooks(
        self, ready: list[Pair], referring: list[Pair], outcome: BatchOutcome
    ) -> tuple[list[Pair], list[Pair], Enrichments]:
        """Return the events that validators let pass, and the enrichments. Add refused events to `outcome`."""
        if not self._hooks:
            return ready, referring, {}
        self._counters.set_deadline(WORK_S + self._hooks.longest_s)
        pairs = [*ready, *referring]
        refused, enriched = self._hooks.run([event for _, event in pairs])
        outcome.dead |= {pairs[at][0].redis_id: cause(error) for at, error in refused.items()}
        enrichments = {pairs[at][0].redis_id: enrichment for at, enrichment in enriched.items()}
        if refused:
            ready = [pair for pair in ready if pair[0].redis_id not in outcome.dead]
            referring = [pair for pair in referring if pair[0].redis_id not in outcome.dead]
        return ready, referring, enrichments

    def _without_locked(self, events: list[Pair], outcome: BatchOutcome) -> list[Pair]:
        """Return the events that need no locked record. Add the others to `outcome`, for a retry."""
        possibly_locked = self._locks.possibly_locked(events)
        if not possibly_locked or not self._are_locked(possibly_locked):
            return events
        free, retry_ms = self._locks.split_locked(events)
        outcome.retry_ms |= retry_ms
        return free

    def _store(self, events: list[Pair], enrichments: Enrichments) -> event_store.Stored:
        """Store events in one transaction. Retry while the database is unavailable or its schema does not fit.

        Raises DatabaseOutage if the events cause it, _EvaluationsLocked, _Stopping, and other errors of PostgreSQL unchanged.
        """
        limit_s = 10 + sum(len(delivery.body) for delivery, _ in events) / 2e6
        classifier = BatchFailureClassifier(self._connections, self._watch)
        ids = [delivery.redis_id for delivery, _ in events] if enrichments else []
        enriched = {at: enrichments[redis_id] for at, redis_id in enumerate(ids) if redis_id in enrichments}
        with OutageWait(self._in_flight, self._metrics, len(events)) as outage:
            try:
                while True:
                    self._counters.set_deadline(WORK_S)  # For each attempt, because a wait for a server is no standstill.
                    try:
                        classifier.begin()
                        with self._transaction(events, limit_s * 2**classifier.blamed) as (conn, connected_at):
                            rows, traces = [event for _, event in events], tracing.traces_of(events)
                            stored = event_store.store(conn, rows, traces, self._extend, enrichments=enriched)
                    except PASSING as error:
                        if self._in_flight.stopping:
                            raise _Stopping from error
                        if isinstance(error, DatabaseOutage) and error.is_lock and self._are_locked(events):
                            raise _EvaluationsLocked from error
                        self._counters.set_deadline(WORK_S)
                        verdict = classifier.classify(error)
                        if verdict == "batch":
                            raise
                        self._metrics.retried(QUEUE)
                        if not outage.wait(error, verdict):
                            raise _Stopping from error
                    else:
                        self._observe("write", connected_at, stored.written_at)
                        self._observe("commit", stored.written_at)
                        return stored
            finally:
                classifier.close()

    def _extend(self) -> None:
        """Extend this thread's time limit and deadline: a long log is being read page by page."""
        self._watch.renew(_PAGE_S)
        self._counters.set_deadline(_PAGE_S + _CONNECT_S)

    @contextmanager
    def _transaction(self, events: list[Pair], limit_s: float) -> Iterator[tuple[Connection, float]]:
        """Open a connection. Give the connection and the time at which it was ready, on the clock of `time.perf_counter`."""
        self._counters.set_deadline(limit_s + _CONNECT_S)
        started = time.perf_counter()
        with tracing.transaction(len(events)), self._connections.connect(limit_s, self._watch) as conn:
            yield conn, self._observe("connect", started)

    def _report_stored(self, events: list[Pair], stored: event_store.Stored, outcome: BatchOutcome) -> None:
        self._metrics.stored(events, stored)
        tracing.record_outcomes(events, stored.outcomes)
        if "reused" in stored.outcomes:
            for (delivery, event), became in zip(events, stored.outcomes, strict=True):
                if became == "reused":
                    outcome.dead[delivery.redis_id] = cause(EventIdReused(event.eval_id, event.event_id))

    def _observe(self, phase: str, started: float, ended: float | None = None) -> float:
        """Record the duration of a phase. Return its end."""
        ended = time.perf_counter() if ended is None else ended
        self._counters.observe("evalstore_store_duration_seconds", phase, value=ended - started)
        return ended

    def _are_locked(self, events: list[Pair]) -> bool:
        """Return whether records of some of these events are locked.

        False if that is unknown, or if a whole table is locked.
        """
        try:
            with self._connections.connect(5, self._watch) as conn:
                return self._locks.refresh(conn, events)
        except Outage:
            return False


class _EvaluationsLocked(Outage):
    """Records of some evaluations are locked. Events of other evaluations need not wait."""


class _Stopping(Outage):
    """The process stops during an outage of PostgreSQL."""


def _bisect(events: list[Pair], failed_after_s: float) -> list[list[Pair]]:
    """Return smaller parts, the first part last. Work that fails slowly is divided into more parts, for fewer steps."""
    parts = 2 if failed_after_s < 1 else 16
    size = -(-len(events) // parts)
    return [events[start : start + size] for start in range(0, len(events), size)][::-1]
