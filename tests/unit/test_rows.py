"""Which events are few: those are written in another way than many are."""

from uuid import UUID

from evalstore.storage.event_writer import are_few
from models.events import parse
from models.record import EventRow, to_row


def queued(size: int) -> EventRow:
    named = {"type": "evaluation:queued", "eval_id": "e", "event_id": UUID(int=1), "occurred_at": "2026-01-01T00:00:00Z"}
    return to_row(parse(named | {"code": "x" * size}))


def test_few_events_are_few_and_small() -> None:
    assert are_few([queued(1000)] * 64)
    assert not are_few([queued(1000)] * 65)
    assert not are_few([queued(1000), queued(1_000_000)])
