"""Ask a worker to replay a range of evaluations. The database holds which ones, and at which rate."""

from typing import Final
from uuid import UUID

from tasks import jobs
from tasks.broker import SendingBroker

ACTOR: Final = "replay_evaluations"


def job_id(replay_id: UUID, number: int) -> str:
    """Return the Redis message id of the request."""
    return f"replay:{replay_id}:{number}"


def ask(broker: SendingBroker, replay_id: UUID, number: int) -> None:
    """Ask a worker to continue a range of a replay. Raises RedisOutage: a periodic job asks again."""
    jobs.ask(broker, ACTOR, (str(replay_id), number), job_id(replay_id, number))
