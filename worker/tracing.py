"""What a worker tells of its work to whoever follows traces. Where they are off, none of it does anything.

How the spans look, and why they are not made by OpenTelemetry's SDK, is in worker/batch_spans.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from evalstore.storage.event_store import Outcome
from models.record import EventRow
from tasks.tracing import provider
from worker.batches import Batch, Delivery

if TYPE_CHECKING:
    from worker.batch_spans import BatchSpans, Traces

SERVICE: Final = "evalstore-worker"
_OFF: Final = nullcontext()
_batch: ContextVar["BatchSpans | None"] = ContextVar("batch", default=None)


@cache
def traces() -> "Traces | None":
    """What sends this process's spans, or None where they are off."""
    made = provider(SERVICE)
    if made is None:
        return None
    from worker.batch_spans import Traces  # noqa: PLC0415 - it imports OpenTelemetry

    return Traces(made)


@contextmanager
def processing(batch: Batch) -> Iterator[None]:
    """The spans of a batch, for the thread that works on it; what follows adds to them."""
    found = traces()
    if found is None:
        yield
        return
    spans = found.batch(batch)
    token = _batch.set(spans)
    try:
        yield
    finally:
        _batch.reset(token)
        spans.end()


def sender_traces() -> dict[bytes, Any] | None:
    """Where to put what each message of the batch says of its trace."""
    spans = _batch.get()
    return None if spans is None else spans.traceparents


def transaction(events: int) -> AbstractContextManager[None]:
    """The span of a transaction, and of its failure."""
    spans = _batch.get()
    return _OFF if spans is None else spans.transaction(events)


def traces_of(events: Sequence[tuple[Delivery, EventRow]]) -> Callable[[Sequence[int]], list[str]] | None:
    """What `evaluations.store` asks for the traces that confirmations go on in."""
    spans = _batch.get()
    return None if spans is None else spans.traces_of(events)


def record_outcomes(events: Sequence[tuple[Delivery, EventRow]], outcomes: Sequence[Outcome]) -> None:
    """Note what became of events."""
    if spans := _batch.get():
        spans.note(events, outcomes)


def flush() -> None:
    """Send what waits to be sent, before the process ends."""
    if found := traces():
        found.flush()
