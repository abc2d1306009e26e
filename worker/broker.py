"""The consuming half of the broker, which Dramatiq's worker and command line run.

A message is in one place in Redis: in the queue, in a process's unacknowledged set, delayed, in quarantine, or dead. Other
processes reclaim the set of a dead process. A running process requeues messages of its set that none of its threads holds.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import dramatiq
from dramatiq import Actor, Message, Worker

from tasks.broker import SendingBroker
from worker.batches import Batch, BatchOutcome
from worker.consumer import BatchActor, Consumer
from worker.delivery_handle import DeliveryHandle
from worker.heartbeat import Heartbeat, Limits, process_name
from worker.in_flight import InFlight
from worker.metrics import WORK_S, WorkerMetrics
from worker.queue_client import QueueClient
from worker.scripts import Scripts


class Broker(SendingBroker):
    """Takes the parameters of SendingBroker and a few more.

    `max_deaths`: a message becomes a dead letter after this many processes died while they held only this message.
    `batch_events` and `batch_bytes` are the limits of one batch.
    """

    def __init__(
        self, *, max_deaths: int = 5, batch_events: int = 2000, batch_bytes: int = 8 * 1024 * 1024, **given: Any
    ) -> None:
        super().__init__(**given)
        self.in_flight, self.metrics, self.lua = InFlight(), WorkerMetrics(), Scripts(self.client)
        self.process = process_name()
        self._max_deaths, self._batch_events, self._batch_bytes = max_deaths, batch_events, batch_bytes
        self._batch_actors: dict[str, BatchActor] = {}
        self._queue_clients: dict[str, QueueClient] = {}
        self._heartbeat: Heartbeat | None = None
        self.add_middleware(_Lifecycle())

    def declare_batch_actor(self, actor: Actor[..., None], handle: Callable[[Batch], BatchOutcome]) -> None:
        """Declare an actor that receives batches. `handle` returns the outcome of each message."""
        actor.fn = partial(_run, handle)
        self._batch_actors[actor.queue_name] = BatchActor(actor.actor_name, self._batch_events)
        self.declare_actor(actor)

    def unacked(self, queue: str, process: str | None = None) -> str:
        """Return the key of a process's unacknowledged messages; without `process`, of this process."""
        return self.keys(queue).unacked_prefix + (process or self.process)

    def queue_client(self, queue: str) -> QueueClient:
        """Return this process's access to a queue."""
        if queue not in self._queue_clients:
            self._queue_clients[queue] = QueueClient(self, self.lua, queue, self.process)
        return self._queue_clients[queue]

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 1000) -> Consumer:
        """Return the consumer that Dramatiq's worker iterates over."""
        if self._batch_actors.keys() - {queue_name}:
            # Dramatiq prefetches two messages a thread. Leave one thread to the batches, if there is more than one.
            prefetch = max(1, prefetch // 2 - 1)
        return Consumer(
            self.queue_client(queue_name),
            self.in_flight,
            self.metrics,
            self.get_actor,
            batch_actor=self._batch_actors.get(queue_name),
            max_bytes=self._batch_bytes,
            prefetch=prefetch,
            timeout_ms=timeout,
        )

    def make_heartbeat(self, worker: Worker) -> Heartbeat:
        """Return the heartbeat of this process, not started yet."""
        return Heartbeat(
            worker,
            lambda: [self.queue_client(queue) for queue in sorted(self.queues)],
            self,
            self.in_flight,
            self.metrics,
            Limits(self._max_deaths, self._batch_actors.keys()),
        )

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Send a message. For a retry by Dramatiq's middleware, the consumer schedules the message when it acknowledges."""
        if isinstance(message, DeliveryHandle):
            message.retry_ms = delay or 0
            return message
        return super().enqueue(message, delay=delay)

    def boot(self, worker: Worker) -> None:
        """Start the heartbeat, under a new process name."""
        # Batches create no reference cycles; frequent garbage collection cost 10 % of CPU.
        gc.freeze()
        gc.set_threshold(100_000, 10, 10)
        self.process = process_name()
        self._queue_clients.clear()
        self.in_flight.open()
        self._heartbeat = self.make_heartbeat(worker)
        self._heartbeat.start()

    def stopping(self) -> None:
        """Stop fetching."""
        self.in_flight.close()
        self.metrics.counters.disable_deadlines()
        if self._heartbeat:
            self._heartbeat.stop_in_time()

    def stopped(self) -> None:
        """Requeue the remaining messages, and deregister the process."""
        if self._heartbeat:
            self._heartbeat.stop()
            self._heartbeat = None


def _run(handle: Callable[[Batch], BatchOutcome], batch: Batch) -> None:
    # Dramatiq discards an actor's return value with a warning. So the message carries the outcome to the consumer.
    batch.outcome = handle(batch)


class _Lifecycle(dramatiq.Middleware):
    """Dramatiq makes consumers after `before_worker_boot`, so that they have the new process name."""

    def before_worker_boot(self, broker: Any, worker: Worker) -> None:
        broker.boot(worker)

    def after_consumer_thread_boot(self, broker: Any, thread: Any) -> None:
        broker.metrics.counters.watch_thread(f"consumer of {thread.queue_name}")

    def after_worker_thread_boot(self, broker: Any, thread: Any) -> None:
        broker.metrics.counters.watch_thread(f"worker {thread.name}")

    def before_process_message(self, broker: Any, message: Any) -> None:  # noqa: ARG002 - Dramatiq's signature
        broker.metrics.counters.set_deadline(WORK_S)

    def before_worker_shutdown(self, broker: Any, worker: Worker) -> None:  # noqa: ARG002 - Dramatiq's signature
        broker.stopping()

    def after_worker_shutdown(self, broker: Any, worker: Worker) -> None:  # noqa: ARG002 - Dramatiq's signature
        broker.stopped()
