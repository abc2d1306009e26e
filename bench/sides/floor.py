"""The floor: one plain loop that fetches, decodes, stores and acknowledges, without Dramatiq and without safety.

The difference to evalstore is the cost of Dramatiq's worker and of losing no message.
"""

from bench.sides.evalstore import fill
from evalstore.storage import event_store
from models.settings import settings
from tasks.keys import QUEUE
from worker.broker import Broker
from worker.messages import read_message
from worker.verified_database import VerifiedDatabase

__all__ = ["fill"]


def main() -> None:
    """Store messages until killed."""
    broker = Broker(url=settings().redis_url.get_secret_value(), middleware=[])
    queue, max_bytes = broker.queue_client(QUEUE), settings().max_content_bytes
    with VerifiedDatabase.of(settings()).engine.connect() as conn:
        while True:
            if bodies := queue.fetch(settings().batch_events, settings().batch_bytes).bodies:
                event_store.store(conn, [read_message(body, max_bytes) for body in bodies.values()])
                queue.settle(list(bodies))
                queue.mark_answered()
            else:
                broker.client.blmove(queue.keys.queue, queue.keys.queue, 1, "LEFT", "LEFT")


if __name__ == "__main__":
    main()
