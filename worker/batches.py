"""The batches that a consumer hands to the handler, and the outcomes that the handler returns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from models.record import EventRow
from tasks.redrives import REDRIVEN


class Delivery(NamedTuple):
    """A message fetched from Redis."""

    redis_id: bytes
    body: bytes

    @property
    def is_redriven(self) -> bool:
        """Whether an operator sent the message again."""
        return self.redis_id.startswith(REDRIVEN)


Pair = tuple[Delivery, EventRow]


@dataclass(slots=True)
class BatchOutcome:
    """The outcomes of a batch's messages, by their ids in Redis. A message that no field names is stored."""

    dead: dict[bytes, bytes] = field(default_factory=dict)
    """Dead letters, each with its cause as JSON."""
    retry_ms: dict[bytes, int] = field(default_factory=dict)
    """Messages to try again unchanged, in so many milliseconds."""
    requeue: list[bytes] = field(default_factory=list)
    """Messages that go back to the head of the queue, because this process stops."""

    def update(self, other: "BatchOutcome") -> None:
        """Add the outcome of other messages."""
        self.dead |= other.dead
        self.retry_ms |= other.retry_ms
        self.requeue += other.requeue

    def stored(self, redis_ids: Sequence[bytes]) -> Sequence[bytes]:
        """Return those of `redis_ids` that are stored."""
        if not (self.dead or self.retry_ms or self.requeue):
            return redis_ids
        others = {*self.dead, *self.retry_ms, *self.requeue}
        return [redis_id for redis_id in redis_ids if redis_id not in others]


@dataclass(slots=True)
class Batch:
    """The deliveries for one call of a handler.

    The broker adds the handler's `outcome`, and the consumer settles the deliveries.
    """

    deliveries: list[Delivery]
    outcome: BatchOutcome = field(default_factory=BatchOutcome)

    def __iter__(self) -> Iterator[Delivery]:
        return iter(self.deliveries)

    def __len__(self) -> int:
        return len(self.deliveries)

    def __repr__(self) -> str:
        return f"<batch of {len(self.deliveries)}>"
