"""How a queue's messages reach Dramatiq's worker threads, and how they are settled."""

import json
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import redis
from dramatiq import Message, MessageProxy
from dramatiq.broker import Consumer as DramatiqConsumer

from models.errors import PASSING, BadMessage, Outage
from models.logs import EventLogger
from tasks.broker import encode
from tasks.connections import as_bytes
from worker.batches import Batch, Delivery, cause, read
from worker.metrics import LOOP_S, WORK_S, named

if TYPE_CHECKING:
    from worker.broker import Broker

log = EventLogger("evalstore.worker")

# Two: while one batch waits for PostgreSQL, the next is fetched and read.
BATCHES: Final = 2
# While few messages come, those that come during a batch go together in the next, and wait for it no longer than this.
COALESCE_S: Final = 0.02
_LONGEST_WAIT_S: Final = 1.0
_OUTAGE_DELAY_MS: Final = 5_000
_MAX_LOGGED: Final = 20


class DeliveryHandle(MessageProxy):
    """A message, or a batch as the one argument of its actor, that is to be settled under `redis_ids`."""

    def __init__(self, message: Message[Any], redis_ids: list[bytes]) -> None:
        super().__init__(message)
        self.redis_ids = redis_ids
        self.retry_ms: int | None = None

    @property
    def batch(self) -> Batch | None:
        args = self._message.args
        return args[0] if args and isinstance(args[0], Batch) else None


