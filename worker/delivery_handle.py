"""The messages that a consumer gives to Dramatiq's worker."""

from typing import Any

from dramatiq import Message, MessageProxy

from worker.batches import Batch


class DeliveryHandle(MessageProxy):
    """A message or a batch, which is settled under `redis_ids`. A batch is the only argument of its actor.

    `retry_ms` is the delay that Dramatiq's middleware chose for a retry.
    """

    def __init__(self, message: Message[Any], redis_ids: list[bytes]) -> None:
        super().__init__(message)
        self.redis_ids = redis_ids
        self.retry_ms: int | None = None

    @property
    def batch(self) -> Batch | None:
        args = self._message.args
        return args[0] if args and isinstance(args[0], Batch) else None
