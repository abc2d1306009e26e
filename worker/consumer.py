"""Fetching a queue's messages for Dramatiq's worker threads, and settling them."""

import json
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple
from uuid import uuid4

import redis
from dramatiq import Message
from dramatiq.broker import Consumer as DramatiqConsumer

from models.errors import PASSING, BadMessage, Outage
from models.logs import EventLogger
from tasks.broker import encode
from tasks.connections import as_bytes
from worker.batches import Batch, BatchOutcome, Delivery
from worker.delivery_handle import DeliveryHandle
from worker.in_flight import InFlight
from worker.messages import cause, read_envelope
from worker.metrics import LOOP_S, WORK_S, WorkerMetrics, named
from worker.queue_client import QueueClient

log = EventLogger("evalstore.worker")

# While one batch waits for PostgreSQL, the next is fetched and decoded.
BATCHES: Final = 2
# At a low rate, messages that arrive during a batch gather for the next batch, at most for this long.
COALESCE_S: Final = 0.02
_LONGEST_WAIT_S: Final = 1.0
_OUTAGE_DELAY_MS: Final = 5_000
_MAX_LOGGED: Final = 20


class BatchActor(NamedTuple):
    """An actor that takes batches of at most `max_events`."""

    name: str
    max_events: int


class Consumer(DramatiqConsumer):
    """Hands out batches if the queue has a batch actor, else single messages. Waits during an outage of Redis."""

    def __init__(
        self,
        queue: QueueClient,
        in_flight: InFlight,
        metrics: WorkerMetrics,
        get_actor: Callable[[str], Any],
        *,
        batch_actor: BatchActor | None,
        max_bytes: int,
        prefetch: int,
        timeout_ms: int,
    ) -> None:
        self.queue_name, self.keys, self.prefetch = queue.queue, queue.keys, prefetch
        self.timeout_s = min(timeout_ms / 1000, _LONGEST_WAIT_S)
        self.outstanding_message_count = 0
        self.loops = 0
        self._queue, self._in_flight, self._metrics = queue, in_flight, metrics
        self._get_actor, self._batch_actor, self._max_bytes = get_actor, batch_actor, max_bytes
        self._counting = threading.Lock()
        self._ready: deque[DeliveryHandle] = deque()
        self._has_quarantined = self._is_asking_quarantine = self._is_empty = False
        self._next_due_s = self.timeout_s
        self._failures = 0

    def __next__(self) -> DeliveryHandle | None:
        """Return the next batch or message, or None after a pause without messages."""
        self.loops += 1
        self._metrics.counters.set_deadline(LOOP_S)
        if not self._ready:
            try:
                self._fill()
            except redis.RedisError as error:
                self._wait_for_redis(error)
                return None
            self._failures = 0
            self._metrics.outages.back("redis", self.queue_name)
        return self._ready.popleft() if self._ready else None

    def _fill(self) -> None:
        """Fetch messages, or wait a limited time for them."""
        in_flight = self._in_flight
        # The reply may be lost after Redis assigned the messages: stay exclusive and ask again.
        if self._is_asking_quarantine or (self._has_quarantined and in_flight.enter_exclusive()):
            self._is_asking_quarantine = True
            quarantined = self._register(self._queue.fetch_quarantined())
            self._is_asking_quarantine = False
            if not quarantined:
                self._has_quarantined = False
                in_flight.leave_exclusive()
            self._hand_out(quarantined)
            return
        room = (BATCHES if self._batch_actor else self.prefetch) - self.outstanding_message_count
        if room > 0 and self._is_empty and not self._has_quarantined and in_flight.may_fetch():
            if self._batch_actor:
                in_flight.wait_until(lambda: not self.outstanding_message_count, COALESCE_S)
            self._wait_for_message()
        with in_flight.fetching() as may_fetch:
            found = self._fetch(room) if may_fetch and room > 0 else None
        if found is None:
            in_flight.wait_for_change(min(self.timeout_s, 0.1))
            return
        self._hand_out(found)

    def _wait_for_message(self) -> None:
        self._is_empty = False  # The next fetch checks the queue, even if this reply is lost.
        try:
            self._queue.wait_for_message(min(self._next_due_s, self.timeout_s))
        except (redis.OutOfMemoryError, redis.exceptions.NoPermissionError):
            # Redis refuses BLMOVE if it is full, or if the user may not block: poll instead.
            self._in_flight.sleep_unless_stopping(0.05)

    def _fetch(self, max_messages: int) -> list[Delivery]:
        max_messages = self._batch_actor.max_events if self._batch_actor else max_messages
        fetched = self._queue.fetch(max_messages, self._max_bytes)
        self._has_quarantined, self._is_empty = fetched.quarantined > 0, fetched.left == 0
        self._next_due_s = self.timeout_s if fetched.next_due_s is None else fetched.next_due_s
        return self._register(fetched.bodies)

    def _register(self, bodies: dict[bytes, bytes]) -> list[Delivery]:
        # The order matters: Heartbeat requeues answered messages that are not in flight.
        new = self._in_flight.add(self.queue_name, bodies)
        self._queue.mark_answered()
        return [Delivery(redis_id, body) for redis_id, body in bodies.items() if redis_id in new]

    def _hand_out(self, found: list[Delivery]) -> None:
        """Make fetched messages available to `__next__`: as one batch for a batch actor, else singly."""
        if not found:
            return
        if self._batch_actor:
            self._add_batch(self._batch_actor.name, found)
            return
        try:
            self._hand_out_singly(found)
        except BaseException:
            # For example, memory ran out. A message in flight that no worker holds would stay forever; Heartbeat requeues other
            # messages.
            self._in_flight.remove([redis_id for redis_id, _ in found])
            raise

    def _add_batch(self, actor_name: str, deliveries: list[Delivery]) -> None:
        message: Message[Any] = Message(self.queue_name, actor_name, (Batch(deliveries),), {}, {}, str(uuid4()))
        self._add(message, [delivery.redis_id for delivery in deliveries])

    def _hand_out_singly(self, found: list[Delivery]) -> None:
        bad: dict[bytes, bytes] = {}
        for redis_id, body in found:
            try:
                message = read_envelope(body)
                self._get_actor(message.actor_name)
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - one unreadable message must not stop the others
                bad[redis_id] = cause(error)
                continue
            # The eta has passed, and Dramatiq's worker finds its consumer by the message's queue_name.
            options = {name: value for name, value in message.options.items() if name != "eta"}
            options["redis_message_id"] = redis_id.decode(errors="replace")
            self._add(Message(**message.asdict() | {"queue_name": self.queue_name, "options": options}), [redis_id])
        if bad:
            log.error("invalid_messages", count=len(bad), queue=self.queue_name)
            self._dead_letter(bad)

    def _add(self, message: Message[Any], redis_ids: list[bytes]) -> None:
        with self._counting:
            self.outstanding_message_count += 1
        self._ready.append(DeliveryHandle(message, redis_ids))

    def ack(self, message: Any) -> None:
        """Settle a message as its handler, actor or middleware decided: acknowledge, retry, or dead letter."""
        redis_ids, error = _ids(message), getattr(message, "_exception", None)
        batch = message.batch if isinstance(message, DeliveryHandle) else None
        try:
            if batch is not None:
                self._settle_batch(batch, redis_ids, error)
            elif error is None:
                self._acknowledge(redis_ids)
            elif isinstance(error, PASSING):
                # Retry the message unchanged: the changed message counts a retry, and an outage should use up none.
                self._retry_later(dict.fromkeys(redis_ids, _OUTAGE_DELAY_MS))
            elif isinstance(message, DeliveryHandle) and message.retry_ms is not None:
                self._retry(redis_ids[0], message, message.retry_ms)
            else:
                self._dead_letter(dict.fromkeys(redis_ids, cause(error)))
        except BaseException:
            self._in_flight.remove(redis_ids)
            raise
        finally:
            self._release()
            self._metrics.counters.set_deadline(None)

    def _settle_batch(self, batch: Batch, redis_ids: list[bytes], error: BaseException | None) -> None:
        """Settle the outcomes that the handler returned. If it raised, bisect the batch until the bad message is alone."""
        if isinstance(error, Outage):
            self._requeue(redis_ids)
            return
        if error is not None and len(batch) > 1:
            middle = len(batch) // 2
            for half in (batch.deliveries[:middle], batch.deliveries[middle:]):
                self._add_batch(self._batch_actor.name if self._batch_actor else "", half)
            return
        outcome = batch.outcome if error is None else BatchOutcome(dead=dict.fromkeys(redis_ids, cause(error)))
        started = time.perf_counter()
        self._acknowledge(outcome.stored(redis_ids))
        self._dead_letter(outcome.dead)
        self._retry_later(outcome.retry_ms)
        self._requeue(outcome.requeue)
        self._metrics.counters.observe("evalstore_store_duration_seconds", "acknowledge", value=time.perf_counter() - started)
        self._report_dead_letters(batch, outcome.dead)

    def _report_dead_letters(self, batch: Batch, causes: dict[bytes, bytes]) -> None:
        if not causes:
            return
        bodies = {delivery.redis_id: delivery.body for delivery in batch if delivery.redis_id in causes}
        self._metrics.buried(bodies.values())
        for redis_id in list(bodies)[:_MAX_LOGGED]:
            event, error_class = named(bodies[redis_id]), json.loads(causes[redis_id])["error_class"]
            log.warning("dead_letter", error_class=error_class, eval_id=event.eval_id, event_id=event.event_id, type=event.type)
        if len(bodies) > _MAX_LOGGED:
            log.warning("more_dead_letters", count=len(bodies) - _MAX_LOGGED)

    def nack(self, message: Any) -> None:
        """Make a dead letter of a message, with its actor's exception as the cause. After an outage, retry it instead."""
        error = getattr(message, "_exception", None) or BadMessage("rejected")
        if isinstance(error, PASSING):
            self.ack(message)
            return
        try:
            self._dead_letter(dict.fromkeys(_ids(message), cause(error)))
        finally:
            self._release()
            self._metrics.counters.set_deadline(None)

    def requeue(self, messages: Iterable[Any]) -> None:
        """Put messages back at the head of the queue, if no worker thread has begun them."""
        left = list(messages)
        self._requeue([redis_id for message in left for redis_id in _ids(message)])
        for _ in left:
            self._release()

    def close(self) -> None:
        """Put back messages that were fetched and not handed out."""
        if self._is_asking_quarantine:
            self._is_asking_quarantine = False
            self._in_flight.leave_exclusive()
        self.requeue(list(self._ready))
        self._ready.clear()

    def _release(self) -> None:
        with self._counting:
            self.outstanding_message_count = max(0, self.outstanding_message_count - 1)
        self._in_flight.remove(())

    def _acknowledge(self, redis_ids: Sequence[bytes]) -> None:
        if redis_ids:
            self._until_done(redis_ids, lambda: self._queue.settle(redis_ids))

    def _dead_letter(self, causes: dict[bytes, bytes]) -> None:
        if causes:
            self._until_done(list(causes), lambda: self._queue.dead_letter(causes))

    def _retry(self, redis_id: bytes, message: Any, delay_ms: int) -> None:
        try:
            body = encode(message)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            self._dead_letter({redis_id: cause(error)})
            return
        self._until_done([redis_id], lambda: self._queue.retry(redis_id, body, delay_ms))
        self._metrics.retried(self.queue_name)

    def _retry_later(self, delays_ms: dict[bytes, int]) -> None:
        if delays_ms:
            self._until_done(list(delays_ms), lambda: self._queue.retry_later(delays_ms))
            self._metrics.retried(self.queue_name, len(delays_ms))

    def _requeue(self, redis_ids: list[bytes]) -> None:
        if redis_ids:
            self._until_done(redis_ids, lambda: self._queue.requeue(redis_ids))
            self._metrics.redelivered(self.queue_name, "stopped", len(redis_ids))

    def _until_done(self, redis_ids: Sequence[bytes], act: Callable[[], Any]) -> None:
        """Repeat `act` during an outage of Redis. While the process stops, try once more; other processes reclaim the rest."""
        while not self._in_flight.abandoned:
            self._metrics.counters.set_deadline(WORK_S)
            try:
                act()
            except redis.RedisError as error:
                if not self._wait_for_redis(error):
                    self._in_flight.abandoned = True
            else:
                self._in_flight.remove(redis_ids)
                self._metrics.outages.back("redis", self.queue_name)
                return

    def _wait_for_redis(self, error: redis.RedisError) -> bool:
        """Wait, longer after each failure. Log the first failure. Return whether to go on."""
        self.loops += 1
        self._failures += 1
        self._metrics.outages.away("redis", self.queue_name)
        self._queue.reset_if_readonly(error)
        if self._failures == 1:
            log.warning("redis_refuses", queue=self.queue_name, error=error)
        longest_s = min(_LONGEST_WAIT_S, 0.05 * 2 ** min(self._failures, 10))
        return self._in_flight.sleep_unless_stopping(longest_s * random.uniform(0.5, 1))  # noqa: S311


def _ids(message: Any) -> list[bytes]:
    return message.redis_ids if isinstance(message, DeliveryHandle) else [as_bytes(message.options["redis_message_id"])]
