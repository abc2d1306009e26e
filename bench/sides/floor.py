"""The floor: fetch, decode, `evaluations.store`, acknowledge, in one plain loop: evalstore without Dramatiq and without care.

What evalstore costs above this is the price of Dramatiq's worker, and of losing none.
"""

from bench.sides.evalstore import fill
from evalstore.storage import event_store
from models.settings import settings
from tasks.keys import QUEUE
from worker.broker import Broker
from worker.handler import engine, read_message

__all__ = ["fill"]


def main() -> None:
    """Store until killed."""
    broker = Broker(url=settings().redis_url.get_secret_value(), middleware=[])
    consumer = broker.consume(QUEUE)
    with engine().connect() as conn:
        while True:
            if found := consumer._fetch(settings().batch_events):  # noqa: SLF001 - with no more around it than this
                event_store.store(conn, [read_message(body) for _, body in found])
                consumer._settle([redis_id for redis_id, _ in found], {})  # noqa: SLF001
            else:
                broker.client.blmove(consumer.keys.queue, consumer.keys.queue, 1, "LEFT", "LEFT")


if __name__ == "__main__":
    main()
