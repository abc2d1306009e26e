"""The consuming half of the broker, which Dramatiq's own worker and command line run.

Where a message is, is what Redis says: in the queue, in a process's unacknowledged set, delayed, suspected, or dead. A process
that dies leaves its set to the others; one that lives compares its set with what it holds, and gives back the difference.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import dramatiq
from dramatiq import Actor, Message, Worker

from evalstore.storage.database import Watch
from tasks.broker import SendingBroker
from worker.batches import Batch
from worker.consumer import Consumer, DeliveryHandle
from worker.heartbeat import Heartbeat, process_name
from worker.in_flight import InFlight
from worker.metrics import WORK_S, WorkerMetrics

_LUA: Final = Path(__file__).parent / "lua"
# A thread is not kept longer than this by work of which there may be any amount: it goes on later, and other work has its turn.
BUDGET_S: Final = 2.0


def time_budget(seconds: float = BUDGET_S) -> Callable[[], bool]:
    """What tells whether a turn that begins now goes on."""
    give_up = time.monotonic() + seconds
    return lambda: time.monotonic() < give_up


class Broker(SendingBroker):
    """Takes what RedisBroker takes, and: `max_deaths`, how many processes a message may kill, alone in each, before it is a
    dead letter; `batch_events`, `batch_bytes`, how much is fetched together for actors that take batches."""

    def __init__(
        self, *, max_deaths: int = 5, batch_events: int = 2000, batch_bytes: int = 8 * 1024 * 1024, **given: Any
    ) -> None:
        super().__init__(**given)
        self.max_deaths, self.batch_events, self.batch_bytes = max_deaths, batch_events, batch_bytes
        self.batched: dict[str, str] = {}
        self.in_flight = InFlight()
        self.metrics = WorkerMetrics()
        self.watch = Watch()
        self.fetches: dict[str, int] = defaultdict(int)
        self.process = process_name()
        self._scripts = {path.stem: self.script(path) for path in sorted(_LUA.glob("*.lua"))}
        self._heartbeat: Heartbeat | None = None
        self.add_middleware(_Lifecycle())

    def declare_batch_actor(self, actor: Actor[..., None], run: Callable[[Batch], None]) -> None:
        """Declare an actor that is called with batches of whatever arrives on its queue, and what it does with them."""
        actor.fn = run
        self.batched[actor.queue_name] = actor.actor_name
        self.declare_actor(actor)

    def run(self, name: str, keys: list[str], *args: Any) -> Any:
        """Run the script worker/lua/<name>.lua. Raises what redis raises; every script may be run again."""
        return self._scripts[name](keys=keys, args=args)

    def unacked(self, queue: str, process: str | None = None) -> str:
        """The key of what a process holds of a queue; without a name, this process."""
        return self.keys(queue).unacked_prefix + (process or self.process)

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 1000) -> Consumer:
        """What Dramatiq's worker iterates over."""
        return Consumer(self, queue_name, prefetch, timeout)

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Send a message. A retry, which Dramatiq's middleware asks for in this way, is one step with the acknowledgement."""
        if isinstance(message, DeliveryHandle):
            message.retry_ms = delay or 0
            return message
        return super().enqueue(message, delay=delay)

    def boot(self, worker: Worker) -> None:
        """Begin to live, under a new name."""
        # A batch makes objects by the ten thousand, and no circles: to look for some after each 700 took a tenth of the time.
        gc.freeze()
        gc.set_threshold(100_000, 10, 10)
        self.process = process_name()
        self.in_flight.open()
        self._heartbeat = Heartbeat(self, worker)
        self._heartbeat.start()

    def stopping(self) -> None:
        """Take nothing more."""
        self.in_flight.close()
        self.metrics.counters.disable_deadlines()
        if self._heartbeat:
            self._heartbeat.stop_in_time()

    def stopped(self) -> None:
        """Leave nothing behind."""
        if self._heartbeat:
            self._heartbeat.stop()
            self._heartbeat = None


class _Lifecycle(dramatiq.Middleware):
    """Consumers are made after `before_worker_boot`, so the process has its name by then."""

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
