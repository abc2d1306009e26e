"""Ask a worker to redrive dead letters. The database holds which ones, and at which rate."""

from typing import Final
from uuid import UUID

from tasks import jobs
from tasks.broker import SendingBroker

ACTOR: Final = "redrive_dead_letters"
# The prefix of the Redis message id of a redriven dead letter.
REDRIVEN: Final = b"dead-letter:"


def job_id(redrive_id: UUID) -> str:
    """Return the Redis message id of the request."""
    return f"redrive:{redrive_id}"


def ask(broker: SendingBroker, redrive_id: UUID) -> None:
    """Ask a worker to continue a redrive. Raises RedisOutage: a periodic job asks again."""
    jobs.ask(broker, ACTOR, (str(redrive_id),), job_id(redrive_id))
