"""What a sink refuses that is no event: its dead letter, and giving it again."""

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from evalstore.sinks import BadMessage, Batch
from evalstore.sinks.delivery import Delivery
from evalstore.sinks.source import Step
from evalstore.sinks.worker import _step_of
from evalstore.storage.redrives import SinkLetter
from evalstore.storage.sink_cursors import Cursor, Place

CURSOR = Cursor(Place(1, 0, datetime(2026, 1, 1, tzinfo=UTC)), 0, 1)
ANOMALY = {"type": "storage:anomaly:detected", "anomaly_id": "a", "value": "größer"}


class Refusing:
    """Refuses all, and then takes all."""

    def __init__(self) -> None:
        self.refuses = True
        self.erased = list[str]()
        self.confirmed = list[dict[str, Any]]()

    def write(self, batch: Batch) -> None: ...

    def erase(self, eval_id: str) -> None:
        self._take()
        self.erased.append(eval_id)

    def confirm(self, confirmation: dict[str, Any]) -> None:
        self._take()
        self.confirmed.append(confirmation)

    def _take(self) -> None:
        if self.refuses:
            raise BadMessage("it does not fit")


@pytest.mark.parametrize("confirmation", [None, ANOMALY])
def test_what_is_refused_without_an_event_is_given_again_as_it_was(confirmation: dict[str, Any] | None) -> None:
    sink = Refusing()
    delivery = Delivery("one", sink)
    delivery.run([Step("" if confirmation else "e", None, CURSOR, CURSOR.place, confirmation is None, confirmation)])
    (letter,) = delivery.letters()
    assert msgspec.json.decode(letter.message)["type"] == (confirmation or {"type": "storage:evaluation:erased"})["type"]
    sink.refuses = False
    delivery.call([_step_of(SinkLetter(uuid4(), letter.eval_id or "", None, letter.message), CURSOR)])
    assert (sink.erased, sink.confirmed) == (([], [confirmation]) if confirmation else (["e"], []))
