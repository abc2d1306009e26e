"""The periodic jobs. Each does everything that is due, so that a run too many or too few harms nobody."""

import dramatiq
from periodiq import PeriodiqMiddleware, cron

from storage import confirmations as stored_confirmations
from worker import confirmations
from worker.broker import Broker
from worker.evaluations import engine

QUEUE = "jobs"

# periodiq drops what is older than `skip_delay`, as if it had succeeded, and a retried job is older than its tick.
_SKIP_DELAY_S = 3600


def declare(broker: Broker) -> None:
    """Declare the periodic jobs on `broker`, for its workers to run and for `periodiq` to schedule."""
    broker.add_middleware(PeriodiqMiddleware(skip_delay=_SKIP_DELAY_S))

    @dramatiq.actor(broker=broker, queue_name=QUEUE, periodic=cron("* * * * *"))
    def relay_confirmations() -> None:
        """Publish confirmations that were left behind, and forget those that were published long ago."""
        with engine().connect() as conn:
            confirmations.relay(conn, broker)
            stored_confirmations.forget(conn)
