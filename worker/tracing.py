"""The traces of a worker. With traces off, these functions do nothing. worker/batch_spans.py makes the spans."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from evalstore.storage.event_store import Outcome
from models.record import EventRow
from tasks.tracing import provider
from worker.batches import Batch, BatchOutcome, Delivery

if TYPE_CHECKING:
    from worker.batch_spans import BatchSpans, Traces

SERVICE: Final = "evalstore-worker"
_OFF: Final = nullcontext()
_batch: ContextVar["BatchSpans | None"] = ContextVar("batch", default=None)


@cache
def traces() -> "Traces | None":
    """Return the sender of this process's spans; None with traces off."""
    made = provider(SERVICE)
    if made is None:
        return None
    from worker.batch_spans import Traces  # noqa: PLC0415 - it imports OpenTelemetry

    return Traces(made)


@contextmanager
def processing(batch: Batch, outcome: BatchOutcome) -> Iterator[None]:
    """Trace a batch. The functions below add to its trace if the same thread calls them in the block.

    `outcome` is read at the end.
    """
    found = traces()
    if found is None:
        yield
        return
    spans = found.batch(batch, outcome)
    token = _batch.set(spans)
    try:
        yield
    finally:
        _batch.reset(token)
        spans.end()


def sender_traces() -> dict[bytes, Any] | None:
    """Return the dictionary for the `traceparent` of each message, by its id in Redis; None with traces off."""
    spans = _batch.get()
    return None if spans is None else spans.traceparents


def transaction(events: int) -> AbstractContextManager[None]:
    """Trace one attempt to store this number of events."""
    spans = _batch.get()
    return _OFF if spans is None else spans.transaction(events)


def traces_of(events: Sequence[tuple[Delivery, EventRow]]) -> Callable[[Sequence[int]], list[str]] | None:
    """Return a function from positions in `events` to the `traceparent`s of their confirmations; None without traces."""
    spans = _batch.get()
    return None if spans is None else spans.traces_of(events)


def record_outcomes(events: Sequence[tuple[Delivery, EventRow]], outcomes: Sequence[Outcome]) -> None:
    """Record the outcomes of committed events."""
    if spans := _batch.get():
        spans.note(events, outcomes)


def flush() -> None:
    """Send all waiting spans, before the process ends."""
    if found := traces():
        found.flush()