class Consumer(DramatiqConsumer):
    """Hands out batches for actors that take them, single messages for others. Never raises for what Redis does or holds."""

    def __init__(self, broker: "Broker", queue_name: str, prefetch: int, timeout_ms: int) -> None:
        self.broker, self.queue_name, self.prefetch = broker, queue_name, prefetch
        if broker.batched.keys() - {queue_name}:
            # Dramatiq asks for two messages a thread. Long jobs leave one thread to the batches, if there is more than one.
            self.prefetch = max(1, prefetch // 2 - 1)
        self.timeout_s = min(timeout_ms / 1000, _LONGEST_WAIT_S)
        self.keys = broker.keys(queue_name)
        self.unacked = broker.unacked(queue_name)
        self.outstanding_message_count = 0
        self.loops = 0
        self._counting = threading.Lock()
        self._ready: deque[DeliveryHandle] = deque()
        self._has_quarantined = self._is_asking_quarantine = self._is_empty = False
        self._next_due_s = self.timeout_s
        self._failures = 0

    def __next__(self) -> DeliveryHandle | None:
        """The next batch or message; None after a while without one."""
        self.loops += 1
        self.broker.metrics.counters.set_deadline(LOOP_S)
        if not self._ready:
            try:
                self._fill()
            except redis.RedisError as error:
                self._wait_for_redis(error)
                return None
            self._failures = 0
            self.broker.metrics.outages.back("redis", self.queue_name)
        return self._ready.popleft() if self._ready else None

    def _fill(self) -> None:
        """Fetch what there is, or wait a while for it."""
        in_flight, is_batched = self.broker.in_flight, self.queue_name in self.broker.batched
        # Once asked for they may be ours, whatever became of the answer: we stay alone and ask until there is one.
        if self._is_asking_quarantine or (self._has_quarantined and in_flight.enter_exclusive()):
            self._is_asking_quarantine = True
            suspects = self._fetch_quarantined()
            self._is_asking_quarantine = False
            if not suspects:
                self._has_quarantined = False
                in_flight.leave_exclusive()
            self._hand_out(suspects)
            return
        room = (BATCHES if is_batched else self.prefetch) - self.outstanding_message_count
        if room > 0 and self._is_empty and not self._has_quarantined and in_flight.may_fetch():
            if is_batched:
                in_flight.wait_until(lambda: not self.outstanding_message_count, COALESCE_S)
            self._wait_for_message()
        with in_flight.fetching() as may_fetch:
            found = self._fetch(self.broker.batch_events if is_batched else room) if may_fetch and room > 0 else None
        if found is None:
            in_flight.wait_for_change(min(self.timeout_s, 0.1))
            return
        self._hand_out(found)

    def _wait_for_message(self) -> None:
        """Block until the queue has an element: woken at once, by any sender.

        The element is put aside where the next fetch, whosever it is, takes it from: so it wakes one of those who wait and not
        all of them, and nothing is lost with whoever is woken. Refused when Redis is full, as it might allocate, or to a user
        who may not; then the fetch comes a little later.
        """
        wait_s: Any = max(0.001, min(self._next_due_s, self.timeout_s))
        self._is_empty = False  # the next fetch will tell, also where the answer to this is lost
        try:
            self.broker.client.blmove(self.keys.queue, self.keys.woken, wait_s, "LEFT", "RIGHT")
        except (redis.OutOfMemoryError, redis.exceptions.NoPermissionError):
            self.broker.in_flight.sleep_unless_stopping(0.05)

    def _fetch(self, most: int) -> list[tuple[bytes, bytes]]:
        keys = self.keys
        places = [keys.queue, keys.bodies, self.unacked, keys.delayed, keys.suspects]
        places += [keys.stock_delayed, keys.stock_delayed_bodies, keys.processes, keys.woken]
        number, process = self.broker.fetches[self.queue_name] + 1, self.broker.process
        suspects, next_due_ms, left, ids, *along = self.broker.run(
            "fetch", places, number, most, self.broker.batch_bytes, process
        )
        self._has_quarantined, self._is_empty = suspects > 0, left == 0
        self._next_due_s = self.timeout_s if next_due_ms < 0 else next_due_ms / 1000
        bodies: list[Any] = along[0] if along else self.broker.client.hmget(keys.bodies, ids) if ids else []
        if gone := [redis_id for redis_id, body in zip(ids, bodies, strict=True) if body is None]:
            self.broker.run("settle", [self.unacked, keys.bodies, keys.deaths], *gone)
        return self._register(number, {one: body for one, body in zip(ids, bodies, strict=True) if body is not None})

    def _fetch_quarantined(self) -> list[tuple[bytes, bytes]]:
        places = [self.keys.suspects, self.keys.bodies, self.unacked, self.keys.processes]
        number = self.broker.fetches[self.queue_name] + 1
        found = self.broker.run("fetch_quarantined", places, number, self.broker.process)
        return self._register(number, dict(zip(found[::2], found[1::2], strict=True)))

    def _register(self, number: int, found: dict[Any, Any]) -> list[tuple[bytes, bytes]]:
        """Note what a fetch brought: first that it is held, then that the fetch is answered, as reconciling relies on."""
        bodies = {as_bytes(redis_id): as_bytes(body) for redis_id, body in found.items()}
        new = self.broker.in_flight.add(self.queue_name, bodies)
        self.broker.fetches[self.queue_name] = number
        return [(redis_id, body) for redis_id, body in bodies.items() if redis_id in new]

    def _hand_out(self, found: list[tuple[bytes, bytes]]) -> None:
        """Put what was fetched where the worker takes it from: as a batch, which its actor reads, or one by one."""
        if not found:
            return
        if batch_actor := self.broker.batched.get(self.queue_name):
            batch = Batch([Delivery(redis_id, body) for redis_id, body in found])
            message: Message[Any] = Message(self.queue_name, batch_actor, (batch,), {}, {}, str(uuid4()))
            self._add(message, [redis_id for redis_id, _ in found])
            return
        try:
            self._hand_out_singly(found)
        except BaseException:
            # Memory, say. Reconciling gives it back; held here, with nobody at work on it, it would stay for ever.
            self.broker.in_flight.remove([redis_id for redis_id, _ in found])
            raise

    def _hand_out_singly(self, found: list[tuple[bytes, bytes]]) -> None:
        bad: dict[bytes, bytes] = {}
        for redis_id, body in found:
            try:
                message = read(body)
                self.broker.get_actor(message.actor_name)
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the others go on
                bad[redis_id] = cause(error)
                continue
            # The eta is over, and Dramatiq's worker looks its consumer up by the name in the message.
            options = {name: value for name, value in message.options.items() if name != "eta"}
            options["redis_message_id"] = redis_id.decode(errors="replace")
            self._add(Message(**message.asdict() | {"queue_name": self.queue_name, "options": options}), [redis_id])
        if bad:
            log.error("invalid_messages", count=len(bad), queue=self.queue_name)
            self._settle([], bad)

    def _add(self, message: Message[Any], redis_ids: list[bytes]) -> None:
        with self._counting:
            self.outstanding_message_count += 1
        self._ready.append(DeliveryHandle(message, redis_ids))

    def ack(self, message: Any) -> None:
        """Settle what was worked on: done with, to be tried again, or dead, whichever its actor and middleware decided."""
        redis_ids, error = _ids(message), getattr(message, "_exception", None)
        batch = message.batch if isinstance(message, DeliveryHandle) else None
        try:
            if batch is not None and (batch.returned or isinstance(error, Outage)):
                self._requeue(redis_ids)
            elif batch is not None and error is not None and len(batch) > 1:
                self._bisect(message)
            elif error is None:
                self._acknowledge(redis_ids, batch)
            elif isinstance(error, PASSING):
                # As it came: Dramatiq's middleware has counted this as a try, and an outage uses up none.
                self._retry_later(dict.fromkeys(redis_ids, _OUTAGE_DELAY_MS))
            elif isinstance(message, DeliveryHandle) and message.retry_ms is not None:
                self._retry(redis_ids[0], message, message.retry_ms)
            else:
                self._dead_letter(redis_ids, batch, error)
        except BaseException:
            self.broker.in_flight.remove(redis_ids)  # reconciling gives it back
            raise
        finally:
            self._release()
            self.broker.metrics.counters.set_deadline(None)

    def _acknowledge(self, redis_ids: list[bytes], batch: Batch | None) -> None:
        buried, later = (batch.buried, batch.later) if batch else ({}, {})
        started = time.perf_counter()
        self._settle([one for one in redis_ids if one not in buried and one not in later], buried)
        self._retry_later(later)
        if batch:
            seconds = time.perf_counter() - started
            self.broker.metrics.counters.observe("evalstore_store_duration_seconds", "acknowledge", value=seconds)
            self._log_dead_letters(batch, buried)

    def _dead_letter(self, redis_ids: list[bytes], batch: Batch | None, error: BaseException) -> None:
        why = dict.fromkeys(redis_ids, cause(error))
        self._settle([], why)
        if batch:
            self._log_dead_letters(batch, why)

    def _log_dead_letters(self, batch: Batch, buried: dict[bytes, bytes]) -> None:
        bodies = {delivery.redis_id: delivery.body for delivery in batch if delivery.redis_id in buried}
        self.broker.metrics.buried(bodies.values())
        for redis_id in list(bodies)[:_MAX_LOGGED]:
            event, error_class = named(bodies[redis_id]), json.loads(buried[redis_id])["error_class"]
            log.warning("dead_letter", error_class=error_class, eval_id=event.eval_id, event_id=event.event_id, type=event.type)
        if len(bodies) > _MAX_LOGGED:
            log.warning("more_dead_letters", count=len(bodies) - _MAX_LOGGED)

    def _bisect(self, message: DeliveryHandle) -> None:
        """Hand out a batch whose actor failed, and did not say why, in halves: whatever causes that dies alone."""
        deliveries = message.batch.deliveries if message.batch else []
        middle = len(deliveries) // 2
        for half in (deliveries[:middle], deliveries[middle:]):
            options = {"queue_name": self.queue_name, "args": (Batch(half),), "message_id": str(uuid4())}
            self._add(message.copy(**options), [delivery.redis_id for delivery in half])

    def nack(self, message: Any) -> None:
        """Make a dead letter of it, with what its actor raised as the cause."""
        error = getattr(message, "_exception", None) or BadMessage("rejected")
        if isinstance(error, PASSING):  # rejected for tries that an outage used up
            self.ack(message)
            return
        try:
            self._settle([], dict.fromkeys(_ids(message), cause(error)))
        finally:
            self._release()
            self.broker.metrics.counters.set_deadline(None)

    def requeue(self, messages: Iterable[Any]) -> None:
        """Put back, at the head of the queue, what was handed out and not begun."""
        left = list(messages)
        if left:
            self._requeue([redis_id for message in left for redis_id in _ids(message)])
        for _ in left:
            self._release()

    def close(self) -> None:
        """Put back what was fetched and not handed out."""
        if self._is_asking_quarantine:
            self._is_asking_quarantine = False
            self.broker.in_flight.leave_exclusive()
        self.requeue(list(self._ready))
        self._ready.clear()

    def _release(self) -> None:
        with self._counting:  # many threads do this, and what went uncounted would never be free again
            self.outstanding_message_count = max(0, self.outstanding_message_count - 1)
        self.broker.in_flight.remove(())

    def _settle(self, done: list[bytes], bad: dict[bytes, bytes]) -> None:
        keys = self.keys
        if done:
            places = [self.unacked, keys.bodies, keys.deaths]
            self._until_done(done, lambda: self.broker.run("settle", places, *done))
        if bad:
            places = [self.unacked, keys.bodies, keys.dead, keys.dead_bodies, keys.causes, keys.deaths]
            pairs = [part for pair in bad.items() for part in pair]
            self._until_done(list(bad), lambda: self.broker.run("dead_letter", places, *pairs))

    def _retry(self, redis_id: bytes, message: Any, retry_ms: int | None) -> None:
        keys = [self.unacked, self.keys.bodies, self.keys.delayed]
        try:
            body = encode(message)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            self._settle([], {redis_id: cause(error)})
            return
        self._until_done([redis_id], lambda: self.broker.run("retry", keys, redis_id, body, retry_ms))
        self.broker.metrics.retried(self.queue_name)

    def _retry_later(self, later: dict[bytes, int]) -> None:
        if later:
            pairs = [part for pair in later.items() for part in pair]
            self._until_done(list(later), lambda: self.broker.run("retry_later", [self.unacked, self.keys.delayed], *pairs))
            self.broker.metrics.retried(self.queue_name, len(later))

    def _requeue(self, redis_ids: list[bytes]) -> None:
        self._until_done(redis_ids, lambda: self.broker.run("requeue", [self.unacked, self.keys.queue], *redis_ids))
        self.broker.metrics.redelivered(self.queue_name, "stopped", len(redis_ids))

    def _until_done(self, redis_ids: list[bytes], act: Callable[[], Any]) -> None:
        """Do it however long Redis is away. When the process is to stop, one try more: what stays behind is reclaimed."""
        in_flight = self.broker.in_flight
        while not in_flight.abandoned:
            self.broker.metrics.counters.set_deadline(WORK_S)
            try:
                act()
            except redis.RedisError as error:
                if not self._wait_for_redis(error):
                    in_flight.abandoned = True
            else:
                self.broker.in_flight.remove(redis_ids)
                self.broker.metrics.outages.back("redis", self.queue_name)
                return

    def _wait_for_redis(self, error: redis.RedisError) -> bool:
        """Wait a moment, longer each time; say so once. Returns whether to go on."""
        self.loops += 1
        self._failures += 1
        self.broker.metrics.outages.away("redis", self.queue_name)
        self.broker.reset_if_readonly(error)
        if self._failures == 1:
            log.warning("redis_refuses", queue=self.queue_name, error=error)
        longest_s = min(_LONGEST_WAIT_S, 0.05 * 2 ** min(self._failures, 10))
        return self.broker.in_flight.sleep_unless_stopping(longest_s * random.uniform(0.5, 1))  # noqa: S311


def _ids(message: Any) -> list[bytes]:
    return message.redis_ids if isinstance(message, DeliveryHandle) else [as_bytes(message.options["redis_message_id"])]
